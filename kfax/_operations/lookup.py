"""Choosing a row of a table."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .base import FactoredOperation, MatrixShape, widen


class Lookup(FactoredOperation):
    """`y = W[x]` for an integer x: V is the transpose of W, applied to one-hot vectors.

    One-hot vectors are made by `input_sums` and `inputs` only. Blocks made of gradients need a table for each example.

    **Fields:**

    - `weight`: W, `(*stack, entries, outputs)`.
    """

    weight: Any

    def shape(self) -> MatrixShape:
        *stack, entries, outputs = self.weight.shape
        return MatrixShape(tuple(stack), outputs, entries, False, self.weight.dtype, one_hot=True)

    def to_matrix(self) -> Shaped[Array, "*stack d_g d_a"]:
        return jnp.swapaxes(self.weight, -1, -2)

    def from_matrix(self, matrix: Float[Array, "*stack d_g d_a"]) -> "Lookup":
        return Lookup(jnp.swapaxes(matrix, -1, -2))

    def gradient(self, x: Array, dy: Array, context: Any) -> Float[Array, "d_g d_a"]:
        dy = widen(dy)
        table = jnp.zeros((self.weight.shape[-2], dy.shape[-1]), dy.dtype)
        return table.at[x.reshape(-1)].add(dy.reshape(-1, dy.shape[-1])).T

    def of_tangents(self) -> None:
        """An integer has no derivative."""
        return None

    def num_positions(self, x: Array) -> int:
        return 1

    def input_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        """How often each entry was chosen; there is nothing off the diagonal."""
        ones = jnp.ones(x.shape[:2], dtype) if weights is None else weights.astype(dtype)
        counts = jnp.zeros(self.weight.shape[-2], dtype).at[x.reshape(-1)].add(ones.reshape(-1))
        return counts if diagonal else jnp.diag(counts)

    def input_sums(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any) -> Float[Array, "n num_inputs"]:
        return jax.vmap(lambda x, w: self.input_moment(x[None], w, dtype, diagonal=True))(
            x, None if weights is None else weights[:, None]
        )

    def inputs(self, x: Array) -> Float[Array, "n p num_inputs"]:
        return jax.nn.one_hot(x.reshape(x.shape[:2]), self.weight.shape[-2], dtype=self.weight.dtype)

    def cotangents(self, dy: Array) -> Float[Array, "n p d_g"]:
        return dy.reshape(*dy.shape[:2], -1)
