"""The contract between a curvature block and the rest of the library."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._types import Scalar


class MatrixShape(eqx.Module):
    """The parameters of one layer, seen as a matrix V of shape `(*stack, d_g, d_a)`.

    For a dense layer `V = [W b]`: rows are outputs, columns inputs, with the bias as the last column.

    **Fields:**

    - `stack`: leading axes of a stacked layer (made by `equinox.filter_vmap`); `()` for a single one.
    - `num_outputs`: `d_g`.
    - `num_inputs`: the columns that multiply an input, without the bias.
    - `bias`: whether the last column is a bias, that is, multiplies a constant 1.
    - `dtype`: of the parameters.
    """

    stack: tuple[int, ...] = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    num_inputs: int = eqx.field(static=True)
    bias: bool = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    @property
    def d_g(self) -> int:
        """The number of rows of V."""
        return self.num_outputs

    @property
    def d_a(self) -> int:
        """The number of columns of V, that of a bias included."""
        return self.num_inputs + self.bias

    @property
    def num_layers(self) -> int:
        """How many layers are stacked."""
        return math.prod(self.stack)

    @property
    def statistics_dtype(self) -> np.dtype:
        """The dtype of curvature: that of the parameters, but at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def __str__(self) -> str:
        return f"{self.dtype}{[*self.stack, self.d_g, self.d_a]}" + (" with a bias" if self.bias else "")

    def over_stack(self, function):
        """`function` mapped over the stack axes of its array arguments."""
        for _ in self.stack:
            function = jax.vmap(function)
        return function


class Rows(eqx.Module):
    """What a layer did in one batch, as the rows of its two factors.

    **Fields:**

    - `inputs`: a, by example and position, `(n, p, num_inputs)`, without the constant 1 of a bias.
    - `cotangents`: g, the cotangents of the layer's outputs, `(n, p, d_g)`. Per example, not divided by n.
    """

    inputs: Float[Array, "n p num_inputs"]
    cotangents: Float[Array, "n p d_g"]


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

    All arrays lead with the stack axes of `shape`.
    """

    # -- collecting statistics of a batch --

    @property
    @abc.abstractmethod
    def is_sum(self) -> bool:
        """Whether what `record` returns is a plain sum over rows, rather than one entry for each example."""

    @abc.abstractmethod
    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        """Zeros of the shapes that `record` returns (with the stack axes)."""

    @abc.abstractmethod
    def record(self, shape: MatrixShape, rows: Rows, weights: Float[Array, " n"] | None) -> Recorded:
        """Reads the rows of one use of one layer. Must be additive over uses."""

    @abc.abstractmethod
    def second_moment(self, shape: MatrixShape, cotangents: PyTree[Array]) -> PyTree[Array]:
        """What `Recorded.cotangents`, complete over all uses, contributes: to be summed over several cotangents."""

    @abc.abstractmethod
    def statistics(
        self,
        shape: MatrixShape,
        inputs: PyTree[Array],
        second_moment: PyTree[Array],
        weights: Float[Array, "*stack n"] | None,
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
    def refresh(self, inverses: tuple[Float[Array, "..."], ...]) -> Any:
        """Makes `BlockState.inverse` from the inverses of `matrices`."""

    @abc.abstractmethod
    def solve(self, inverse: Any, vector: Float[Array, "*stack d_g d_a"]) -> Float[Array, "*stack d_g d_a"]:
        """Multiplies by the inverse of the damped block, as of the last refresh."""

    @abc.abstractmethod
    def multiply(self, statistics: Any, vector: Float[Array, "*stack d_g d_a"]) -> Float[Array, "*stack d_g d_a"]:
        """Multiplies by the block, without damping."""

    @abc.abstractmethod
    def eigenvalues(self, statistics: Any) -> Float[Array, "*stack d"]:
        """The eigenvalues of the block, without damping, in no particular order; `d = d_g d_a`."""

    @abc.abstractmethod
    def to_dense(self, statistics: Any) -> Float[Array, "*stack d d"]:
        """The block as a matrix that acts on V raveled row by row; `d = d_g d_a`."""

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
