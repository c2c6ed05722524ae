"""A block for a matrix that is used in two directions."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.types import ArrayTree, Scalar
from .._operations import MatrixShape, Operation, Transposed
from .._slot import Use
from .base import Block, BlockState, Recorded
from .kronecker import check_factored, check_factoring, factor_sizes, KroneckerFactored, per_position
from .product import Inverse, Product, Spectrum
from .sharing import Expand, FactorSizes, KroneckerFactors, Sharing


class KroneckerSum(Block):
    r"""The sum of two Kronecker products, for a matrix V that is also used transposed.

    $$\tfrac1R\, G \otimes A + \tfrac1{R'}\, A' \otimes G'$$

    with G and A from the uses of V, and G' and A' from those of its transpose, whose inputs have the size of V's
    outputs. The case in point is an embedding whose matrix is the output head's as well: then A (counts) and G' (whose
    side of V has the vocabulary) are diagonal. Correlations between the two kinds of uses are left out.

    Damping is factored for the second term, as in [`kfax.KroneckerFactored`][]; the inverse of the sum is then
    exact, by diagonalizing both terms at once. Powers, eigenvalues and determinants take the dense matrix.

    Memory: four factors, and two matrices of their size for the inverse. A refresh takes about `12 (d_a³ + d_g³)`
    flops where no factor is diagonal, a solve four products.

    ??? cite "Source"
        For the inverse of a sum: Martens & Grosse 2015, arXiv:1503.05671, appendix B.
    """

    sharing: Sharing
    max_dim: int = eqx.field(static=True)

    def __init__(self, sharing: Sharing = Expand(), *, max_dim: int = 4096):
        """**Arguments:**

        - `sharing`: as for [`kfax.KroneckerFactored`][], for both kinds of uses.
        - `max_dim`: as for [`kfax.KroneckerFactored`][].

        **Raises:** `ValueError` for something else than that.
        """
        self.sharing, self.max_dim = check_factoring(sharing, max_dim)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.sharing})"

    @property
    def is_sum(self) -> bool:
        return self.sharing.is_sum

    @property
    def counts_uses(self) -> bool:
        return False

    def given(self, shape: MatrixShape, statistics: Any) -> None:
        return None

    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        direct, reverse = (self.sharing.slot(sizes, num_examples) for sizes in self._sizes(shape))
        return Recorded((direct.inputs, reverse.inputs), (direct.cotangents, reverse.cotangents))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        direct, reverse = self._sizes(shape)
        unused = self.slot(dataclasses.replace(shape, stack=()), use.num_examples, use.is_only)
        if isinstance(operation, Transposed):
            new = self.sharing.record(reverse, operation, use)
            return Recorded((unused.inputs[0], new.inputs), (unused.cotangents[0], new.cotangents))
        new = self.sharing.record(direct, check_factored(self, operation), use)
        return Recorded((new.inputs, unused.inputs[1]), (new.cotangents, unused.cotangents[1]))

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: ArrayTree) -> ArrayTree:
        pairs = zip(self._sizes(shape), cotangents, strict=True)
        return tuple(self.sharing.second_moment(sizes, part) for sizes, part in pairs)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: ArrayTree,
    ) -> tuple[KroneckerFactors, KroneckerFactors]:
        def one(inputs, second_moment):
            triples = zip(self._sizes(shape), inputs, second_moment, strict=True)
            direct, reverse = (self.sharing.factors(sizes, a, g, weights, num_examples) for sizes, a, g in triples)
            # A bias of V has no part in its transpose.
            g = jnp.pad(reverse.g, [(0, int(shape.bias))] * reverse.g.ndim)
            return direct, KroneckerFactors(reverse.a, g, reverse.positions)

        return shape.over_matrices(one)(inputs, second_moment)

    def init(self, shape: MatrixShape) -> BlockState:
        direct = KroneckerFactored(self.sharing, max_dim=self.max_dim).zeros(shape)
        reverse = KroneckerFactors(direct.g, direct.a, direct.positions)
        # Of nothing the damping is left.
        unit = linalg.damp_factors(direct.a, direct.g, jnp.ones(()), len(shape.leading))
        left, right = (jnp.zeros((*shape.leading, d), direct.a.dtype) for d in (shape.d_g, shape.d_a))
        return BlockState((direct, reverse), SumInverse((unit[1], unit[0]), (left, right)))

    @property
    def diagonalizes(self) -> bool:
        return True

    def matrices(self, shape: MatrixShape, statistics: Any, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return ()

    def refresh(self, shape: MatrixShape, statistics: Any, damping: Scalar, results: tuple[Any, ...]) -> "SumInverse":
        direct, reverse = statistics
        ndim = len(shape.leading)
        left, right = linalg.damp_factors(reverse.a, per_position(reverse), damping, ndim)
        k_left, s_left = linalg.diagonalize_both(per_position(direct), left, ndim)
        k_right, s_right = linalg.diagonalize_both(direct.a, right, ndim)
        return SumInverse((k_left, k_right), (s_left, s_right))

    def rebase(self, shape: MatrixShape, statistics: Any, inverse: Inverse) -> Any:
        return statistics

    def redamp(self, shape: MatrixShape, statistics: Any, inverse: Inverse, damping: Scalar) -> Inverse:
        return inverse.redamp(damping)

    def factors(self, shape: MatrixShape, statistics: Any) -> tuple[Float[Array, "..."], ...]:
        size = shape.d_g * shape.d_a
        if size > _MAX_DENSE:
            raise ValueError(
                f"A sum of two Kronecker products is diagonalized as a matrix, which would have {size:,} rows here. "
                "Use `solve`, which needs no such matrix, or another block for this layer."
            )
        return (self.to_dense(shape, statistics),)

    def axes(self, shape: MatrixShape, statistics: Any) -> Product:
        """The product of the partial traces: of the sum of all products, as seen from either side of V."""
        direct, reverse = self._products(shape, statistics)
        ndim = len(shape.leading)

        def weighted(factor, other):
            trace = jnp.sum(linalg.diagonal(other, ndim), axis=-1)
            return factor * trace[(..., *(None,) * (factor.ndim - ndim))]

        left = weighted(direct.left, direct.right) + weighted(reverse.left, reverse.right)
        right = weighted(direct.right, direct.left) + weighted(reverse.right, reverse.left)
        return Product(left, right, ndim)

    def spectrum(self, shape: MatrixShape, statistics: Any, pairs: tuple[tuple[Array, Array], ...]) -> Spectrum:
        [(values, vectors)] = pairs
        return Spectrum(None, vectors, jnp.maximum(values, 0)[..., None, :])

    def multiply(
        self, shape: MatrixShape, statistics: Any, vector: Float[Array, "*leading d_g d_a"]
    ) -> Float[Array, "*leading d_g d_a"]:
        direct, reverse = self._products(shape, statistics)
        return direct.multiply(vector) + reverse.multiply(vector)

    def diagonal(self, shape: MatrixShape, statistics: Any) -> Float[Array, "..."]:
        direct, reverse = self._products(shape, statistics)
        return direct.diagonal() + reverse.diagonal()

    def to_dense(self, shape: MatrixShape, statistics: Any) -> Float[Array, "*leading d d"]:
        direct, reverse = self._products(shape, statistics)
        return direct.to_dense() + reverse.to_dense()

    def refresh_flops(self, shape: MatrixShape) -> int:
        return 6 * KroneckerFactored(self.sharing, max_dim=self.max_dim).refresh_flops(shape)

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * KroneckerFactored(self.sharing, max_dim=self.max_dim).solve_flops(shape)

    def update_flops(self, shape: MatrixShape) -> int:
        sizes, _ = self._sizes(shape)
        return 4 * shape.num_matrices * (sizes.a[0] ** len(sizes.a) + sizes.g[0] ** len(sizes.g))

    def _products(self, shape: MatrixShape, statistics: Any) -> tuple[Product, Product]:
        direct, reverse = statistics
        ndim = len(shape.leading)
        # The second term's own order is (cotangents, inputs): swapped, it acts on V.
        return (
            Product(per_position(direct), direct.a, ndim),
            Product(reverse.a, per_position(reverse), ndim),
        )

    def _sizes(self, shape: MatrixShape) -> tuple[FactorSizes, FactorSizes]:
        direct = factor_sizes(shape, self.max_dim)
        reverse = MatrixShape(shape.stack, shape.num_inputs, shape.d_g, False, shape.dtype, shape.groups)
        return direct, FactorSizes(reverse, direct.g_is_diagonal, direct.a_is_diagonal)


# As for `ExplicitExactCurvature`.
_MAX_DENSE = 10_000


class SumInverse(Inverse):
    """K and s, on either side, with which `V -> K (KᵀVK' / (1 + s s'ᵀ)) K'ᵀ` is the inverse."""

    vectors: tuple[Float[Array, "..."], Float[Array, "..."]]
    values: tuple[Float[Array, "*leading d_g"], Float[Array, "*leading d_a"]]

    def solve(self, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        (k_left, k_right), (s_left, s_right) = self.vectors, self.values
        inner = linalg.sandwich(_transpose(k_left, vector), vector.astype(s_left.dtype), k_right)
        inner = inner / (1 + s_left[..., :, None] * s_right[..., None, :])
        return linalg.sandwich(k_left, inner, _transpose(k_right, vector)).astype(vector.dtype)

    def redamp(self, damping: Scalar) -> "SumInverse":
        return self


def _transpose(factor: Float[Array, "..."], vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "..."]:
    return factor if factor.ndim < vector.ndim else jnp.swapaxes(factor, -1, -2)
