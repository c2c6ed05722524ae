"""What a Kronecker block makes of a layer that is applied at several positions of one example."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import MatrixShape, Recorded, Rows


class KroneckerFactors(eqx.Module):
    """The statistics of a `KroneckerFactored` block, as means over examples; the block is `G ⊗ A / R`.

    **Fields:**

    - `a`: A, the second moment of the layer's inputs, with a constant 1 appended if there is a bias. [inputs²]
    - `g`: G, the second moment of the cotangents of the layer's outputs. [loss²/outputs²]
    - `positions`: R, over how many sharing positions of an example both sums run, on average. With `Reduce` it is 1
        (or less, if the layer is not used in every example).
    """

    a: Float[Array, "*stack d_a d_a"]
    g: Float[Array, "*stack d_g d_g"]
    positions: Float[Array, "*stack"]


class Sharing(eqx.Module):
    """How a layer's uses at several positions of one example enter its two factors."""

    @property
    @abc.abstractmethod
    def is_sum(self) -> bool:
        """See `Block.is_sum`."""

    @abc.abstractmethod
    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        """See `Block.slot`."""

    @abc.abstractmethod
    def record(self, shape: MatrixShape, rows: Rows, weights: Float[Array, " n"] | None) -> Recorded:
        """See `Block.record`."""

    @abc.abstractmethod
    def second_moment(self, cotangents: Float[Array, "..."]) -> Float[Array, "*stack d_g d_g"]:
        """See `Block.second_moment`."""

    @abc.abstractmethod
    def factors(
        self,
        shape: MatrixShape,
        inputs: Any,
        g: Float[Array, "d_g d_g"],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        """The factors of one (not stacked) layer, from what was recorded over all its uses."""


class Expand(Sharing):
    r"""Every position counts as a row of its own.

    $$A = \tfrac1N \sum_{n,r} \bar a_{nr} \bar a_{nr}^\top, \quad G = \tfrac1N \sum_{n,r} g_{nr} g_{nr}^\top, \quad
    \text{block} = \tfrac1R\, G \otimes A$$

    Exact for deep linear networks whose positions do not interact (each has a loss of its own), hence the choice for
    sequence and pixel-wise models. Without sharing (R = 1) it is plain K-FAC. Cost: `R (d_a² + d_g²)` multiply-adds
    for each example.

    ??? cite "Source"
        Eschenhagen et al. 2023, arXiv:2311.00636, section 3.1.
    """

    @property
    def is_sum(self) -> bool:
        return True

    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        del num_examples
        d, dtype = shape.num_inputs, shape.statistics_dtype
        moment = jnp.zeros((*shape.stack, d, d), dtype)
        total = jnp.zeros((*shape.stack, d), dtype) if shape.bias else None
        count = jnp.zeros(shape.stack, dtype)
        g = jnp.zeros((*shape.stack, shape.d_g, shape.d_g), dtype)
        return Recorded((moment, total, count), g)

    def record(self, shape: MatrixShape, rows: Rows, weights: Float[Array, " n"] | None) -> Recorded:
        dtype = shape.statistics_dtype
        num_examples, num_positions, _ = rows.inputs.shape
        a = rows.inputs.reshape(num_examples * num_positions, -1)
        g = rows.cotangents.reshape(num_examples * num_positions, -1)
        if weights is None:
            weighted, count = a, jnp.asarray(len(a), dtype)
        else:
            weighted = a * jnp.repeat(weights, num_positions).astype(a.dtype)[:, None]
            count = num_positions * jnp.sum(weights.astype(dtype))
        moment = jnp.matmul(weighted.T, a, preferred_element_type=dtype)
        total = jnp.sum(weighted, axis=0, dtype=dtype) if shape.bias else None
        return Recorded((moment, total, count), jnp.matmul(g.T, g, preferred_element_type=dtype))

    def second_moment(self, cotangents: Float[Array, "..."]) -> Float[Array, "*stack d_g d_g"]:
        return cotangents

    def factors(
        self,
        shape: MatrixShape,
        inputs: Any,
        g: Float[Array, "d_g d_g"],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        del shape, weights
        moment, total, count = inputs
        a = moment if total is None else _with_bias(moment, total, count)
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

    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        dtype = shape.statistics_dtype
        leading = (*shape.stack, num_examples)
        total = jnp.zeros((*leading, shape.num_inputs), dtype)
        return Recorded((total, jnp.zeros(leading, dtype)), jnp.zeros((*leading, shape.d_g), dtype))

    def record(self, shape: MatrixShape, rows: Rows, weights: Float[Array, " n"] | None) -> Recorded:
        del weights  # those are applied to the whole example, in `factors`
        dtype = shape.statistics_dtype
        num_examples, num_positions, _ = rows.inputs.shape
        count = jnp.full(num_examples, num_positions, dtype)
        total = jnp.sum(rows.inputs, axis=1, dtype=dtype)
        return Recorded((total, count), jnp.sum(rows.cotangents, axis=1, dtype=dtype))

    def second_moment(self, cotangents: Float[Array, "..."]) -> Float[Array, "*stack d_g d_g"]:
        return jnp.swapaxes(cotangents, -1, -2) @ cotangents

    def factors(
        self,
        shape: MatrixShape,
        inputs: Any,
        g: Float[Array, "d_g d_g"],
        weights: Float[Array, " n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        total, count = inputs
        used = count > 0
        mean = total / jnp.where(used, count, 1)[:, None]
        scale = used.astype(mean.dtype) if weights is None else jnp.where(used, weights.astype(mean.dtype), 0)
        weighted = mean * scale[:, None]
        moment = weighted.T @ mean
        a = _with_bias(moment, weighted.sum(0), scale.sum()) if shape.bias else moment
        # An example in which the layer was not used at all contributes to neither factor.
        return KroneckerFactors(a / num_examples, g / num_examples, scale.sum() / num_examples)


def _with_bias(
    moment: Float[Array, "d d"], total: Float[Array, " d"], count: Float[Array, ""]
) -> Float[Array, "d_a d_a"]:
    """The second moment of inputs with a 1 appended, from the sums over inputs without it.

    Appending to the (many) rows instead would copy them, and is refused for rows sharded over explicit mesh axes.
    """
    return jnp.block([[moment, total[:, None]], [total[None, :], count[None, None]]])
