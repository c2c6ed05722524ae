"""The Kronecker-factored block: K-FAC itself."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .. import _linalg as linalg
from .._types import Scalar
from .base import Block, BlockState, MatrixShape, Recorded, Rows
from .sharing import Expand, KroneckerFactors, Sharing


class KroneckerFactored(Block):
    r"""Approximates the block of a layer's matrix V, `(d_g, d_a)`, by a Kronecker product of two small matrices.

    $$\mathbb E[\mathrm{vec}(g \bar a^\top)\, \mathrm{vec}(g \bar a^\top)^\top] \approx \tfrac1R\, G \otimes A$$

    with V raveled row by row, so that the block maps V to `G V A / R`. It is exact if inputs and output cotangents are
    independent, in particular for deep linear networks with squared error, and for a single example.

    Damping is factored: `(G/R + √λ/π I) ⊗ (A + π√λ I)` stands in for `G ⊗ A / R + λ I`.

    Memory: `2 (d_a² + d_g²)` numbers. A refresh takes about `2 (d_a³ + d_g³)` flops, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, sections 3 and 6.3. The scale of the two inverse factors is chosen
        differently, which leaves their product the same.
    """

    sharing: Sharing

    def __init__(self, sharing: Sharing = Expand()):
        """**Arguments:**

        - `sharing`: what to make of a layer applied at several positions of an example, `kfax.Expand()` or
            `kfax.Reduce()`. Makes no difference to a layer that is applied once.
        """
        if not isinstance(sharing, Sharing):
            raise ValueError(f"`sharing` must be `kfax.Expand()` or `kfax.Reduce()`, got {sharing!r}.")
        self.sharing = sharing

    @property
    def is_sum(self) -> bool:
        return self.sharing.is_sum

    def slot(self, shape: MatrixShape, num_examples: int) -> Recorded:
        return self.sharing.slot(shape, num_examples)

    def record(self, shape: MatrixShape, rows: Rows, weights: Float[Array, " n"] | None) -> Recorded:
        return self.sharing.record(shape, rows, weights)

    def second_moment(self, shape: MatrixShape, cotangents: PyTree[Array]) -> PyTree[Array]:
        return self.sharing.second_moment(cotangents)

    def statistics(
        self,
        shape: MatrixShape,
        inputs: PyTree[Array],
        second_moment: PyTree[Array],
        weights: Float[Array, "*stack n"] | None,
        num_examples: int,
    ) -> KroneckerFactors:
        def one(inputs, g, weights):
            return self.sharing.factors(shape, inputs, g, weights, num_examples)

        return shape.over_stack(one)(inputs, second_moment, weights)

    def init(self, shape: MatrixShape) -> BlockState:
        dtype = shape.statistics_dtype
        zeros = [jnp.zeros((*shape.stack, d, d), dtype) for d in (shape.d_a, shape.d_g)]
        eyes = tuple(linalg.shift(z, jnp.ones((), dtype)) for z in zeros)
        return BlockState(KroneckerFactors(zeros[0], zeros[1], jnp.zeros(shape.stack, dtype)), eyes)

    def matrices(self, statistics: KroneckerFactors, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return linalg.damp_factors(statistics.a, self._g_per_position(statistics), damping)

    def refresh(self, inverses: tuple[Float[Array, "..."], ...]) -> tuple[Float[Array, "..."], ...]:
        return inverses

    def solve(
        self, inverse: tuple[Float[Array, "..."], ...], vector: Float[Array, "*stack d_g d_a"]
    ) -> Float[Array, "*stack d_g d_a"]:
        a_inverse, g_inverse = inverse
        return linalg.matmul(g_inverse, vector.astype(a_inverse.dtype), a_inverse).astype(vector.dtype)

    def multiply(
        self, statistics: KroneckerFactors, vector: Float[Array, "*stack d_g d_a"]
    ) -> Float[Array, "*stack d_g d_a"]:
        g = self._g_per_position(statistics)
        return linalg.matmul(g, vector.astype(g.dtype), statistics.a).astype(vector.dtype)

    def eigenvalues(self, statistics: KroneckerFactors) -> Float[Array, "*stack d"]:
        a = jnp.linalg.eigvalsh(statistics.a)
        g = jnp.linalg.eigvalsh(self._g_per_position(statistics))
        return (g[..., :, None] * a[..., None, :]).reshape(*a.shape[:-1], -1)

    def to_dense(self, statistics: KroneckerFactors) -> Float[Array, "*stack d d"]:
        g, a = self._g_per_position(statistics), statistics.a
        product = g[..., :, None, :, None] * a[..., None, :, None, :]
        size = g.shape[-1] * a.shape[-1]
        return product.reshape(*a.shape[:-2], size, size)

    def refresh_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_layers * (shape.d_a**3 + shape.d_g**3)

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_layers * shape.d_a * shape.d_g * (shape.d_a + shape.d_g)

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_layers * (shape.d_a**2 + shape.d_g**2)

    def _g_per_position(self, statistics: KroneckerFactors) -> Float[Array, "*stack d_g d_g"]:
        positions = jnp.where(statistics.positions > 0, statistics.positions, 1)
        return statistics.g / positions[..., None, None]
