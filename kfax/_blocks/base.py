"""The contract between a curvature block and the rest of the library."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._fold import Use
from .._operations import MatrixShape, Operation
from .._types import Scalar


class Recorded(eqx.Module):
    """The statistics that a slot brings back.

    **Fields:**

    - `inputs`: the part that depends on the layer's inputs alone: the same for every cotangent.
    - `cotangents`: the part that depends on the cotangents; to be collected anew for each of them.
    """

    inputs: PyTree[Array]
    cotangents: PyTree[Array]


class BlockState(eqx.Module):
    """The curvature of one layer.

    **Fields:**

    - `statistics`: the block's running average; which arrays these are is the block's own affair.
    - `inverse`: what `Block.solve` needs, as of the last refresh.
    """

    statistics: Any
    inverse: Any


class Block(eqx.Module):
    """How the curvature of one layer's parameters is approximated.

    A block is configuration without arrays; its arrays are `statistics`, which are averaged over time, and `inverse`,
    which is computed from them by the occasional, costly refresh and applied by the cheap `solve`. With a loss in
    units of `loss` and parameters in units of `param`, the block and its damping are in loss/param².

    All arrays lead with the stack axes of `shape`, and those of each matrix with its group axes as well, unless a
    block says otherwise.
    """

    # -- collecting statistics of a batch --

    @property
    @abc.abstractmethod
    def is_sum(self) -> bool:
        """Whether what `record` returns is a plain sum over rows, so that it need not know the examples."""

    @abc.abstractmethod
    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        """Zeros of the shapes that `record` returns (with the stack axes)."""

    @abc.abstractmethod
    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        """Reads one use of one layer (without stack axes). Must be additive over uses.

        `operation` is what the layer does with its matrix in this use, which may lack the bias that `shape` has.

        **Raises:** `ValueError` if the operation cannot tell what the block needs.
        """

    @abc.abstractmethod
    def second_moment(self, shape: MatrixShape, cotangents: PyTree[Array]) -> PyTree[Array]:
        """What `Recorded.cotangents`, complete over all uses, contributes: to be summed over several cotangents."""

    @abc.abstractmethod
    def statistics(
        self,
        shape: MatrixShape,
        inputs: PyTree[Array],
        second_moment: PyTree[Array],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> Any:
        """Turns `Recorded.inputs` and the summed `second_moment` into means over examples."""

    # -- using them --

    @abc.abstractmethod
    def init(self, shape: MatrixShape) -> BlockState:
        """Zero statistics, and the inverse of the identity."""

    @abc.abstractmethod
    def matrices(self, statistics: Any, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        """The symmetric positive definite matrices that a refresh has to invert."""

    @abc.abstractmethod
    def refresh(self, statistics: Any, damping: Scalar, inverses: tuple[Float[Array, "..."], ...]) -> Any:
        """Makes `BlockState.inverse`, given the inverses of `matrices`."""

    @abc.abstractmethod
    def solve(self, inverse: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        """Multiplies by the inverse of the damped block, as of the last refresh."""

    @abc.abstractmethod
    def multiply(self, statistics: Any, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        """Multiplies by the block, without damping."""

    @abc.abstractmethod
    def eigenvalues(self, statistics: Any) -> Float[Array, "*stack d"]:
        """The eigenvalues of the block, without damping, in no particular order."""

    @abc.abstractmethod
    def to_dense(self, statistics: Any) -> Float[Array, "*stack d d"]:
        """The block as a matrix (or several along leading axes) that acts on V raveled row by row."""

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
