"""The eigendecomposition of a whole model's curvature."""

import abc
from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from .._blocks import Spectrum
from .._layers import from_matrices, to_matrices
from .._math.types import Parameters, Scalar
from .damping import damping_by_key
from .products import blocks_of, BlockShapes, check_layout, Layout


class Eigendecomposition(eqx.Module):
    r"""$C = Q\, \mathrm{diag}(s)\, Q^\top$ of an estimator's curvature, made by its `decompose`.

    Computed once, it gives any power of C + λI for any λ by a few matrix products, and everything that follows from
    the eigenvalues at once. A PyTree: jit over it, or vmap over λ.

    **Fields:**

    - `spectra`: the eigendecomposition of each block, by key.
    """

    spectra: eqx.AbstractVar[dict[str, Spectrum]]

    @abc.abstractmethod
    def split(self, vector: Parameters) -> dict[str, Float[Array, "..."]]:
        """The part of a vector that each block acts on.

        **Raises:** `ValueError` for a vector that is not like the parameters.
        """

    @abc.abstractmethod
    def join(self, like: Parameters, blocks: dict[str, Float[Array, "..."]]) -> Parameters:
        """The inverse of `split`."""

    def power(
        self, vector: Parameters, exponent: ArrayLike, damping: ArrayLike | Mapping[str, ArrayLike] = 0.0
    ) -> Parameters:
        """`(C + λI)^p v`.

        **Arguments:**

        - `vector`: v, a PyTree like the parameters.
        - `exponent`: p, any real number. -1 solves; with standard normal v, -1/2 draws from the normal distribution
            with covariance `(C + λI)⁻¹`.
        - `damping`: λ, or one for each block by key. For a negative p it must be positive wherever C is singular.
            [loss/param²]

        **Returns:** a PyTree like the parameters.
        """
        parts, dampings = self.split(vector), damping_by_key(tuple(self.spectra), damping)
        return self.join(vector, {k: self.spectra[k].power(parts[k], exponent, dampings[k]) for k in parts})

    def diagonal(self, like: Parameters, exponent: ArrayLike = 1, damping: ArrayLike = 0.0) -> Parameters:
        """The diagonal of `(C + λI)^p`.

        **Arguments:**

        - `like`: any PyTree like the parameters.
        - `exponent`: p. With -1 it is the marginal variances of the Laplace approximation, times the number of examples
            N, for a λ that is the precision of the prior divided by N.
        - `damping`: λ. [loss/param²]

        **Returns:** a PyTree like the parameters.
        """
        parts = self.split(like)
        diagonals = {k: self.spectra[k].diagonal(exponent, damping) for k in parts}
        return self.join(like, {k: diagonals[k].reshape(parts[k].shape).astype(parts[k].dtype) for k in parts})

    def eigenvalues(self) -> Float[Array, " p"]:
        """s, in no particular order. [loss/param²]"""
        return jnp.concatenate([spectrum.values.reshape(-1) for spectrum in self.spectra.values()])

    def logdet(self, damping: ArrayLike = 0.0) -> Scalar:
        """`log det (C + λI)`.

        **Arguments:**

        - `damping`: λ. [loss/param²]

        **Returns:** the logarithm, minus infinity for a singular matrix.
        """
        return sum((spectrum.logdet(damping) for spectrum in self.spectra.values()), jnp.zeros(()))

    def trace(self) -> Scalar:
        """The sum of the eigenvalues. [loss/param²]"""
        return jnp.sum(self.eigenvalues())


class BlockEigendecomposition(Eigendecomposition):
    """Of a block-diagonal matrix, block by block."""

    spectra: dict[str, Spectrum]
    shapes: BlockShapes = eqx.field(static=True)

    def split(self, vector: Parameters) -> dict[str, Float[Array, "..."]]:
        blocks_of(vector, self.shapes)
        return to_matrices(vector)

    def join(self, like: Parameters, blocks: dict[str, Float[Array, "..."]]) -> Parameters:
        return from_matrices(like, blocks)


class DenseEigendecomposition(Eigendecomposition):
    """Of a dense matrix, which acts on all parameters raveled."""

    spectra: dict[str, Spectrum]
    layout: Layout = eqx.field(static=True)

    def split(self, vector: Parameters) -> dict[str, Float[Array, "..."]]:
        check_layout(vector, self.layout)
        return {"": ravel_pytree(vector)[0]}

    def join(self, like: Parameters, blocks: dict[str, Float[Array, "..."]]) -> Parameters:
        return ravel_pytree(like)[1](blocks[""])
