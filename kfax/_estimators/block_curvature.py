"""The curvature of one layer, taken out of a model's."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from .._blocks import Block, Spectrum
from .._math import linalg
from .._operations import MatrixShape


class BlockCurvature(eqx.Module):
    """The curvature of one operation of a layer, from the `blocks` of a [`kfax.BlockDiagonalCurvature`][].

    It acts on the matrix V of the operation, as [`kfax.to_matrices`][] gives it, and is in loss/param².

    **Fields:**

    - `block`: how it is approximated.
    - `shape`: of V, a [`kfax.MatrixShape`][].
    - `statistics`: what the block averages over batches. Of a [`kfax.KroneckerFactored`][] these are the factors A and
        G, a [`kfax.KroneckerFactors`][].
    """

    block: Block
    shape: MatrixShape
    statistics: Any

    def multiply(self, vector: Float[Array, "*leading d_g d_a"]) -> Float[Array, "*leading d_g d_a"]:
        """`C V`, without damping.

        **Arguments:**

        - `vector`: V, of the shape that the operation's matrix has.

        **Returns:** an array of this shape.

        **Raises:** `ValueError` for another shape.
        """
        if not eqx.is_array(vector) or vector.shape != self._matrix:
            found = vector.shape if eqx.is_array(vector) else type(vector).__name__
            raise ValueError(f"`vector` must be a matrix of shape {self._matrix} for this block, got {found}.")
        return self.block.multiply(self.shape, self.statistics, vector)

    def diagonal(self) -> Float[Array, "*leading d_g d_a"]:
        """The diagonal of C, in the shape of V."""
        return self.block.diagonal(self.shape, self.statistics).reshape(self._matrix)

    def to_dense(self) -> Float[Array, "... d d"]:
        """C as a matrix that acts on V raveled row by row.

        Of a block that is block diagonal itself ([`kfax.UnitWise`][], groups, a stack of layers): several matrices
        along leading axes, each of which acts on its part of V.
        """
        return self.block.to_dense(self.shape, self.statistics)

    def spectrum(self) -> Spectrum:
        """The eigendecomposition of C: powers of C + λI, eigenvalues, a log-determinant. As costly as a refresh."""
        factors = self.block.factors(self.shape, self.statistics)
        pairs = linalg.by_size(linalg.eigh, factors)
        return self.block.spectrum(self.shape, self.statistics, tuple(pairs))

    @property
    def _matrix(self) -> tuple[int, ...]:
        return (*self.shape.leading, self.shape.d_g, self.shape.d_a)
