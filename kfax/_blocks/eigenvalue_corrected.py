"""The Kronecker-factored block with exact eigenvalues in its eigenbasis."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.tree import Summarized
from .._math.types import ArrayTree, Scalar
from .._operations import FactoredOperation, MatrixShape, Operation
from .._slot import Use
from .base import Block, BlockState, Recorded
from .kronecker import check_factored, check_factoring, KroneckerFactored
from .product import Eigh, Inverse, Product, SpectralInverse, Spectrum
from .sharing import Expand, KroneckerFactors, Sharing


Bases = tuple[Float[Array, "*leading d_g d_g"] | None, Float[Array, "*leading d_a d_a"] | None]


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

    Memory: `3 (d_a² + d_g²) + 2 d_a d_g` numbers, and one for each parameter and example during an update. A refresh
    takes about `9 (d_a³ + d_g³)` flops, a solve `4 d_a d_g (d_a + d_g)`, an update twice those of the factors and
    `4 d_a d_g` for each example.

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

    def given(self, shape: MatrixShape, statistics: CorrectedFactors) -> Bases:
        """The bases."""
        return _bases(statistics)

    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        factors = self._factored.slot(shape, num_examples)
        gradients = jnp.zeros((*shape.leading, num_examples, shape.d_g, shape.d_a), shape.statistics_dtype)
        return Recorded(factors.inputs, (factors.cotangents, gradients))

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        operation = check_factored(self, operation)
        factors = self._factored.record(shape, operation, use)
        gradients = _gradients(shape, operation, use)
        return Recorded(factors.inputs, (factors.cotangents, gradients))

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree) -> ArrayTree:
        factors, gradients = cotangents
        return self._factored.second_moment(shape, factors), jnp.sum(gradients * gradients, axis=-3)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: Bases,
    ) -> CorrectedFactors:
        g, squares = second_moment
        factors = self._factored.statistics(shape, inputs, g, weights, num_examples, None)
        return CorrectedFactors(factors, *given, squares / num_examples)

    def init(self, shape: MatrixShape) -> BlockState:
        factors = self._factored.zeros(shape)
        ndim, dtype = len(shape.leading), shape.statistics_dtype
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
        self, shape: MatrixShape, statistics: CorrectedFactors, damping: Scalar, results: tuple
    ) -> SpectralInverse:
        product = self._factored.product(shape, statistics.factors)
        spectrum = _in_new_basis(statistics, product, product.spectrum(results))
        return SpectralInverse(spectrum, damping.astype(spectrum.values.dtype))

    def rebase(self, shape: MatrixShape, statistics: CorrectedFactors, inverse: SpectralInverse) -> CorrectedFactors:
        new = inverse.spectrum
        return CorrectedFactors(statistics.factors, new.left, new.right, new.values)

    def redamp(
        self, shape: MatrixShape, statistics: CorrectedFactors, inverse: SpectralInverse, damping: Scalar
    ) -> SpectralInverse:
        old = inverse.spectrum
        # Infinite before the first refresh, so that nothing moves.
        values = jnp.where(jnp.isfinite(old.values), statistics.values, old.values)
        return SpectralInverse(Spectrum(old.left, old.right, values), damping.astype(values.dtype))

    def factors(self, shape: MatrixShape, statistics: CorrectedFactors) -> tuple[Float[Array, "..."], ...]:
        return ()

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
        return linalg.matmul(vectors * values, linalg.transpose(vectors))

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

    def one(basis):
        if basis is None:
            return None
        is_known = jnp.any(basis != 0, axis=(-2, -1), keepdims=True)
        return jnp.where(is_known, basis, jnp.eye(basis.shape[-1], dtype=basis.dtype))

    return one(statistics.left), one(statistics.right)


def _gradients(shape: MatrixShape, operation: FactoredOperation, use: Use) -> Float[Array, "*groups n d_g d_a"]:
    """`U_Gᵀ D_n U_A` of one use: a product of four matrices, in the order that takes the fewest operations."""
    left, right = use.given
    a, g = (rows.astype(shape.statistics_dtype) for rows in (operation.inputs(use.x), operation.cotangents(use.dy)))
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, shape.d_a - a.shape[-1])])  # a bias that this use has not
    if right is not None and g.shape[-2] <= shape.d_g:
        a, right = jnp.einsum("...nri,...ij->...nrj", a, right), None
    if left is not None and g.shape[-2] <= shape.d_a:
        g, left = jnp.einsum("...nri,...ij->...nrj", g, left), None
    gradients = jnp.einsum("...nri,...nrj->...nij", g, a)
    if left is not None:
        gradients = jnp.einsum("...nij,...ik->...nkj", gradients, left)
    return gradients if right is None else jnp.einsum("...nij,...jk->...nik", gradients, right)


def _in_new_basis(statistics: CorrectedFactors, product: Product, new: Spectrum) -> Spectrum:
    """What is known of Λ, in the eigenbasis of the product: by how much Λ differs from the diagonal of the product.

    That is known in the old basis and smooth, while the diagonal is known in both and is not. The trace stays.
    """
    left, right = _bases(statistics)
    expected = _diagonal_in(left, product.left, product.ndim)[..., :, None] * _diagonal_in(right, product.right, product.ndim)[..., None, :]
    smallest = jnp.finfo(expected.dtype).eps * jnp.max(expected, axis=(-2, -1), keepdims=True)
    is_known = expected > smallest
    ratios = jnp.where(is_known, statistics.values / jnp.where(is_known, expected, 1), 1)
    turned = linalg.sandwich(_squared_turn(new.left, left), ratios, linalg.transpose(_squared_turn(new.right, right)))
    values = new.values * turned
    total, before = jnp.sum(values, axis=(-2, -1), keepdims=True), jnp.sum(statistics.values, axis=(-2, -1), keepdims=True)
    return Spectrum(new.left, new.right, values * before / jnp.where(total > 0, total, 1))


def _diagonal_in(basis: Array | None, factor: Array, ndim: int) -> Array:
    """The diagonal of a factor in a basis."""
    if basis is None:
        return factor
    return jnp.sum(basis * linalg.matmul(factor, basis), axis=-2)


def _squared_turn(new: Array | None, old: Array | None) -> Array | None:
    """How much of each old vector, as columns, is in each new one: squares that add up to one either way."""
    return None if new is None or old is None else jnp.square(linalg.matmul(linalg.transpose(new), old))
