"""What some parameters of a layer do to its input, hence how they form a matrix and what its gradient is."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._math.types import ArrayTree, PyTree


class MatrixShape(eqx.Module):
    """The parameters that share a curvature block, seen as a matrix V of shape `(*stack, *groups, d_g, d_a)`.

    For a dense layer `V = [W b]`: rows are outputs, columns inputs, with the bias as the last column.

    **Fields:**

    - `stack`: leading axes of a stacked layer (made by `equinox.filter_vmap`); `()` for a single one.
    - `groups`: axes of matrices that one call of the layer applies side by side, as a grouped convolution does.
    - `num_outputs`: `d_g`.
    - `num_inputs`: the columns that multiply an input, without the bias.
    - `bias`: whether the last column is a bias, that is, multiplies a constant 1.
    - `one_hot`: whether an input always has a single nonzero entry, as that of an embedding has.
    - `dtype`: of the parameters.
    """

    stack: tuple[int, ...] = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    num_inputs: int = eqx.field(static=True)
    bias: bool = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    groups: tuple[int, ...] = eqx.field(static=True, default=())
    one_hot: bool = eqx.field(static=True, default=False)

    @property
    def d_g(self) -> int:
        """The number of rows of V."""
        return self.num_outputs

    @property
    def d_a(self) -> int:
        """The number of columns of V, that of a bias included."""
        return self.num_inputs + self.bias

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes before those of one matrix."""
        return (*self.stack, *self.groups)

    @property
    def num_matrices(self) -> int:
        """How many matrices V consists of."""
        return math.prod(self.leading)

    @property
    def num_parameters(self) -> int:
        """How many numbers V consists of."""
        return self.num_matrices * self.d_g * self.d_a

    @property
    def statistics_dtype(self) -> np.dtype:
        """The dtype of curvature: that of the parameters, but at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def __str__(self) -> str:
        return f"{self.dtype}{[*self.leading, self.d_g, self.d_a]}" + (" with a bias" if self.bias else "")

    def over_matrices(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` mapped over the leading axes of its array arguments."""
        for _ in self.leading:
            function = jax.vmap(function)
        return function


class Operation(eqx.Module):
    """Some parameters of a layer that form one matrix V and share one curvature block.

    An operation is a view: its leaves are the layer's own arrays, or `None` in place of those that are frozen or
    absent, in which case they are no part of V. Any curvature block that is made of gradients works with any
    operation; those made of factors need a [`kfax.FactoredOperation`][].
    """

    @abc.abstractmethod
    def shape(self) -> MatrixShape:
        """The shape of V."""

    @abc.abstractmethod
    def to_matrix(self) -> Shaped[Array, "*leading d_g d_a"]:
        """V, from the arrays (or whatever stands in their places, such as their gradients)."""

    @abc.abstractmethod
    def from_matrix(self, matrix: Float[Array, "*leading d_g d_a"]) -> "Operation":
        """The operation with the arrays that a matrix like V consists of."""

    @abc.abstractmethod
    def gradient(self, x: ArrayTree, dy: ArrayTree, context: PyTree) -> Float[Array, "*groups d_g d_a"]:
        """The gradient of V, without stack axes, summed over the leading axis of inputs `x` and output cotangents `dy`.

        Arrays of the operation may be shapes without values here. `context` is what the layer gave to `observe`.
        """

    @abc.abstractmethod
    def of_tangents(self) -> "Operation | None":
        """The operation as it acts on a derivative of its input: without what is added to every output, such as a bias.

        **Returns:** an operation whose matrix lacks the last columns of V, or `None` if nothing is left.

        **Raises:** `ValueError` if it is not linear in its input.
        """


class FactoredOperation(Operation):
    """An operation whose gradient is a sum over positions of outer products, of output cotangents g and inputs a.

    The methods read the rows of one use of a layer, `x` and `dy` with leading axes (examples, positions). One call of
    the layer may itself have several positions, as a convolution has.
    """

    @abc.abstractmethod
    def num_positions(self, x: Array) -> int:
        """At how many positions one call applies V."""

    @abc.abstractmethod
    def input_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        """`Σ w ā āᵀ` over all rows, `(*groups, d_a, d_a)`, or its diagonal, `(*groups, d_a)`.

        ā is a, followed by the constant 1 of a bias if the operation has one.
        """

    @abc.abstractmethod
    def input_sums(
        self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any
    ) -> Float[Array, "*groups n num_inputs"]:
        """`Σ w a` over the positions of each example, without the constant 1 of a bias."""

    @abc.abstractmethod
    def inputs(self, x: Array) -> Float[Array, "*groups n r d_a"]:
        """ā, by example and by position of any kind."""

    @abc.abstractmethod
    def cotangents(self, dy: Array) -> Float[Array, "*groups n r d_g"]:
        """g, by example and by position of any kind."""


def widen(array: Array) -> Array:
    """In float32 at least, so that sums and products keep what they can."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def moment_of_rows(
    rows: Shaped[Array, "*groups n r d"], weights: Float[Array, "n r"] | None, dtype: Any, *, diagonal: bool
) -> Float[Array, "..."]:
    """`Σ w a aᵀ`, or its diagonal, of explicit rows."""
    rows = rows.reshape(*rows.shape[:-3], math.prod(rows.shape[-3:-1]), rows.shape[-1])
    if diagonal or not jnp.issubdtype(rows.dtype, jnp.inexact):
        rows = rows.astype(dtype)  # before anything is multiplied
    weighted = rows if weights is None else rows * weights.reshape(-1, 1).astype(rows.dtype)
    if diagonal:
        return jnp.sum(weighted * rows, axis=-2)
    return jnp.matmul(jnp.swapaxes(weighted, -1, -2), rows, preferred_element_type=dtype)


def sums_of_rows(
    rows: Shaped[Array, "*groups n r d"], weights: Float[Array, "n r"] | None, dtype: Any
) -> Float[Array, "*groups n d"]:
    """`Σ w a` over the positions of each example, of explicit rows."""
    rows = rows.astype(dtype)
    if weights is not None:
        rows = rows * weights[..., None].astype(dtype)
    return jnp.sum(rows, axis=-2)


def append_bias(
    moment: Float[Array, "..."], sums: Float[Array, "*groups num_inputs"], count: Array, *, diagonal: bool
) -> Float[Array, "..."]:
    """`Σ w ā āᵀ`, or its diagonal, from `Σ w a aᵀ`, `Σ w a` and `Σ w`: where rows with a 1 are not written out."""
    ones = jnp.broadcast_to(count.astype(moment.dtype), (*sums.shape[:-1], 1))
    if diagonal:
        return jnp.concatenate([moment, ones], axis=-1)
    row = jnp.concatenate([sums, ones], axis=-1)
    # As one kernel: the last row, the last column, and the rest.
    last = jnp.arange(row.shape[-1]) == sums.shape[-1]
    padded = jnp.pad(moment, [(0, 0)] * (moment.ndim - 2) + [(0, 1), (0, 1)])
    return jnp.where(last[:, None], row[..., None, :], jnp.where(last, row[..., :, None], padded))
