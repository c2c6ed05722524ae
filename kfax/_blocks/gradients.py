"""Blocks made of per-example gradients: exact within what they keep."""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import _linalg as linalg
from .._fold import Use
from .._operations import MatrixShape, Operation
from .._types import Scalar
from .base import Block, BlockState, Recorded


class GradientBlock(Block):
    """What blocks have in common that keep some entries of the second moment of the gradients of single examples.

    The gradients are summed over all uses of a layer within an example before they are multiplied, so that the
    entries are exact however often a layer is used. That takes memory for one gradient of each example in a batch.
    """

    @property
    def is_sum(self) -> bool:
        return False

    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        dims = (*shape.leading, num_examples, shape.d_g, shape.d_a)
        return Recorded((), jnp.zeros(dims, shape.statistics_dtype))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        def one(x, dy):
            gradient = operation.gradient(x, dy, use.context).astype(shape.statistics_dtype)
            missing = shape.d_a - gradient.shape[-1]
            return jnp.pad(gradient, [(0, 0)] * (gradient.ndim - 1) + [(0, missing)])

        return Recorded((), jax.vmap(one, out_axes=len(shape.groups))(use.x, use.dy))

    def second_moment(self, shape: MatrixShape, cotangents: PyTree[Array]) -> PyTree[Array]:
        return self.squares(shape, cotangents)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: PyTree[Array],
        second_moment: PyTree[Array],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> Float[Array, "..."]:
        return second_moment / num_examples

    def init(self, shape: MatrixShape) -> BlockState:
        examples = jax.ShapeDtypeStruct((*shape.leading, 1, shape.d_g, shape.d_a), shape.statistics_dtype)
        kept = jax.eval_shape(lambda gradients: self.squares(shape, gradients), examples)
        zeros = jnp.zeros(kept.shape, kept.dtype)
        one = jnp.ones((), kept.dtype)
        return BlockState(zeros, self.refresh(zeros, one, self.matrices(zeros, one)))

    @abc.abstractmethod
    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        """The entries that are kept, summed over examples."""


class Diagonal(GradientBlock):
    r"""The diagonal of the exact block.

    $$C_{ii} = \tfrac1N \sum_n \big(\textstyle\sum_r g_{nr} \bar a_{nr}^\top\big)_i^2$$

    For any operation. Memory: 2 numbers for each parameter, and one for each parameter and example during an update.
    """

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        return jnp.sum(gradients * gradients, axis=-3)

    def matrices(self, statistics: Float[Array, "..."], damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return ((statistics + damping.astype(statistics.dtype))[..., None, None],)

    def refresh(self, statistics: Any, damping: Scalar, inverses: tuple[Float[Array, "..."], ...]) -> Any:
        return inverses[0][..., 0, 0]

    def solve(self, inverse: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        return (inverse * vector.astype(inverse.dtype)).astype(vector.dtype)

    def multiply(self, statistics: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        return (statistics * vector.astype(statistics.dtype)).astype(vector.dtype)

    def eigenvalues(self, statistics: Any) -> Float[Array, "*leading d"]:
        return statistics.reshape(*statistics.shape[:-2], -1)

    def to_dense(self, statistics: Any) -> Float[Array, "*leading d d"]:
        return linalg.as_dense(self.eigenvalues(statistics), statistics.ndim - 2)

    def refresh_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters

    def solve_flops(self, shape: MatrixShape) -> int:
        return shape.num_parameters

    def update_flops(self, shape: MatrixShape) -> int:
        return 4 * shape.num_parameters


class UnitWise(GradientBlock):
    r"""The exact block of the parameters of each output unit, nothing between units.

    $$C_{(ij)(ik)} = \tfrac1N \sum_n D_{n,ij} D_{n,ik}, \qquad D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    For the scale and shift of a normalization these are 2x2 matrices, one for each feature. For any operation; memory
    `2 d_g d_a²` numbers, and one for each parameter and example during an update. A refresh takes about `2 d_g d_a³`
    flops.

    ??? cite "Source"
        Osawa et al. 2020, arXiv:2002.06015, section 3.2, for batch normalization.
    """

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        return jnp.einsum("...ngi,...ngj->...gij", gradients, gradients)

    def matrices(self, statistics: Float[Array, "..."], damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return (linalg.shift(statistics, damping),)

    def refresh(self, statistics: Any, damping: Scalar, inverses: tuple[Float[Array, "..."], ...]) -> Any:
        return inverses[0]

    def solve(self, inverse: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        return linalg.matmul(inverse, vector[..., None].astype(inverse.dtype))[..., 0].astype(vector.dtype)

    def multiply(self, statistics: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        return self.solve(statistics, vector)

    def eigenvalues(self, statistics: Any) -> Float[Array, "*leading d"]:
        return jnp.linalg.eigvalsh(statistics).reshape(*statistics.shape[:-3], -1)

    def to_dense(self, statistics: Any) -> Float[Array, "*leading d d"]:
        d_g, d_a = statistics.shape[-3:-1]
        units = jnp.eye(d_g, dtype=statistics.dtype)
        return jnp.einsum("...gij,gh->...gihj", statistics, units).reshape(*statistics.shape[:-3], d_g * d_a, d_g * d_a)

    def refresh_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * shape.d_a**2

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * shape.d_a

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * (1 + shape.d_a)


class Full(GradientBlock):
    r"""The exact block of all parameters of an operation.

    $$C = \tfrac1N \sum_n \mathrm{vec}(D_n)\, \mathrm{vec}(D_n)^\top, \qquad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    For any operation of few parameters. With P of them (all groups of a convolution together) it takes memory for
    `2 P²` numbers, and `2 P³` flops for a refresh. Its arrays have the stack axes, but none for groups.
    """

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        gradients = jnp.moveaxis(gradients, -3, len(shape.stack))
        flat = gradients.reshape(*gradients.shape[: len(shape.stack) + 1], -1)
        return jnp.swapaxes(flat, -1, -2) @ flat

    def matrices(self, statistics: Float[Array, "..."], damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return (linalg.shift(statistics, damping),)

    def refresh(self, statistics: Any, damping: Scalar, inverses: tuple[Float[Array, "..."], ...]) -> Any:
        return inverses[0]

    def solve(self, inverse: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        flat = vector.reshape(*inverse.shape[:-1], 1).astype(inverse.dtype)
        return linalg.matmul(inverse, flat).reshape(vector.shape).astype(vector.dtype)

    def multiply(self, statistics: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        return self.solve(statistics, vector)

    def eigenvalues(self, statistics: Any) -> Float[Array, "*stack d"]:
        return jnp.linalg.eigvalsh(statistics)

    def to_dense(self, statistics: Any) -> Float[Array, "*stack d d"]:
        return statistics

    def refresh_flops(self, shape: MatrixShape) -> int:
        return 2 * self._size(shape) ** 2 * shape.num_parameters

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * self._size(shape) * shape.num_parameters

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * self._size(shape) * shape.num_parameters

    def _size(self, shape: MatrixShape) -> int:
        """P."""
        return shape.num_parameters // max(math.prod(shape.stack), 1)
