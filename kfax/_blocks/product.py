"""Matrices with the structure of a Kronecker product: multiplied, inverted and diagonalized by their two factors."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math import linalg
from .._math.scalars import finite, nonnegative
from .._math.tree import full_like, Summarized, zeros_like
from .._math.types import Scalar


class Product(eqx.Module):
    r"""$L \otimes R$, or a stack of such matrices: maps V, `(m, n)`, to `L V R`.

    Every block but a sum of products has this form: a Kronecker-factored one with V itself, a full one with V raveled
    into a single row, a diagonal one as well. Vectors may come in any shape of the right size.

    **Fields:**

    - `left`: L, symmetric, `(*leading, m, m)`, or its diagonal, `(*leading, m)`; `None` for the number 1.
    - `right`: R, `(*leading, n, n)`, or its diagonal, `(*leading, n)`.
    - `ndim`: the number of leading axes, over which matrices are stacked.
    - `is_psd`: whether negative eigenvalues can only be rounding errors.
    """

    left: Float[Array, "..."] | None
    right: Float[Array, "..."]
    ndim: int = eqx.field(static=True)
    is_psd: bool = eqx.field(static=True, default=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*leading, m, n)`."""
        m = 1 if self.left is None else self.left.shape[-1]
        return (*self.right.shape[: self.ndim], m, self.right.shape[-1])

    def multiply(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        """`L V R`, in the shape and dtype of the vector."""
        product = linalg.sandwich(self.left, vector.reshape(self.shape).astype(self.right.dtype), self.right)
        return product.reshape(vector.shape).astype(vector.dtype)

    def diagonal(self) -> Float[Array, "*leading m n"]:
        right = linalg.diagonal(self.right, self.ndim)[..., None, :]
        return right if self.left is None else linalg.diagonal(self.left, self.ndim)[..., :, None] * right

    def to_dense(self) -> Float[Array, "*leading d d"]:
        """The matrix (or several along leading axes) that acts on V raveled row by row."""
        right = linalg.as_dense(self.right, self.ndim)
        if self.left is None:
            return right
        product = linalg.as_dense(self.left, self.ndim)[..., :, None, :, None] * right[..., None, :, None, :]
        *leading, m, n = self.shape
        return product.reshape(*leading, m * n, m * n)

    def factors(self) -> tuple[Float[Array, "..."], ...]:
        """Those factors that are dense."""
        return tuple(f for f in (self.left, self.right) if f is not None and self._is_dense(f))

    def damped(self, damping: Scalar) -> "Product":
        """A product close to this one plus λI; exactly that if L or R is of size one."""
        if self.left is None:
            return Product(None, linalg.shift(self.right, damping, self.ndim), self.ndim)
        right, left = linalg.damp_factors(self.right, self.left, damping, self.ndim)
        return Product(left, right, self.ndim)

    def inverse(self, inverses: tuple[Float[Array, "..."], ...]) -> "Product":
        """The inverse, given those of `factors()`."""
        waiting = iter(inverses)

        def invert(factor):
            return next(waiting) if self._is_dense(factor) else jnp.where(factor > 0, 1 / factor, jnp.nan)

        left = None if self.left is None else invert(self.left)
        return Product(left, invert(self.right), self.ndim)

    def spectrum(self, pairs: tuple[tuple[Array, Array], ...]) -> "Spectrum":
        """The eigendecomposition, given eigenvalues and eigenvectors of `factors()`.

        Where eigenvalues below zero can only be rounding errors they are set to zero.
        """
        waiting = iter(pairs)
        smallest = 0.0 if self.is_psd else -jnp.inf

        def split(factor):
            values, vectors = next(waiting) if self._is_dense(factor) else (factor, None)
            return jnp.maximum(values, smallest), vectors

        if self.left is None:
            values, right = split(self.right)
            return Spectrum(None, right, values[..., None, :])
        (left_values, left), (right_values, right) = split(self.left), split(self.right)
        return Spectrum(left, right, left_values[..., :, None] * right_values[..., None, :])

    def _is_dense(self, factor: Float[Array, "..."]) -> bool:
        return not linalg.is_diagonal(factor, self.ndim)


class Spectrum(eqx.Module):
    r"""The eigendecomposition $C = Q\, \mathrm{diag}(s)\, Q^\top$ of a block, with $Q = Q_L \otimes Q_R$.

    Whatever depends on a damping λ is cheap from here, for any λ. Vectors may come in any shape of the right size.

    **Fields:**

    - `left`, `right`: the orthogonal matrices `Q_L` and `Q_R`, with eigenvectors as columns; `None` for the identity.
    - `values`: the eigenvalues s, in the shape of V. [loss/param²]
    """

    left: Float[Array, "*leading m m"] | None
    right: Float[Array, "*leading n n"] | None
    values: Float[Array, "*leading m n"]

    def power(self, vector: Float[Array, "..."], exponent: ArrayLike, damping: ArrayLike = 0.0) -> Float[Array, "..."]:
        """`(C + λI)^p v`, in the shape and dtype of the vector."""
        result = self.join(self._powers(exponent, damping) * self.split(vector))
        return result.reshape(vector.shape).astype(vector.dtype)

    def split(self, vector: Float[Array, "..."]) -> Float[Array, "*leading m n"]:
        """`Qᵀ v`, the components of a vector along the eigenvectors, in the order of `values`."""
        v = vector.reshape(self.values.shape).astype(self.values.dtype)
        return linalg.sandwich(linalg.transpose(self.left), v, self.right)

    def join(self, components: Float[Array, "*leading m n"]) -> Float[Array, "*leading m n"]:
        """`Q c`, the vector with these components: the inverse of `split`, but for its shape."""
        return linalg.sandwich(self.left, components, linalg.transpose(self.right))

    def diagonal(self, exponent: ArrayLike = 1, damping: ArrayLike = 0.0) -> Float[Array, "*leading m n"]:
        """The diagonal of `(C + λI)^p`, in the shape of V."""
        left, right = (None if q is None else q * q for q in (self.left, self.right))
        return linalg.sandwich(left, self._powers(exponent, damping), linalg.transpose(right))

    def logdet(self, damping: ArrayLike = 0.0) -> Scalar:
        """`log det (C + λI)`."""
        return jnp.sum(jnp.log(self._damped(damping)))

    def _powers(self, exponent: ArrayLike, damping: ArrayLike) -> Float[Array, "*leading m n"]:
        return self._damped(damping) ** finite("exponent", exponent).astype(self.values.dtype)

    def _damped(self, damping: ArrayLike) -> Float[Array, "*leading m n"]:
        return self.values + nonnegative("damping", damping).astype(self.values.dtype)


class Inverse(eqx.Module):
    """What a refresh leaves behind: the inverse of a damped block, ready to be applied."""

    @abc.abstractmethod
    def solve(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        """`(C + λI)⁻¹ v`, in the shape and dtype of the vector."""

    @abc.abstractmethod
    def redamp(self, damping: Scalar) -> "Inverse":
        """The inverse for another λ if that takes no refresh, or else the same one."""


class Inversion(eqx.Module):
    """How a block is inverted."""

    @property
    @abc.abstractmethod
    def diagonalizes(self) -> bool:
        """Whether `matrices` are to be diagonalized rather than inverted."""

    @abc.abstractmethod
    def matrices(self, product: Product, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        """The symmetric matrices that have to be factorized."""

    @abc.abstractmethod
    def finish(self, product: Product, damping: Scalar, results: tuple[Any, ...]) -> Inverse:
        """The inverse, from what became of `matrices`."""

    @abc.abstractmethod
    def refresh_flops(self, size: int) -> int:
        """Floating-point operations for one matrix of a size, to leading order."""

    @property
    @abc.abstractmethod
    def num_products(self) -> int:
        """How many times a solve multiplies by each factor."""


class Cholesky(Inversion):
    r"""Inverts each factor, after damping: the cheapest refresh and the cheapest solve, for one λ.

    For a block of two factors damping is *factored*: `(L + √λ/π I) ⊗ (R + π√λ I)` with
    `π² = (tr R / n) / (tr L / m)` stands in for `L ⊗ R + λI`. For all others it is exact. A new λ takes effect with the
    next refresh. So that a singular matrix of n rows can be inverted at any λ, at least `8 n ε` times its mean
    eigenvalue is added to it, with ε the relative precision of the numbers: in float32 1e-3 for n = 1000.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
    """

    @property
    def diagonalizes(self) -> bool:
        return False

    def matrices(self, product: Product, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return product.damped(damping).factors()

    def finish(self, product: Product, damping: Scalar, results: tuple[Any, ...]) -> Inverse:
        has_diagonal = len(results) < 1 + (product.left is not None)
        return ProductInverse((product.damped(damping) if has_diagonal else product).inverse(results))

    def refresh_flops(self, size: int) -> int:
        return 2 * size**3

    @property
    def num_products(self) -> int:
        return 1


class Eigh(Inversion):
    """Diagonalizes each factor: exact damping for all blocks, and a λ that may change without a refresh.

    A refresh takes several times as long as with [`kfax.Cholesky`][], a solve twice as long.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, appendix B, with λI for one of the two products.
    """

    @property
    def diagonalizes(self) -> bool:
        return True

    def matrices(self, product: Product, damping: Scalar) -> tuple[Float[Array, "..."], ...]:
        return product.factors()

    def finish(self, product: Product, damping: Scalar, results: tuple[Any, ...]) -> Inverse:
        return SpectralInverse(product.spectrum(results), damping.astype(product.right.dtype))

    def refresh_flops(self, size: int) -> int:
        return 9 * size**3

    @property
    def num_products(self) -> int:
        return 2


def immovable(inverse: Inverse) -> Inverse:
    """One of the same structure that maps everything to zero: what stands for an inverse before there is any."""
    return jax.tree.map(unbounded, zeros_like(inverse), is_leaf=lambda x: isinstance(x, Spectrum))


def unbounded(spectrum: Any) -> Any:
    """With eigenvalues of infinity, so that for any λ negative powers map everything to zero. Only of spectra."""
    if not isinstance(spectrum, Spectrum):
        return spectrum
    return Spectrum(spectrum.left, spectrum.right, full_like(spectrum.values, jnp.inf))


def check_inversion(inversion: Inversion) -> Inversion:
    if not isinstance(inversion, Inversion):
        raise ValueError(f"`inversion` must be `kfax.Cholesky()` or `kfax.Eigh()`, got {inversion!r}.")
    return inversion


class ProductInverse(Inverse, Summarized):
    """A Kronecker product of inverse factors."""

    product: Product

    def summary(self) -> list[Float[Array, "..."]]:
        """The inverse of a matrix that could not be decomposed is NaN everywhere: one of its entries tells."""
        left, right, ndim = self.product.left, self.product.right, self.product.ndim
        factors = [factor for factor in (left, right) if factor is not None]
        return [factor if linalg.is_diagonal(factor, ndim) else factor[..., 0, 0] for factor in factors]

    def factors(self) -> tuple[Float[Array, "..."] | None, Float[Array, "..."]]:
        """Both inverse factors, left and right."""
        return self.product.left, self.product.right

    def solve(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.product.multiply(vector)

    def redamp(self, damping: Scalar) -> "ProductInverse":
        return self


class SpectralInverse(Inverse):
    """An eigendecomposition, and λ."""

    spectrum: Spectrum
    damping: Scalar

    def factors(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Both inverse factors, left and right, up to scale: of a product of two, with factored damping."""
        values = self.spectrum.values
        mean, ndim = jnp.mean(values, axis=(-2, -1)), values.ndim - 2
        left = jnp.mean(values, axis=-1) / jnp.where(mean > 0, mean, 1)[..., None]
        right, left = linalg.damp_factors(jnp.mean(values, axis=-2), left, self.damping, ndim)

        def inverse(values, vectors):
            return 1 / values if vectors is None else linalg.matmul(vectors / values[..., None, :], vectors.mT)

        return inverse(left, self.spectrum.left), inverse(right, self.spectrum.right)

    def solve(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.spectrum.power(vector, -1, self.damping)

    def redamp(self, damping: Scalar) -> "SpectralInverse":
        return SpectralInverse(self.spectrum, damping.astype(self.damping.dtype))
