"""A running average without the bias of its start."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .tree import zeros_like
from .types import ArrayTree, Scalar


class MovingAverage(eqx.Module):
    """An exponentially weighted mean of the values seen so far.

    After values `x_1 ... x_k` of weights `w_i` it holds `Σ ε^(k-i) w_i x_i / Σ ε^(k-i) w_i`: with decay `ε = 1` the
    plain weighted mean, and for any `ε` exactly `x_1` after one value, so no start-up correction is ever needed.

    **Fields:**

    - `value`: the mean; zeros before the first update.
    - `weight`: `Σ ε^(k-i) w_i`, zero before the first update.
    """

    value: ArrayTree
    weight: Scalar

    @classmethod
    def zeros(cls, like: ArrayTree) -> "MovingAverage":
        weight = jax.ShapeDtypeStruct((), jnp.result_type(float))
        return cls(zeros_like(like), zeros_like(weight))

    def update(self, new: ArrayTree, decay: Scalar, weight: ArrayLike = 1) -> "MovingAverage":
        total = decay.astype(self.weight.dtype) * self.weight + weight
        share = weight / jnp.where(total == 0, 1, total)
        value = jax.tree.map(lambda old, x: old + (x - old) * share.astype(old.dtype), self.value, new)
        return MovingAverage(value, total)
