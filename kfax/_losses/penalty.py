"""Terms of the objective without curvature."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .._math.arguments import array
from .._math.types import Scalar


def _scalar(value: Any) -> Scalar:
    value = array("`value` of `kfax.Penalty`", value)
    if value.ndim != 0 or not jnp.isrealobj(value):
        raise ValueError(
            f"`Penalty` takes a single real number, got {value.dtype} of shape {value.shape}. Sum or average it first."
        )
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


class Penalty(eqx.Module):
    """A term of the objective that has a gradient but no curvature: L1, a KL divergence, a load balance.

    Return it from `loss_fn` next to a [`kfax.Loss`][]: `[loss, 0.01 * kfax.Penalty(value)]`. Its gradient is exact;
    every estimate of the curvature but [`kfax.Hessian`][] leaves it out. For L2 use [`kfax.L2`][], whose curvature is
    known.

    **Fields:**

    - `number`: the value, in the unit of the loss.
    """

    number: Scalar

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: a scalar, in the unit of the loss.
        """
        self.number = _scalar(value)

    def __mul__(self, other: ArrayLike) -> "Penalty":
        return Penalty(self.number * jnp.asarray(other, self.number.dtype))

    __rmul__ = __mul__

    def value(self) -> Scalar:
        """The number, as that of a [`kfax.Loss`][]. [loss]"""
        return self.number
