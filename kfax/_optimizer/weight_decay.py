"""Decoupled weight decay."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .._math.arguments import selection
from .._math.scalars import nonnegative
from .._math.types import Model, Parameters, Scalar, Where
from .l2 import selected


class WeightDecay(eqx.Module):
    r"""Takes $\alpha\, w\, \theta$ off the parameters in each step, with α the learning rate.

    Unlike [`kfax.L2`][] it is no part of the objective, and neither preconditioned nor carried on by momentum: whatever
    the curvature, all parameters decay at one rate. As in `optax.adamw`.

    ??? cite "Source"
        Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    coefficient: Scalar | None
    where: Where | None = eqx.field(static=True)

    def __init__(self, coefficient: ArrayLike | None, where: Where | None = None):
        """**Arguments:**

        - `coefficient`: w ≥ 0, or `None` for none, for which nothing is computed.
        - `where`: what decays: a function of the model that returns nodes of it, as in `equinox.tree_at`. Everything
            that is trained, if not given.

        **Raises:** `ValueError` for values out of their range; at the first use for a `where` that selects nothing that
        is trained.
        """
        if where is not None:
            selection("`where` of `kfax.WeightDecay`", where)
        self.coefficient = None if coefficient is None else nonnegative("weight_decay", coefficient)
        self.where = where

    def add(self, model: Model, parameters: Parameters, update: Parameters, learning_rate: Scalar) -> Parameters:
        """An update with what decays in a step."""
        if self.coefficient is None:
            return update
        rate = learning_rate * self.coefficient

        def add(chosen, x, u):
            wide = jnp.promote_types(jnp.result_type(x, u), jnp.float32)
            return (u - rate.astype(wide) * x).astype(u.dtype) if chosen else u

        return jax.tree.map(add, selected("kfax.WeightDecay", self.where, model, parameters), parameters, update)
