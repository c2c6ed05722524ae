"""The eigenbases of a model's blocks, and how they follow their statistics."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._blocks import Product, Spectrum
from .._layers import Part
from .._math import linalg
from .refresh import factorize


Bases = dict[str, tuple[Float[Array, "..."], ...]]


def axes_of(found: Mapping[str, Part], statistics: Mapping[str, Any]) -> dict[str, Product]:
    """For each block a Kronecker product whose eigenvectors are taken for its own."""
    return {key: part.block.axes(part.operation.shape(), statistics[key]) for key, part in found.items()}


def no_bases(axes: Mapping[str, Product]) -> Bases:
    """Identities."""
    unit = lambda x: jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)  # noqa: E731
    return {key: jax.tree.map(unit, product.factors()) for key, product in axes.items()}


def full_bases(axes: Mapping[str, Product]) -> Bases:
    """All eigenvectors, those of the largest eigenvalues first, as a step of the power method has them."""
    pairs = factorize(linalg.eigh, {key: product.factors() for key, product in axes.items()})
    return {key: tuple(vectors[..., ::-1] for _, vectors in several) for key, several in pairs.items()}


def turned_bases(axes: Mapping[str, Product], bases: Bases) -> Bases:
    """Bases after a step of the power method: orthonormal columns that span those of `F Q`, the first ones first.

    Repeated for one F they become its eigenvectors; for one that changes slowly they follow it. About 5 d³ flops, most
    of them in products of matrices, against 9 d³ of an eigendecomposition.
    """
    moved = {
        key: tuple(linalg.matmul(f, q) for f, q in zip(axes[key].factors(), several, strict=True))
        for key, several in bases.items()
    }
    return factorize(linalg.orthonormal, moved)


def spectra_in(axes: Mapping[str, Product], bases: Bases) -> dict[str, Spectrum]:
    """Eigendecompositions with these bases, whose values mean nothing but their shape."""
    return {key: axes[key].spectrum(tuple((q[..., 0], q) for q in several)) for key, several in bases.items()}
