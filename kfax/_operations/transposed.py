"""The same matrix, seen from the other side."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .base import FactoredOperation, MatrixShape


class Transposed(FactoredOperation):
    """`Vᵀ` in place of V: how a matrix is used that another operation has the transpose of.

    Its gradient is that of V. Its factors are those of the operation itself: inputs have the size of V's outputs.

    **Fields:**

    - `operation`: what applies `Vᵀ`; without a bias.
    """

    operation: FactoredOperation

    def shape(self) -> MatrixShape:
        shape = self.operation.shape()
        return MatrixShape(shape.stack, shape.num_inputs, shape.num_outputs, False, shape.dtype, shape.groups)

    def to_matrix(self) -> Shaped[Array, "*leading d_g d_a"]:
        return jnp.swapaxes(self.operation.to_matrix(), -1, -2)

    def from_matrix(self, matrix: Float[Array, "*leading d_g d_a"]) -> "Transposed":
        new = self.operation.from_matrix(jnp.swapaxes(matrix, -1, -2))
        assert isinstance(new, FactoredOperation)
        return Transposed(new)

    def gradient(self, x: Array, dy: Array, context: Any) -> Float[Array, "*groups d_g d_a"]:
        return jnp.swapaxes(self.operation.gradient(x, dy, context), -1, -2)

    def of_tangents(self) -> "Transposed | None":
        linear = self.operation.of_tangents()
        return Transposed(linear) if isinstance(linear, FactoredOperation) else None

    def num_positions(self, x: Array) -> int:
        return self.operation.num_positions(x)

    def input_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        return self.operation.input_moment(x, weights, dtype, diagonal=diagonal)

    def input_sums(
        self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any
    ) -> Float[Array, "*groups n num_inputs"]:
        return self.operation.input_sums(x, weights, dtype)

    def inputs(self, x: Array) -> Float[Array, "*groups n r d_a"]:
        return self.operation.inputs(x)

    def cotangents(self, dy: Array) -> Float[Array, "*groups n r d_g"]:
        return self.operation.cotangents(dy)
