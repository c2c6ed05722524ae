"""Blocks made of per-example gradients: exact in the entries that they keep."""

import abc
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math.types import ArrayTree
from .._operations import MatrixShape, Operation
from .._slot import Use
from .base import ProductBlock, Recorded
from .product import check_inversion, Cholesky, Eigh, Inversion, Product


class GradientBlock(ProductBlock):
    """What blocks have in common that are made of the second moment of the gradients of single examples.

    The gradients are summed over all uses of a layer within an example before they are multiplied, so that what is
    kept is exact however often a layer is used. That takes memory for one gradient of each example in a batch.
    """

    @property
    def is_sum(self) -> bool:
        return False

    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        return Recorded((), no_gradients(shape, num_examples))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        return Recorded((), gradients_of(shape, operation, use))

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: ArrayTree) -> ArrayTree:
        return self.squares(shape, cotangents)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: ArrayTree,
    ) -> ArrayTree:
        return jax.tree.map(lambda kept: kept / num_examples, second_moment)

    def zeros(self, shape: MatrixShape) -> ArrayTree:
        examples = jax.ShapeDtypeStruct((*shape.leading, 1, shape.d_g, shape.d_a), shape.statistics_dtype)
        kept = jax.eval_shape(lambda gradients: self.squares(shape, gradients), examples)
        return jax.tree.map(lambda kept: jnp.zeros(kept.shape, kept.dtype), kept)

    @abc.abstractmethod
    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> ArrayTree:
        """What is kept of the products of the gradients' entries, summed over examples: an array, or several."""


def no_gradients(shape: MatrixShape, num_examples: int) -> Float[Array, "*leading n d_g d_a"]:
    """Zeros for the gradients of examples, complete over all uses."""
    return jnp.zeros((*shape.leading, num_examples, shape.d_g, shape.d_a), shape.statistics_dtype)


def gradients_of(shape: MatrixShape, operation: Operation, use: Use) -> Float[Array, "*groups n d_g d_a"]:
    """The gradients of examples, as far as they are due to one use."""

    def one(x, dy):
        gradient = operation.gradient(x, dy, use.context).astype(shape.statistics_dtype)
        missing = shape.d_a - gradient.shape[-1]  # a bias that this use has not
        return jnp.pad(gradient, [(0, 0)] * (gradient.ndim - 1) + [(0, missing)])

    return jax.vmap(one, out_axes=len(shape.groups))(use.x, use.dy)


class ScaledIdentity(GradientBlock):
    r"""A multiple of the identity, of the same trace as the exact block.

    $$C = c\, I, \qquad c = \tfrac1{NP} \sum_n \lVert D_n \rVert^2, \qquad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    where each matrix of a stack has a c of its own, and P parameters. What is preconditioned by it goes down the
    gradient. For any operation. Memory: a number for each parameter, and one for each parameter and example during an
    update.
    """

    inversion: ClassVar[Inversion] = Eigh()

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "*leading"]:
        return jnp.sum(jnp.mean(gradients * gradients, axis=(-2, -1)), axis=-1)

    def product(self, shape: MatrixShape, statistics: Float[Array, "*leading"]) -> Product:
        diagonal = jnp.broadcast_to(statistics[..., None], (*shape.leading, shape.d_g * shape.d_a))
        return Product(None, diagonal, len(shape.leading))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return shape.num_parameters

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters

    def update_flops(self, shape: MatrixShape) -> int:
        return 4 * shape.num_parameters


class Diagonal(GradientBlock):
    r"""The diagonal of the exact block.

    $$C_{ii} = \tfrac1N \sum_n \big(\textstyle\sum_r g_{nr} \bar a_{nr}^\top\big)_i^2$$

    For any operation. Memory: 2 numbers for each parameter, and one for each parameter and example during an update.
    """

    inversion: ClassVar[Inversion] = Eigh()

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        return jnp.sum(gradients * gradients, axis=-3)

    def product(self, shape: MatrixShape, statistics: Float[Array, "*leading d_g d_a"]) -> Product:
        return Product(None, statistics.reshape(*shape.leading, -1), len(shape.leading))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return shape.num_parameters

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters

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

    inversion: Inversion

    def __init__(self, *, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `inversion`: [`kfax.Cholesky`][]`()`, or [`kfax.Eigh`][]`()` for a damping that changes without a refresh.
        """
        self.inversion = check_inversion(inversion)

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        return jnp.einsum("...ngi,...ngj->...gij", gradients, gradients)

    def product(self, shape: MatrixShape, statistics: Float[Array, "*leading d_g d_a d_a"]) -> Product:
        return Product(None, statistics, len(shape.leading) + 1)

    def refresh_flops(self, shape: MatrixShape) -> int:
        return shape.num_matrices * shape.d_g * self.inversion.refresh_flops(shape.d_a)

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * shape.d_a * self.inversion.num_products

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * (1 + shape.d_a)


class Full(GradientBlock):
    r"""The exact block of all parameters of an operation.

    $$C = \tfrac1N \sum_n \mathrm{vec}(D_n)\, \mathrm{vec}(D_n)^\top, \qquad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    For any operation of few parameters. With P of them (all groups of a convolution together) it takes memory for
    `2 P²` numbers, and `2 P³` flops for a refresh. Its arrays have the stack axes, but none for groups.
    """

    inversion: Inversion

    def __init__(self, *, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `inversion`: [`kfax.Cholesky`][]`()`, or [`kfax.Eigh`][]`()` for a damping that changes without a refresh.
        """
        self.inversion = check_inversion(inversion)

    def squares(self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "..."]:
        gradients = jnp.moveaxis(gradients, -3, len(shape.stack))
        flat = gradients.reshape(*gradients.shape[: len(shape.stack) + 1], -1)
        return jnp.swapaxes(flat, -1, -2) @ flat

    def product(self, shape: MatrixShape, statistics: Float[Array, "*stack p p"]) -> Product:
        return Product(None, statistics, len(shape.stack))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return math.prod(shape.stack) * self.inversion.refresh_flops(self._size(shape))

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * self._size(shape) * shape.num_parameters * self.inversion.num_products

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * self._size(shape) * shape.num_parameters

    def _size(self, shape: MatrixShape) -> int:
        """P."""
        return shape.num_parameters // max(math.prod(shape.stack), 1)
