"""Multiplication by a matrix."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .base import FactoredOperation, MatrixShape, moment_of_rows, sums_of_rows, widen


class Dense(FactoredOperation):
    """`y = W x + b` for a vector x: `V = [W b]`, or one of the two.

    **Fields:**

    - `weight`: W, `(*stack, outputs, inputs)`, or `None` if it is frozen.
    - `bias`: b, `(*stack, outputs)`, or `None` if there is none or it is frozen.
    - `inputs_first`: whether the weight is stored as `(*stack, inputs, outputs)`, for layers that compute `x @ W`.
    """

    weight: Any
    bias: Any = None
    inputs_first: bool = eqx.field(static=True, default=False)

    def shape(self) -> MatrixShape:
        if self.weight is not None:
            if len(self.weight.shape) < 2:
                raise ValueError(
                    f"`kfax.Dense` takes a matrix, got a weight of shape {self.weight.shape}. For a number for each "
                    "feature, which multiplies it, use `kfax.ScaleAndShift`."
                )
            *stack, rows, columns = self.weight.shape
            outputs, inputs = (columns, rows) if self.inputs_first else (rows, columns)
            return MatrixShape(tuple(stack), outputs, inputs, self.bias is not None, self.weight.dtype)
        *stack, outputs = self.bias.shape
        return MatrixShape(tuple(stack), outputs, 0, True, self.bias.dtype)

    def to_matrix(self) -> Shaped[Array, "*stack d_g d_a"]:
        columns = []
        if self.weight is not None:
            columns.append(jnp.swapaxes(self.weight, -1, -2) if self.inputs_first else self.weight)
        if self.bias is not None:
            columns.append(self.bias[..., None])
        return jnp.concatenate(columns, axis=-1)

    def from_matrix(self, matrix: Float[Array, "*stack d_g d_a"]) -> "Dense":
        weight = None
        if self.weight is not None:
            weight = matrix[..., : matrix.shape[-1] - (self.bias is not None)]
            weight = jnp.swapaxes(weight, -1, -2) if self.inputs_first else weight
        return Dense(weight, None if self.bias is None else matrix[..., -1], self.inputs_first)

    def gradient(self, x: Array, dy: Array, context: Any) -> Float[Array, "d_g d_a"]:
        return widen(dy.reshape(dy.shape[0], -1)).T @ widen(self._extended(x, 1))

    def of_tangents(self) -> "Dense | None":
        return None if self.weight is None else Dense(self.weight, None, self.inputs_first)

    def num_positions(self, x: Array) -> int:
        return 1

    def input_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        return moment_of_rows(self._extended(x, 2), weights, dtype, diagonal=diagonal)

    def input_sums(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any) -> Float[Array, "n num_inputs"]:
        return sums_of_rows(self._rows(x, 2), weights, dtype)

    def inputs(self, x: Array) -> Float[Array, "n p d_a"]:
        return self._extended(x, 2)

    def cotangents(self, dy: Array) -> Float[Array, "n p d_g"]:
        return dy.reshape(*dy.shape[:2], -1)

    def _rows(self, x: Array, ndim: int) -> Shaped[Array, "... num_inputs"]:
        """a, for each row along the first `ndim` axes."""
        rows = x.reshape(*x.shape[:ndim], -1)
        return rows[..., :0] if self.weight is None else rows

    def _extended(self, x: Array, ndim: int) -> Shaped[Array, "... d_a"]:
        """ā, likewise: one product then serves weight and bias."""
        rows = self._rows(x, ndim)
        if self.bias is None:
            return rows
        return jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1), rows.dtype)], axis=-1)
