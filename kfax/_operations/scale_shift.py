"""Elementwise scale and shift."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .base import MatrixShape, Operation, widen


class ScaleAndShift(Operation):
    """`y = w x + b` with one w and b for each feature: `V = [w b]`, of shape `(features, 2)`, or one of the two.

    **Fields:**

    - `weight`: w, `(*stack, *features)`, or `None` if there is none or it is frozen.
    - `bias`: b, likewise.
    - `num_axes`: how many axes of features the parameters have. In input and output these come first; the features
        are shared along all further axes, and along those for which the parameters have size 1.
    """

    weight: Any
    bias: Any = None
    num_axes: int = eqx.field(static=True, default=1)

    def shape(self) -> MatrixShape:
        some = self.bias if self.weight is None else self.weight
        split = some.ndim - self.num_axes
        inputs = int(self.weight is not None)
        return MatrixShape(some.shape[:split], math.prod(some.shape[split:]), inputs, self.bias is not None, some.dtype)

    def to_matrix(self) -> Shaped[Array, "*stack d_g d_a"]:
        shape = self.shape()
        columns = [part.reshape(*shape.stack, shape.d_g) for part in (self.weight, self.bias) if part is not None]
        return jnp.stack(columns, axis=-1)

    def from_matrix(self, matrix: Float[Array, "*stack d_g d_a"]) -> "ScaleAndShift":
        weight = None if self.weight is None else matrix[..., 0].reshape(self.weight.shape)
        bias = None if self.bias is None else matrix[..., -1].reshape(self.bias.shape)
        return ScaleAndShift(weight, bias, self.num_axes)

    def gradient(self, x: Array, dy: Array, context: Any) -> Float[Array, "d_g d_a"]:
        x, dy = widen(x), widen(dy)
        some = self.bias if self.weight is None else self.weight
        features = some.shape[some.ndim - self.num_axes :]
        shared = [i for i in range(1, dy.ndim) if i > self.num_axes or features[i - 1] == 1]

        def total(array):
            return jnp.sum(array, axis=(0, *shared)).reshape(math.prod(features))

        columns = [] if self.weight is None else [total(dy * x)]
        if self.bias is not None:
            columns.append(total(dy))
        return jnp.stack(columns, axis=-1)

    def of_tangents(self) -> "ScaleAndShift | None":
        return None if self.weight is None else ScaleAndShift(self.weight, None, self.num_axes)
