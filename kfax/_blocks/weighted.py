"""Kronecker products made of the gradients of single examples, in which each side weighs the rows of the other."""

import abc
import math
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.tree import Summarized
from .._math.types import ArrayTree
from .._operations import FactoredOperation, MatrixShape, Operation, Transposed
from .._slot import Use
from .base import ProductAlgebra, Recorded
from .gradients import gradients_of, no_gradients
from .kronecker import factor_sizes, refresh_flops, rows_of, solve_flops
from .product import Inverse, Product
from .sharing import FactorSizes


# Of the sides of outputs and of inputs, each a matrix or a diagonal; `None` for the identity.
Weights: TypeAlias = tuple[Float[Array, "..."] | None, Float[Array, "..."] | None]


class WeightedFactors(Summarized):
    r"""The statistics of a `TensorNormal`, `FrobeniusOptimal` or `KLOptimal` block, which is $G \otimes A / s$.

    With the gradients of examples D, `(d_g, d_a)`, and a weight for either side, as means over examples. Either side
    may be diagonal: its factor and its weight are then diagonals.

    **Fields:**

    - `a`: $A = \mathbb E[D^\top W_G D]$, `(*leading, d_a, d_a)` or `(*leading, d_a)`. [loss/param²]
    - `g`: $G = \mathbb E[D W_A D^\top]$, `(*leading, d_g, d_g)` or `(*leading, d_g)`. [loss/param²]
    - `scale`: $s = \mathbb E[\mathrm{tr}(D^\top W_G D W_A)]$, `(*leading,)`. [loss/param²]
    - `left`, `right`: W_G and W_A, of the shapes of G and A; `None` for the identity. As of the last refresh; before
        the first one the identity, and zeros before the first update.
    """

    a: Float[Array, "..."]
    g: Float[Array, "..."]
    scale: Float[Array, "*leading"]
    left: Float[Array, "..."] | None
    right: Float[Array, "..."] | None

    def summary(self) -> list[Float[Array, "..."]]:
        """Of a positive semi-definite matrix no entry is larger than one on its diagonal."""
        weights = [weight for weight in (self.left, self.right) if weight is not None]
        return [self.scale, *(linalg.diagonal(factor, self.scale.ndim) for factor in (self.a, self.g, *weights))]


class WeightedProduct(ProductAlgebra):
    r"""What blocks have in common that are $G \otimes A / s$ with $A = \mathbb E[D^\top W_G D]$ and so on.

    For any weights this is the product with the weighted partial traces of the exact block, and the exact block itself
    if that is a product. Blocks differ in their weights.

    Gradients have to be complete, over all uses and positions, before they are multiplied. A layer that is known to be
    used once has them complete in that use, so that no memory is taken for those of a whole batch; and if there are few
    positions, they need not be formed: $D^\top W D = \sum_{rs} (g_r^\top W g_s)\, \bar a_r \bar a_s^\top$.

    **Fields:**

    - `is_weighted`: whether a refresh changes the weights, which otherwise are the identity for good.
    - `max_dim`: the largest dense factor.
    """

    is_weighted: eqx.AbstractClassVar[bool]
    max_dim: eqx.AbstractVar[int]

    @abc.abstractmethod
    def weights(self, statistics: WeightedFactors, inverse: Inverse) -> Weights:
        """W_G and W_A up to scale, given an inverse that a refresh made of these statistics."""

    @property
    def is_sum(self) -> bool:
        return False

    @property
    def counts_uses(self) -> bool:
        return True

    def given(self, shape: MatrixShape, statistics: WeightedFactors | None) -> Weights:
        """The weights."""
        if not self.is_weighted:
            return None, None
        assert statistics is not None
        ndim = len(shape.leading)
        return linalg.or_identity(statistics.left, ndim), linalg.or_identity(statistics.right, ndim)

    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        return Recorded((), self._sizes(shape).zeros() if is_only else no_gradients(shape, num_examples))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        if not use.is_only:
            return Recorded((), gradients_of(shape, operation, use))
        sizes = self._sizes(shape)
        if isinstance(operation, FactoredOperation) and not isinstance(operation, Transposed):
            a, g = rows_of(shape, operation, use)
            if a.shape[-2] * (shape.d_a + shape.d_g) <= shape.d_a * shape.d_g:  # fewer numbers than gradients have
                return Recorded((), _moments_of_rows(sizes, a, g, use.given))
        return Recorded((), _moments(sizes, gradients_of(shape, operation, use), use.given))

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: Weights) -> ArrayTree:
        is_complete = isinstance(cotangents, tuple)
        return cotangents if is_complete else _moments(self._sizes(shape), cotangents, given)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: Weights,
    ) -> WeightedFactors:
        a, g = (moment / num_examples for moment in second_moment)
        return WeightedFactors(a, g, linalg.inner(a, given[1], len(shape.leading)), *given)

    def zeros(self, shape: MatrixShape) -> WeightedFactors:
        a, g = self._sizes(shape).zeros()
        scale = jnp.zeros(shape.leading, a.dtype)
        return WeightedFactors(a, g, scale, *((g, a) if self.is_weighted else (None, None)))

    def product(self, shape: MatrixShape, statistics: WeightedFactors) -> Product:
        g, scale = statistics.g, statistics.scale
        return Product(g / _as(jnp.where(scale > 0, scale, 1), g), statistics.a, len(shape.leading))

    def rebase(self, shape: MatrixShape, statistics: WeightedFactors, inverse: Inverse) -> WeightedFactors:
        """With new weights, on the scale on which A, G and s stay as they are if the exact block is a product."""
        if not self.is_weighted:
            return statistics
        a, g, scale = statistics.a, statistics.g, statistics.scale

        def scaled(weight, factor):
            found = linalg.inner(factor, weight, len(shape.leading))
            return weight * _as(scale / jnp.where(found > 0, found, 1), weight)

        left, right = self.weights(statistics, inverse)
        return WeightedFactors(a, g, scale, scaled(left, g), scaled(right, a))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return refresh_flops(self._sizes(shape), self.inversion)

    def solve_flops(self, shape: MatrixShape) -> int:
        return solve_flops(self._sizes(shape), self.inversion)

    def update_flops(self, shape: MatrixShape) -> int:
        """Of a layer that is used once, at one position."""
        sizes = self._sizes(shape)
        numbers = sum(math.prod(size) for size in (sizes.a, sizes.g))
        return 2 * shape.num_matrices * numbers * (2 if self.is_weighted else 1)

    def _sizes(self, shape: MatrixShape) -> FactorSizes:
        return factor_sizes(shape, self.max_dim)


def _moments(
    sizes: FactorSizes, gradients: Float[Array, "*leading n d_g d_a"], weights: Weights
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The sums of `Dᵀ W_G D` and of `D W_A Dᵀ` over examples."""
    left, right = weights
    a = _moment(gradients, left, sizes.a_is_diagonal)
    return a, _moment(gradients.mT, right, sizes.g_is_diagonal)


def _moments_of_rows(
    sizes: FactorSizes, a: Float[Array, "*groups n r d_a"], g: Float[Array, "*groups n r d_g"], weights: Weights
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The same for `D = Σ_r g āᵀ`."""
    left, right = weights
    of_g, of_a = (linalg.matmul(_weighted(weight, rows.mT).mT, rows.mT) for weight, rows in ((left, g), (right, a)))
    return _moment(a, of_g, sizes.a_is_diagonal), _moment(g, of_a, sizes.g_is_diagonal)


def _moment(
    rows: Float[Array, "*leading n r d"], weight: Float[Array, "..."] | None, is_diagonal: bool
) -> Float[Array, "..."]:
    """`Σ_n X_nᵀ W X_n`, or its diagonal, with a W `(r, r)` for all examples or one for each."""
    weighted = _weighted(weight, rows)
    if is_diagonal:
        return jnp.sum(weighted * rows, axis=(-3, -2))
    *leading, n, r, d = rows.shape
    flat = (*leading, n * r, d)
    return weighted.reshape(flat).mT @ rows.reshape(flat)


def _weighted(weight: Float[Array, "..."] | None, rows: Float[Array, "*leading n r d"]) -> Float[Array, "..."]:
    """`W X_n`, with a dense or diagonal W for all examples, or one for each.

    One for all is of the state, and may be as ill-conditioned as an inverse: hence at full precision.
    """
    if weight is None:
        return rows
    if weight.ndim == rows.ndim:
        return weight @ rows
    if weight.ndim == rows.ndim - 2:
        return weight[..., None, :, None] * rows
    return jnp.einsum("...rs,...nsd->...nrd", weight, rows, precision=linalg.PRECISION)


def _as(number: Float[Array, "*leading"], factor: Float[Array, "..."]) -> Float[Array, "..."]:
    """With as many axes as a factor."""
    return number.reshape(*number.shape, *(1,) * (factor.ndim - number.ndim))
