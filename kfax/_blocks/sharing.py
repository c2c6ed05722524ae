"""What a Kronecker block makes of a layer that is applied at several positions of one example."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.tree import Summarized
from .._operations import FactoredOperation, MatrixShape
from .._slot import Use
from .base import Recorded


class KroneckerFactors(Summarized):
    """The statistics of a `KroneckerFactored` block, as means over examples; the block is `G ⊗ A / R`.

    Either factor may be diagonal, and is then its diagonal.

    **Fields:**

    - `a`: A, `(*leading, d_a, d_a)` or `(*leading, d_a)`, the second moment of the layer's inputs, with a constant 1
        appended if there is a bias. [inputs²]
    - `g`: G, `(*leading, d_g, d_g)` or `(*leading, d_g)`, the second moment of the cotangents of the layer's outputs.
        [loss/outputs²]
    - `positions`: R, over how many sharing positions of an example both sums run, on average. With `Reduce` it is 1
        (or less, if the layer is not used in every example).
    """

    a: Float[Array, "..."]
    g: Float[Array, "..."]
    positions: Float[Array, "*leading"]

    def summary(self) -> list[Float[Array, "..."]]:
        """Of a positive semi-definite matrix no entry is larger than one on its diagonal."""
        ndim = self.positions.ndim
        return [self.positions, linalg.diagonal(self.a, ndim), linalg.diagonal(self.g, ndim)]


class FactorSizes(eqx.Module):
    """The shape of V, and which of its factors are diagonal."""

    shape: MatrixShape = eqx.field(static=True)
    a_is_diagonal: bool = eqx.field(static=True)
    g_is_diagonal: bool = eqx.field(static=True)

    @property
    def a(self) -> tuple[int, ...]:
        """The shape of A."""
        return (self.shape.d_a,) if self.a_is_diagonal else (self.shape.d_a, self.shape.d_a)

    @property
    def g(self) -> tuple[int, ...]:
        """The shape of G."""
        return (self.shape.d_g,) if self.g_is_diagonal else (self.shape.d_g, self.shape.d_g)

    def zeros(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """A and G of nothing, `(*leading, ...)`."""
        a, g = (jnp.zeros((*self.shape.leading, *size), self.shape.statistics_dtype) for size in (self.a, self.g))
        return a, g


class Sharing(eqx.Module):
    """How a layer's uses at several positions of one example enter its two factors."""

    @property
    @abc.abstractmethod
    def is_sum(self) -> bool:
        """See `Block.is_sum`."""

    @abc.abstractmethod
    def slot(self, sizes: FactorSizes, num_examples: int) -> Recorded:
        """See `Block.slot`."""

    @abc.abstractmethod
    def record(self, sizes: FactorSizes, operation: FactoredOperation, use: Use) -> Recorded:
        """See `Block.record`."""

    @abc.abstractmethod
    def second_moment(self, sizes: FactorSizes, cotangents: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Block.second_moment`."""

    @abc.abstractmethod
    def factors(
        self,
        sizes: FactorSizes,
        inputs: Any,
        g: Float[Array, "..."],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        """The factors of one matrix (without leading axes), from what was recorded over all its uses."""


class Expand(Sharing):
    r"""Every position counts as a row of its own.

    $$A = \tfrac1N \sum_{n,r} \bar a_{nr} \bar a_{nr}^\top, \quad G = \tfrac1N \sum_{n,r} g_{nr} g_{nr}^\top, \quad
    \text{block} = \tfrac1R\, G \otimes A$$

    Exact for deep linear networks whose positions do not interact (each has a loss of its own), hence the choice for
    sequence and pixel-wise models. For convolutions it is KFC, where positions are patches. Without sharing (R = 1) it
    is plain K-FAC. Cost: `R (d_a² + d_g²)` multiply-adds for each example.

    ??? cite "Source"
        Eschenhagen et al. 2023, arXiv:2311.00636, section 3.1; Grosse & Martens 2016, arXiv:1602.01407, section 3.1.
    """

    @property
    def is_sum(self) -> bool:
        return True

    def slot(self, sizes: FactorSizes, num_examples: int) -> Recorded:
        del num_examples
        a, g = sizes.zeros()
        return Recorded((a, jnp.zeros(sizes.shape.leading, a.dtype)), g)

    def record(self, sizes: FactorSizes, operation: FactoredOperation, use: Use) -> Recorded:
        shape, dtype, weights = sizes.shape, sizes.shape.statistics_dtype, _row_weights(use)
        a = operation.input_moment(use.x, weights, dtype, diagonal=sizes.a_is_diagonal)
        missing = shape.d_a - a.shape[-1]  # a bias that this use has not
        a = jnp.pad(a, [(0, 0)] * len(shape.groups) + [(0, missing)] * len(sizes.a))
        count = use.num_examples * use.num_positions if weights is None else jnp.sum(weights, dtype=dtype)
        count = jnp.broadcast_to(jnp.asarray(count * operation.num_positions(use.x), dtype), shape.groups)
        g = operation.cotangents(use.dy)
        g = g.reshape(*g.shape[:-3], -1, g.shape[-1])
        if sizes.g_is_diagonal:
            return Recorded((a, count), jnp.sum(jnp.square(g.astype(dtype)), axis=-2))
        return Recorded((a, count), jnp.matmul(jnp.swapaxes(g, -1, -2), g, preferred_element_type=dtype))

    def second_moment(self, sizes: FactorSizes, cotangents: Float[Array, "..."]) -> Float[Array, "..."]:
        del sizes
        return cotangents

    def factors(
        self,
        sizes: FactorSizes,
        inputs: Any,
        g: Float[Array, "..."],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        del sizes, weights
        a, count = inputs
        return KroneckerFactors(a / num_examples, g / num_examples, count / num_examples)


class Reduce(Sharing):
    r"""The positions of an example are reduced to one row: inputs to their mean, output cotangents to their sum.

    $$A = \tfrac1N \sum_n \tilde a_n \tilde a_n^\top, \quad G = \tfrac1N \sum_n \tilde g_n \tilde g_n^\top, \quad
    \tilde a_n = \tfrac1R \sum_r \bar a_{nr}, \quad \tilde g_n = \sum_r g_{nr}, \quad \text{block} = G \otimes A$$

    Exact for deep linear networks that pool the positions of an example (by a sum or a mean) before the loss, hence
    the choice for classifiers of images, sequences and graphs. Cost: `d_a² + d_g²` multiply-adds for each example,
    R times fewer than `Expand`, and `d_a + d_g` numbers of memory for each example.

    ??? cite "Source"
        Eschenhagen et al. 2023, arXiv:2311.00636, section 3.2.
    """

    @property
    def is_sum(self) -> bool:
        return False

    def slot(self, sizes: FactorSizes, num_examples: int) -> Recorded:
        shape, dtype = sizes.shape, sizes.shape.statistics_dtype
        leading = (*shape.leading, num_examples)
        inputs = (jnp.zeros((*leading, shape.num_inputs), dtype), jnp.zeros((*leading, 2), dtype))
        return Recorded(inputs, jnp.zeros((*leading, shape.d_g), dtype))

    def record(self, sizes: FactorSizes, operation: FactoredOperation, use: Use) -> Recorded:
        dtype, has_bias = sizes.shape.statistics_dtype, operation.shape().bias
        # Example weights are applied to the whole example, in `factors`.
        present = None if use.present is None else use.present.astype(dtype)
        sums = operation.input_sums(use.x, present, dtype)
        count = jnp.full(use.num_examples, use.num_positions, dtype) if present is None else jnp.sum(present, axis=1)
        count = count * operation.num_positions(use.x)
        counts = jnp.stack([count, has_bias * count], axis=-1)
        counts = jnp.broadcast_to(counts, (*sizes.shape.groups, *counts.shape))
        return Recorded((sums, counts), jnp.sum(operation.cotangents(use.dy), axis=-2, dtype=dtype))

    def second_moment(self, sizes: FactorSizes, cotangents: Float[Array, "..."]) -> Float[Array, "..."]:
        if sizes.g_is_diagonal:
            return jnp.sum(cotangents * cotangents, axis=-2)
        return jnp.swapaxes(cotangents, -1, -2) @ cotangents

    def factors(
        self,
        sizes: FactorSizes,
        inputs: Any,
        g: Float[Array, "..."],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        sums, counts = inputs
        used = counts[:, 0] > 0
        per_position = 1 / jnp.where(used, counts[:, 0], 1)
        rows = jnp.concatenate([sums, counts[:, 1:]], axis=1) if sizes.shape.bias else sums
        rows = rows * per_position[:, None]
        scale = used.astype(rows.dtype) if weights is None else jnp.where(used, weights.astype(rows.dtype), 0)
        weighted = rows * scale[:, None]
        a = jnp.sum(weighted * rows, axis=0) if sizes.a_is_diagonal else weighted.T @ rows
        # An example in which the layer was not used at all contributes to neither factor.
        return KroneckerFactors(a / num_examples, g / num_examples, scale.sum() / num_examples)


def _row_weights(use: Use) -> Float[Array, "n p"] | None:
    """With what weight each row of inputs counts, or `None` if all count the same."""
    if use.weights is None:
        return use.present if use.present is None else use.present.astype(jnp.float32)
    rows = jnp.broadcast_to(use.weights[:, None], (use.num_examples, use.num_positions))
    return rows if use.present is None else jnp.where(use.present, rows, 0)
