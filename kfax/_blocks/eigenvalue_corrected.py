"""The Kronecker-factored block with exact eigenvalues in its eigenbasis."""

from typing import Any, cast, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.tree import Summarized
from .._math.types import ArrayTree, Scalar
from .._operations import MatrixShape, Operation
from .._slot import Use
from .base import Block, BlockState, Recorded
from .kronecker import check_factored, check_factoring, KroneckerFactored, rows_of
from .product import Eigh, Inverse, Product, SpectralInverse, Spectrum
from .sharing import Expand, KroneckerFactors, Sharing


Bases: TypeAlias = tuple[Float[Array, "*leading d_g d_g"] | None, Float[Array, "*leading d_a d_a"] | None]


class CorrectedFactors(Summarized):
    r"""The statistics of an `EigenvalueCorrected` block, which is `(U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ`.

    **Fields:**

    - `factors`: A, G and R, a [`kfax.KroneckerFactors`][], of whose eigenvectors the next basis will consist.
    - `left`, `right`: U_G and U_A, `(*leading, d_g, d_g)` and `(*leading, d_a, d_a)`, with eigenvectors as columns;
        `None` for the identity, where a factor is diagonal. As of the last refresh; before the first one the identity,
        and zeros before the first update.
    - `values`: Λ, `(*leading, d_g, d_a)`. [loss/param²]
    """

    factors: KroneckerFactors
    left: Float[Array, "*leading d_g d_g"] | None
    right: Float[Array, "*leading d_a d_a"] | None
    values: Float[Array, "*leading d_g d_a"]

    def summary(self) -> list[Float[Array, "..."]]:
        """Of a basis, which is that of the state, one entry; of numbers that are not negative, the largest."""
        bases = [basis[..., 0, 0] for basis in (self.left, self.right) if basis is not None]
        return [*self.factors.summary(), *bases, jnp.max(self.values, axis=-1)]


class EigenvalueCorrected(Block):
    r"""The Kronecker-factored block with its eigenvalues replaced by exact ones (EKFAC).

    $$(U_G \otimes U_A)\, \mathrm{diag}(\Lambda)\, (U_G \otimes U_A)^\top, \qquad
    \Lambda = \tfrac1N \sum_n \big(U_G^\top D_n U_A\big)^{\circ 2}, \qquad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    with the eigenvectors $U_A$, $U_G$ of the factors A and G of [`kfax.KroneckerFactored`][]. Λ is the diagonal of the
    exact block in this basis, however often a layer is used, so that the trace is that of the exact block. No block
    with these eigenvectors is closer to it in the Frobenius norm, that of [`kfax.KroneckerFactored`][] included.

    The basis is that of the last refresh. Λ is measured in it at each update, and acts at once, without a refresh. At a
    refresh the basis changes, and what is known of Λ is expressed in the new one, approximately, with the trace as it
    was; the batches that follow are again exact. For a Λ that is exact for all of a data set, see
    [`kfax.BlockDiagonalCurvature`][]`.restart`. Damping is exact, and may change without a refresh.

    A basis is the identity where the factor is diagonal: on the side of an embedding's entries, and where a side of V
    is longer than `max_dim`.

    Memory: `3 (d_a² + d_g²) + 2 d_a d_g` numbers; and during an update, if the layer is called more than once or at
    several positions, one for each parameter and example. A refresh takes about `9 (d_a³ + d_g³)` flops, a solve
    `4 d_a d_g (d_a + d_g)`, an update twice those of the factors and `4 d_a d_g` for each example.

    ??? cite "Source"
        George et al. 2018, arXiv:1806.03884. Differs: Λ sums over the positions of an example before it squares; a new
        basis takes over what is known of Λ.
    """

    sharing: Sharing
    max_dim: int = eqx.field(static=True)

    def __init__(self, sharing: Sharing = Expand(), *, max_dim: int = 4096):
        """**Arguments:**

        - `sharing`: as for [`kfax.KroneckerFactored`][], for the factors, and so for the basis. Λ is exact with either.
        - `max_dim`: as for [`kfax.KroneckerFactored`][].

        **Raises:** `ValueError` for something else than that.
        """
        self.sharing, self.max_dim = check_factoring(sharing, max_dim)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.sharing})"

    @property
    def is_sum(self) -> bool:
        return False

    @property
    def counts_uses(self) -> bool:
        return True

    def given(self, shape: MatrixShape, statistics: CorrectedFactors) -> Bases:
        """The bases."""
        return _bases(statistics)

    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        factors = self._factored.slot(shape, num_examples, is_only)
        examples = () if is_only else (num_examples,)
        gradients = jnp.zeros((*shape.leading, *examples, shape.d_g, shape.d_a), shape.statistics_dtype)
        return Recorded(factors.inputs, (factors.cotangents, gradients))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        operation = check_factored(self, operation)
        factors = self._factored.record(shape, operation, use)
        a, g = rows_of(shape, operation, use)
        if use.is_only and a.shape[-2] == 1:
            gradients = _squares_of_products(use.given, a, g)
        else:
            gradients = _gradients(use.given, a, g)
            gradients = _sum_of_squares(gradients) if use.is_only else gradients
        return Recorded(factors.inputs, (factors.cotangents, gradients))

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: ArrayTree) -> ArrayTree:
        factors, gradients = cotangents
        has_examples = gradients.ndim > len(shape.leading) + 2
        squares = _sum_of_squares(gradients) if has_examples else gradients
        return self._factored.second_moment(shape, factors, None), squares

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: ArrayTree,
    ) -> CorrectedFactors:
        (g, squares), (left, right) = second_moment, given
        factors = self._factored.statistics(shape, inputs, g, weights, num_examples, None)
        return CorrectedFactors(factors, left, right, squares / num_examples)

    def init(self, shape: MatrixShape) -> BlockState:
        factors, ndim, dtype = self._factored.zeros(shape), len(shape.leading), shape.statistics_dtype
        left, right = (None if linalg.is_diagonal(f, ndim) else jnp.zeros_like(f) for f in (factors.g, factors.a))
        values = jnp.zeros((*shape.leading, shape.d_g, shape.d_a), dtype)
        statistics = CorrectedFactors(factors, left, right, values)
        return BlockState(statistics, SpectralInverse(self.spectrum(shape, statistics, ()), jnp.ones((), dtype)))

    @property
    def diagonalizes(self) -> bool:
        return True

    def matrices(
        self, shape: MatrixShape, statistics: CorrectedFactors, damping: Scalar
    ) -> tuple[Float[Array, "..."], ...]:
        return self._factored.matrices(shape, statistics.factors, damping)

    def refresh(
        self, shape: MatrixShape, statistics: CorrectedFactors, damping: Scalar, results: tuple[Any, ...]
    ) -> SpectralInverse:
        product = self._factored.product(shape, statistics.factors)
        spectrum = _in_new_basis(statistics, product, product.spectrum(results))
        return SpectralInverse(spectrum, damping.astype(spectrum.values.dtype))

    def rebase(self, shape: MatrixShape, statistics: CorrectedFactors, inverse: Inverse) -> CorrectedFactors:
        new = cast(SpectralInverse, inverse).spectrum
        return CorrectedFactors(statistics.factors, new.left, new.right, new.values)

    def redamp(
        self, shape: MatrixShape, statistics: CorrectedFactors, inverse: Inverse, damping: Scalar
    ) -> SpectralInverse:
        old = cast(SpectralInverse, inverse).spectrum
        # Infinite before the first refresh, so that nothing moves.
        values = jnp.where(jnp.isfinite(old.values), statistics.values, old.values)
        return SpectralInverse(Spectrum(old.left, old.right, values), damping.astype(values.dtype))

    def factors(self, shape: MatrixShape, statistics: CorrectedFactors) -> tuple[Float[Array, "..."], ...]:
        return ()

    def axes(self, shape: MatrixShape, statistics: CorrectedFactors) -> Product:
        return self._factored.product(shape, statistics.factors)

    def spectrum(
        self, shape: MatrixShape, statistics: CorrectedFactors, pairs: tuple[tuple[Array, Array], ...]
    ) -> Spectrum:
        return Spectrum(*_bases(statistics), statistics.values)

    def multiply(
        self, shape: MatrixShape, statistics: CorrectedFactors, vector: Float[Array, "*leading d_g d_a"]
    ) -> Float[Array, "*leading d_g d_a"]:
        return self.spectrum(shape, statistics, ()).power(vector, 1.0)

    def diagonal(self, shape: MatrixShape, statistics: CorrectedFactors) -> Float[Array, "*leading d_g d_a"]:
        return self.spectrum(shape, statistics, ()).diagonal()

    def to_dense(self, shape: MatrixShape, statistics: CorrectedFactors) -> Float[Array, "*leading d d"]:
        sizes, dtype = (shape.d_g, shape.d_a), shape.statistics_dtype
        bases = zip(_bases(statistics), sizes, strict=True)
        left, right = (jnp.ones((*shape.leading, d), dtype) if basis is None else basis for basis, d in bases)
        vectors = Product(left, right, len(shape.leading)).to_dense()
        values = statistics.values.reshape(*shape.leading, 1, -1)
        return linalg.matmul(vectors * values, vectors.mT)

    def refresh_flops(self, shape: MatrixShape) -> int:
        return self._factored.refresh_flops(shape)

    def solve_flops(self, shape: MatrixShape) -> int:
        return self._factored.solve_flops(shape)

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * self._factored.update_flops(shape) + 4 * shape.num_parameters

    @property
    def _factored(self) -> KroneckerFactored:
        """The block whose factors, and whose basis, are those of this one."""
        return KroneckerFactored(self.sharing, max_dim=self.max_dim, inversion=Eigh())


def _bases(statistics: CorrectedFactors) -> Bases:
    """The bases, the identity for zeros."""
    left, right, ndim = statistics.left, statistics.right, statistics.values.ndim - 2
    return linalg.or_identity(left, ndim), linalg.or_identity(right, ndim)


def _turned(rows: Float[Array, "*groups n r d"], basis: Array | None) -> Float[Array, "*groups n r d"]:
    return rows if basis is None else jnp.einsum("...nri,...ij->...nrj", rows, basis)


def _squares_of_products(
    bases: Bases, a: Float[Array, "*groups n 1 d_a"], g: Float[Array, "*groups n 1 d_g"]
) -> Float[Array, "*groups d_g d_a"]:
    """The sum of squares of gradients that are products of two rows each: one product of matrices."""
    a, g = _turned(a, bases[1]), _turned(g, bases[0])
    return jnp.einsum("...nri,...nrj->...ij", g * g, a * a)


def _gradients(
    bases: Bases, a: Float[Array, "*groups n r d_a"], g: Float[Array, "*groups n r d_g"]
) -> Float[Array, "*groups n d_g d_a"]:
    """`U_Gᵀ D_n U_A`: a product of four matrices, in the order that takes the fewest operations."""
    (left, right), num_rows = bases, a.shape[-2]
    if num_rows <= g.shape[-1]:
        a, right = _turned(a, right), None
    if num_rows <= a.shape[-1]:
        g, left = _turned(g, left), None
    gradients = jnp.einsum("...nri,...nrj->...nij", g, a)
    if left is not None:
        gradients = jnp.einsum("...nij,...ik->...nkj", gradients, left)
    return _turned(gradients, right)


def _sum_of_squares(gradients: Float[Array, "*leading n d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
    return jnp.sum(gradients * gradients, axis=-3)


def _in_new_basis(statistics: CorrectedFactors, product: Product, new: Spectrum) -> Spectrum:
    """What is known of Λ, in the eigenbasis of the product.

    The diagonal of the product is known in both bases. By how much Λ differs from it is known in the old one, and
    varies slowly, so that a mean over the old vectors that a new one consists of says much. The trace stays.
    """
    old = Spectrum(*_bases(statistics), statistics.values)
    expected = _diagonal_in(old, product)
    is_known = expected > jnp.finfo(expected.dtype).eps * jnp.max(expected, axis=(-2, -1), keepdims=True)
    ratios = jnp.where(is_known, old.values / jnp.where(is_known, expected, 1), 1)
    turn_left, turn_right = _squared_turn(old.left, new.left), _squared_turn(old.right, new.right)
    values = new.values * linalg.sandwich(linalg.transpose(turn_left), ratios, turn_right)
    before, after = (jnp.sum(each, axis=(-2, -1), keepdims=True) for each in (old.values, values))
    return Spectrum(new.left, new.right, values * before / jnp.where(after > 0, after, 1))


def _diagonal_in(basis: Spectrum, product: Product) -> Float[Array, "*leading d_g d_a"]:
    """The diagonal of a product in a basis."""

    def one(factor: Any, vectors: Array | None) -> Array:
        return factor if vectors is None else jnp.sum(vectors * linalg.matmul(factor, vectors), axis=-2)

    left, right = one(product.left, basis.left), one(product.right, basis.right)
    return left[..., :, None] * right[..., None, :]


def _squared_turn(old: Array | None, new: Array | None) -> Array | None:
    """How much of each old vector is in each new one, as a column: squares, whose sums are one either way."""
    return None if old is None or new is None else jnp.square(linalg.matmul(old.mT, new))
