"""The L2 regularizer: one source for the loss, the gradient and the curvature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._layers import to_matrices
from .._math.arguments import selection
from .._math.scalars import nonnegative
from .._math.tree import distinct
from .._math.types import Model, Parameters, PyTree, Scalar, Where


class L2(eqx.Module):
    r"""Adds $\tfrac\eta2 \|\theta\|^2$ to the loss: ηθ to its gradient, and ηI to its curvature.

    Unlike decoupled weight decay it is part of the objective, so that it shows in the loss and in the quadratic model.
    """

    coefficient: Scalar | None
    where: Where | None = eqx.field(static=True)

    def __init__(self, coefficient: ArrayLike | None, where: Where | None = None):
        """**Arguments:**

        - `coefficient`: η ≥ 0, or `None` for no regularizer, for which nothing is computed. [loss/param²]
        - `where`: what is regularized: a function of the model that returns nodes of it, as in `equinox.tree_at`.
            Everything that is trained, if not given.

        **Raises:** `ValueError` for values out of their range; at the first use for a `where` that selects nothing that
        is trained.
        """
        if where is not None:
            selection("`where` of `kfax.L2`", where)
        self.coefficient = None if coefficient is None else nonnegative("l2", coefficient)
        self.where = where

    @property
    def is_active(self) -> bool:
        """Whether there is anything to compute."""
        return self.coefficient is not None

    def mask(self, model: Model, parameters: Parameters) -> PyTree:
        """Which leaves of the parameters are regularized."""
        return selected("kfax.L2", self.where, model, parameters)

    def add_gradient(self, mask: PyTree, gradient: Parameters, parameters: Parameters) -> Parameters:
        """The gradient of loss and regularizer, of that of the loss."""
        coefficient = self.coefficient
        if coefficient is None:
            return gradient

        def add(chosen, g, x):
            wide = jnp.promote_types(jnp.result_type(g, x), jnp.float32)
            return (g + coefficient.astype(wide) * x).astype(g.dtype) if chosen else g

        return jax.tree.map(add, mask, gradient, parameters)

    def total(self, mask: PyTree, products: Float[Array, "leaves k"]) -> Float[Array, " k"]:
        """Inner products in the metric of the regularizer's curvature, of those of each leaf of the parameters."""
        if self.coefficient is None:
            return jnp.zeros_like(products[0])
        chosen = np.array(jax.tree.leaves(mask))
        return self.coefficient.astype(products.dtype) * jnp.sum(products[chosen], axis=0)

    def damping(self, mask: PyTree, parameters: Parameters) -> Scalar | dict[str, Scalar]:
        """What to add to the damping, or to each layer's: η times the share of its parameters that is regularized."""
        coefficient = jnp.zeros(()) if self.coefficient is None else self.coefficient
        if self.where is None:
            return coefficient
        flags = jax.tree.map(lambda chosen, x: jnp.full(x.shape, chosen, jnp.float32), mask, parameters)
        return {
            key: coefficient * jnp.mean(matrix).astype(coefficient.dtype) for key, matrix in to_matrices(flags).items()
        }


def selected(name: str, where: Where | None, model: Model, parameters: Parameters) -> PyTree:
    """Which leaves of the parameters are in the nodes that `where` returns; all, if it is not given."""
    if where is None:
        return jax.tree.map(lambda _: True, parameters)
    model = distinct(model)
    chosen = {id(leaf) for leaf in jax.tree.leaves(where(model)) if eqx.is_array(leaf)}
    is_trained = jax.tree.map(lambda leaf: leaf is not None, parameters, is_leaf=lambda leaf: leaf is None)
    mask = jax.tree.map(lambda leaf: id(leaf) in chosen, eqx.filter(model, is_trained))
    if not chosen <= {id(leaf) for leaf in jax.tree.leaves(model)} or not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"`where` of `{name}` must return nodes of the model, as in `where=lambda model: "
            "[layer.weight for layer in model.layers]` (no mask of booleans), but it returned arrays that are not "
            "among its leaves, or nothing that is trained."
        )
    return mask
