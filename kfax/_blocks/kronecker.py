"""The Kronecker-factored block: K-FAC itself."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math.arguments import whole_number
from .._math.types import ArrayTree
from .._operations import FactoredOperation, MatrixShape, Operation, Transposed
from .._slot import Use
from .base import Block, describe, ProductBlock, Recorded
from .product import check_inversion, Cholesky, Inversion, Product
from .sharing import Expand, FactorSizes, KroneckerFactors, Sharing


class KroneckerFactored(ProductBlock):
    r"""Approximates the block of a layer's matrix V, `(d_g, d_a)`, by a Kronecker product of two small matrices.

    $$\mathbb E[\mathrm{vec}(g \bar a^\top)\, \mathrm{vec}(g \bar a^\top)^\top] \approx \tfrac1R\, G \otimes A$$

    with V raveled row by row, so that the block maps V to `G V A / R`. It is exact if inputs and output cotangents are
    independent, in particular for deep linear networks with squared error, and for a single example.

    Damping is factored by default: `(G/R + √λ/π I) ⊗ (A + π√λ I)` stands in for `G ⊗ A / R + λ I`. With
    `inversion=kfax.Eigh()` it is exact.

    A factor is diagonal where nothing else is needed, on the side of an embedding's entries, and where its side of V
    is longer than `max_dim`.

    Memory: `2 (d_a² + d_g²)` numbers. A refresh takes about `2 (d_a³ + d_g³)` flops, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, sections 3 and 6.3. The scale of the two inverse factors is chosen
        differently, which leaves their product the same.
    """

    sharing: Sharing
    max_dim: int = eqx.field(static=True)
    inversion: Inversion

    def __init__(self, sharing: Sharing = Expand(), *, max_dim: int = 4096, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `sharing`: what to make of a layer applied at several positions of an example, `kfax.Expand()` or
            `kfax.Reduce()`. Makes no difference to a layer that is applied once.
        - `max_dim`: the largest dense factor. Of a longer side of V (the inputs of a very wide layer, the classes of
            a large vocabulary) only the diagonal of the factor is kept.
        - `inversion`: [`kfax.Cholesky`][]`()` for factored damping, or [`kfax.Eigh`][]`()` for exact damping, which may
            change without a refresh.

        **Raises:** `ValueError` for something else than that.
        """
        self.sharing, self.max_dim = check_factoring(sharing, max_dim)
        self.inversion = check_inversion(inversion)

    def __str__(self) -> str:
        return describe(self, self.sharing)

    @property
    def is_sum(self) -> bool:
        return self.sharing.is_sum

    def slot(self, shape: MatrixShape, num_examples: int, is_only: bool) -> Recorded:
        return self.sharing.slot(factor_sizes(shape, self.max_dim), num_examples)

    def record(self, shape: MatrixShape, operation: Operation, use: Use) -> Recorded:
        if isinstance(operation, Transposed):
            raise ValueError(
                "its matrix is also used transposed, as that of an embedding is by a head tied to it. The two uses "
                "have different units, and their statistics must not be added up. Give it a block for both: "
                "`kfax.set_block(model, where, kfax.KroneckerSum())`."
            )
        return self.sharing.record(factor_sizes(shape, self.max_dim), check_factored(self, operation), use)

    def second_moment(self, shape: MatrixShape, cotangents: ArrayTree, given: ArrayTree) -> ArrayTree:
        return self.sharing.second_moment(factor_sizes(shape, self.max_dim), cotangents)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: ArrayTree,
        second_moment: ArrayTree,
        weights: Float[Array, " n"] | None,
        num_examples: int,
        given: ArrayTree,
    ) -> KroneckerFactors:
        sizes = factor_sizes(shape, self.max_dim)

        def one(inputs, g):
            return self.sharing.factors(sizes, inputs, g, weights, num_examples)

        return shape.over_matrices(one)(inputs, second_moment)

    def zeros(self, shape: MatrixShape) -> KroneckerFactors:
        a, g = factor_sizes(shape, self.max_dim).zeros()
        return KroneckerFactors(a, g, jnp.zeros(shape.leading, shape.statistics_dtype))

    def product(self, shape: MatrixShape, statistics: KroneckerFactors) -> Product:
        return Product(per_position(statistics), statistics.a, len(shape.leading))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return refresh_flops(factor_sizes(shape, self.max_dim), self.inversion)

    def solve_flops(self, shape: MatrixShape) -> int:
        return solve_flops(factor_sizes(shape, self.max_dim), self.inversion)

    def update_flops(self, shape: MatrixShape) -> int:
        sizes = factor_sizes(shape, self.max_dim)
        a = 1 if shape.one_hot else sizes.a[0] * sizes.a[-1] if len(sizes.a) == 2 else sizes.a[0]
        g = sizes.g[0] ** len(sizes.g)
        return 2 * shape.num_matrices * (a + g)


def check_factoring(sharing: Sharing, max_dim: int) -> tuple[Sharing, int]:
    if not isinstance(sharing, Sharing):
        raise ValueError(f"`sharing` must be `kfax.Expand()` or `kfax.Reduce()`, got {sharing!r}.")
    return sharing, check_max_dim(max_dim)


def check_max_dim(max_dim: int) -> int:
    return whole_number("max_dim", max_dim, 0)


def check_factored(block: Block, operation: Operation) -> FactoredOperation:
    if not isinstance(operation, FactoredOperation):
        raise ValueError(
            f"its block is {block}, but its parameters ({type(operation).__name__}) multiply no inputs as a matrix "
            "does, so that there is nothing to factor. Blocks that fit: `kfax.UnitWise()`, `kfax.Diagonal()`, "
            "`kfax.TensorNormal()` and `kfax.Full()`."
        )
    return operation


def rows_of(
    shape: MatrixShape, operation: FactoredOperation, use: Use
) -> tuple[Float[Array, "*groups n r d_a"], Float[Array, "*groups n r d_g"]]:
    """ā and g of one use."""
    a, g = (rows.astype(shape.statistics_dtype) for rows in (operation.inputs(use.x), operation.cotangents(use.dy)))
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, shape.d_a - a.shape[-1])]), g  # a bias that this use has not


def factor_sizes(shape: MatrixShape, max_dim: int) -> FactorSizes:
    return FactorSizes(shape, shape.one_hot or shape.d_a > max_dim, shape.d_g > max_dim)


def per_position(statistics: KroneckerFactors) -> Float[Array, "..."]:
    """`G / R`."""
    positions = jnp.where(statistics.positions > 0, statistics.positions, 1)
    return statistics.g / positions.reshape(*positions.shape, *(1,) * (statistics.g.ndim - positions.ndim))


def refresh_flops(sizes: FactorSizes, inversion: Inversion) -> int:
    """Of two factors, for each matrix."""
    flops = [inversion.refresh_flops(size[0]) if len(size) == 2 else size[0] for size in (sizes.a, sizes.g)]
    return sizes.shape.num_matrices * sum(flops)


def solve_flops(sizes: FactorSizes, inversion: Inversion) -> int:
    lengths = [size[0] if len(size) == 2 else 1 for size in (sizes.a, sizes.g)]
    return 2 * sizes.shape.num_parameters * sum(lengths) * inversion.num_products
