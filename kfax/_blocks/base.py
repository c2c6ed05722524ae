"""The contract between a curvature block and the rest of the library."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math.types import ArrayTree, Scalar
from .._operations import MatrixShape, Operation
from .._slot import Use
from .product import Cholesky, Inverse, Inversion, Product, Spectrum


class Recorded(eqx.Module):
    """The statistics that a slot brings back.

    **Fields:**

    - `inputs`: the part that depends on the layer's inputs alone: the same for every cotangent.
    - `cotangents`: the part that depends on the cotangents; to be collected anew for each of them.
    """

    inputs: ArrayTree
    cotangents: ArrayTree


class BlockState(eqx.Module):
    """The curvature of one layer.

    **Fields:**

    - `statistics`: the block's running average; which arrays these are is the block's own affair.
    - `inverse`: that of the damped block, as of the last refresh.
    """

    statistics: Any
    inverse: Inverse


class Block(eqx.Module):
    """How the curvature of one layer's parameters is approximated.

    A block is configuration without arrays; its arrays are `statistics`, which are averaged over time, and an
    `Inverse`, which is computed from them by the occasional, costly refresh. With a loss in units of `loss` and
    parameters in units of `param`, the block and its damping are in loss/param².

    All arrays lead with the stack axes of `shape`, and those of each matrix with its group axes as well, unless a
    block says otherwise.
    """

    # -- collecting statistics of a batch --

    @property
    @abc.abstractmethod
    def is_sum(self) -> bool:
        """Whether what `record` returns is a plain sum over rows, so that it need not know the examples."""

    @property
    @abc.abstractmethod
    def counts_uses(self) -> bool:
        """Whether it makes a difference to know that a layer is used once. To find out takes no more than tracing."""

    @abc.abstractmethod
    def given(self, shape: MatrixShape, statistics: Any) -> ArrayTree:
        """What `record` finds in `use.given` of the statistics so far, or `None` if it needs nothing of them.

        Then they are `None` themselves where they are kept in parts ([`kfax.PlacedCurvature`][]).
        """

    @abc.abstractmethod
    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        """Zeros of the shapes that `record` returns (with the stack axes), of a use that `is_only` or may not be."""

    @abc.abstractmethod
    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        """Reads one use of one layer (without stack axes). Must be additive over uses.

        `operation` is what the layer does with its matrix in this use, which may lack the bias that `shape` has.

        **Raises:** `ValueError` if the operation cannot tell what the block needs.
        """

    @abc.abstractmethod
    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: ArrayTree) -> ArrayTree:
        """What `Recorded.cotangents`, complete over all uses, contributes: to be summed over several cotangents."""

    @abc.abstractmethod
    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: ArrayTree,
    ) -> Any:
        """Turns `Recorded.inputs` and the summed `second_moment` into means over examples."""

    # -- using them --

    @abc.abstractmethod
    def init(self, shape: MatrixShape) -> BlockState:
        """Zero statistics, and the inverse of the identity."""

    @property
    @abc.abstractmethod
    def diagonalizes(self) -> bool:
        """Whether a refresh is to diagonalize `matrices` rather than to invert them."""

    @abc.abstractmethod
    def matrices(self, shape: MatrixShape, statistics: Any, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        """The (stacks of) symmetric matrices that a refresh has to invert or diagonalize.

        The estimator does it, for all blocks at once.
        """

    @abc.abstractmethod
    def refresh(self, shape: MatrixShape, statistics: Any, damping: Scalar, results: tuple[Any, ...]) -> Inverse:
        """Makes the inverse, given the inverses of `matrices`, or pairs of their eigenvalues and eigenvectors."""

    @abc.abstractmethod
    def rebase(self, shape: MatrixShape, statistics: Any, inverse: Inverse) -> Any:
        """The statistics, where a refresh that made this inverse changes what they refer to; otherwise the very same.

        To change an eigenbasis is not costly: that it is found anew is what a refresh is for.
        """

    @abc.abstractmethod
    def redamp(self, shape: MatrixShape, statistics: Any, inverse: Inverse, damping: Scalar) -> Inverse:
        """The inverse for another λ, and for present statistics, as far as that takes no refresh."""

    @abc.abstractmethod
    def factors(self, shape: MatrixShape, statistics: Any) -> tuple[Float[Array, "..."], ...]:
        """The (stacks of) symmetric matrices that have to be diagonalized to diagonalize the block, undamped."""

    @abc.abstractmethod
    def axes(self, shape: MatrixShape, statistics: Any) -> Product:
        """A Kronecker product whose eigenvectors can be taken for the block's: the block itself where it is one."""

    @abc.abstractmethod
    def spectrum(self, shape: MatrixShape, statistics: Any, pairs: tuple[tuple[Array, Array], ...]) -> Spectrum:
        """The eigendecomposition of the block, given eigenvalues and eigenvectors of `factors`."""

    @abc.abstractmethod
    def multiply(
        self, shape: MatrixShape, statistics: Any, vector: Float[Array, "*leading d_g d_a"]
    ) -> Float[Array, "*leading d_g d_a"]:
        """Multiplies by the block, without damping."""

    @abc.abstractmethod
    def diagonal(self, shape: MatrixShape, statistics: Any) -> Float[Array, "..."]:
        """The diagonal of the block, in any shape that lists it in the order of V raveled."""

    @abc.abstractmethod
    def to_dense(self, shape: MatrixShape, statistics: Any) -> Float[Array, "... d d"]:
        """The block as a matrix that acts on V raveled, or several along leading axes that act on parts of it."""

    # -- what it costs --

    @abc.abstractmethod
    def refresh_flops(self, shape: MatrixShape) -> int:
        """Floating-point operations of one refresh, to leading order."""

    @abc.abstractmethod
    def solve_flops(self, shape: MatrixShape) -> int:
        """Floating-point operations of one solve, to leading order."""

    @abc.abstractmethod
    def update_flops(self, shape: MatrixShape) -> int:
        """Floating-point operations of the statistics of one row (an example at a position), to leading order."""


class ProductAlgebra(Block):
    """The algebra of a block that is a Kronecker product, or several of them in a stack: it follows from `product`.

    **Fields:**

    - `inversion`: how it is inverted.
    """

    inversion: eqx.AbstractVar[Inversion]

    def __str__(self) -> str:
        return describe(self)

    @abc.abstractmethod
    def product(self, shape: MatrixShape, statistics: Any) -> Product:
        """What the block is."""

    @abc.abstractmethod
    def zeros(self, shape: MatrixShape) -> Any:
        """Statistics of zeros."""

    def init(self, shape: MatrixShape) -> BlockState:
        statistics, one = self.zeros(shape), jnp.ones(())
        # Without curvature these are the identity, or zeros if it is about to be diagonalized.
        matrices = self.matrices(shape, statistics, one)
        if self.diagonalizes:
            unit = (jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape) for m in matrices)
            matrices = tuple(zip([m[..., 0] for m in matrices], unit, strict=True))
        return BlockState(statistics, self.refresh(shape, statistics, one, matrices))

    @property
    def diagonalizes(self) -> bool:
        return self.inversion.diagonalizes

    def matrices(self, shape: MatrixShape, statistics: Any, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return self.inversion.matrices(self.product(shape, statistics), damping)

    def refresh(self, shape: MatrixShape, statistics: Any, damping: Scalar, results: tuple[Any, ...]) -> Inverse:
        return self.inversion.finish(self.product(shape, statistics), damping, results)

    def redamp(self, shape: MatrixShape, statistics: Any, inverse: Inverse, damping: Scalar) -> Inverse:
        return inverse.redamp(damping)

    def factors(self, shape: MatrixShape, statistics: Any) -> tuple[Float[Array, "..."], ...]:
        return self.product(shape, statistics).factors()

    def axes(self, shape: MatrixShape, statistics: Any) -> Product:
        return self.product(shape, statistics)

    def spectrum(self, shape: MatrixShape, statistics: Any, pairs: tuple[tuple[Array, Array], ...]) -> Spectrum:
        return self.product(shape, statistics).spectrum(pairs)

    def multiply(
        self, shape: MatrixShape, statistics: Any, vector: Float[Array, "*leading d_g d_a"]
    ) -> Float[Array, "*leading d_g d_a"]:
        return self.product(shape, statistics).multiply(vector)

    def diagonal(self, shape: MatrixShape, statistics: Any) -> Float[Array, "..."]:
        return self.product(shape, statistics).diagonal()

    def to_dense(self, shape: MatrixShape, statistics: Any) -> Float[Array, "... d d"]:
        return self.product(shape, statistics).to_dense()


class ProductBlock(ProductAlgebra):
    """A block that is a Kronecker product, or several of them in a stack: its algebra follows from its `product`.

    What it measures of a batch depends on that batch alone.

    **Fields:**

    - `inversion`: how it is inverted.
    """

    @property
    def counts_uses(self) -> bool:
        return False

    def given(self, shape: MatrixShape, statistics: Any) -> None:
        return None

    def rebase(self, shape: MatrixShape, statistics: Any, inverse: Inverse) -> Any:
        return statistics


def describe(block: ProductAlgebra, *options: Any) -> str:
    """A block as in a call: with its options, and its inversion if that was chosen."""
    is_chosen = "inversion" in {field.name for field in dataclasses.fields(block)}
    if is_chosen and not isinstance(block.inversion, Cholesky):
        options = (*options, block.inversion)
    return f"{type(block).__name__}({', '.join(map(str, options))})"
