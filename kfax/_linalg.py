"""Dense linear algebra on (stacks of) symmetric matrices; knows matrices, not layers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._types import Scalar


# Preconditioning must not lose digits to the reduced-precision matrix units of accelerators.
PRECISION = jax.lax.Precision.HIGHEST


def matmul(*matrices: Array) -> Array:
    """The product of (stacks of) matrices, left to right, at full precision."""
    product, *rest = matrices
    for matrix in rest:
        product = jnp.matmul(product, matrix, precision=PRECISION)
    return product


def trace(matrix: Float[Array, "*stack d d"]) -> Float[Array, "*stack"]:
    return jnp.trace(matrix, axis1=-2, axis2=-1)


def shift(matrix: Float[Array, "*stack d d"], by: Float[Array, "*stack"] | Scalar) -> Float[Array, "*stack d d"]:
    """Adds a multiple of the identity."""
    return matrix + jnp.asarray(by, matrix.dtype)[..., None, None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


def psd_inverse(matrix: Float[Array, "*stack d d"]) -> Float[Array, "*stack d d"]:
    """The inverse of (a stack of) symmetric positive definite matrices, by Cholesky: about d³ multiply-adds each.

    NaN where a matrix is not positive definite to working precision.
    """
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    root = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    return matmul(jnp.swapaxes(root, -1, -2), root)


def by_size(function: Callable[[Array], Array], matrices: Sequence[Array]) -> list[Array]:
    """Applies `function`, which inverts a stack of matrices, once for each size and dtype among `matrices`.

    Fewer, larger calls: a smaller program to compile, and batched kernels on accelerators. Each call is made to wait
    for the one before. XLA would run them at the same time on the CPU, where each occupies a thread of a pool and
    waits for tasks that it hands to the same pool: with as many calls as threads, forever (jaxlib 0.10.2).
    """
    groups: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape[-1], matrix.dtype), []).append(i)
    results: list = [None] * len(matrices)
    previous = None
    for (size, _), members in groups.items():
        stacks = [matrices[i].reshape(-1, size, size) for i in members]
        stacked = jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]
        if previous is not None:
            # A dependence that no compiler can see through: the diagonal of the inverse before is never negative.
            stacked = jnp.where(jnp.ravel(previous)[0] < 0, jnp.nan, stacked)
        out = previous = function(stacked)
        start = 0
        for i, stack in zip(members, stacks, strict=True):
            results[i] = out[start : start + len(stack)].reshape(matrices[i].shape)
            start += len(stack)
    return results


def damp_factors(
    a: Float[Array, "*stack d_a d_a"], g: Float[Array, "*stack d_g d_g"], damping: Scalar
) -> tuple[Float[Array, "*stack d_a d_a"], Float[Array, "*stack d_g d_g"]]:
    r"""Factored Tikhonov damping: symmetric positive definite `Â`, `Ĝ` with `Ĝ ⊗ Â` close to `G ⊗ A + λI`.

    With `π² = (tr A / d_a) / (tr G / d_g)`, `Â ∝ A + π√λ I` and `Ĝ ∝ G + √λ/π I` (Martens & Grosse 2015, section
    6.3). They are returned on a common scale, `tr Â / d_a = tr Ĝ / d_g`, which leaves the product unchanged and keeps
    both near the middle of the exponent range. A 1x1 factor is left undamped and all of λ goes to the other one,
    which makes the damping exact. If either factor vanishes (beside λ) the product is `λI`.
    """
    d_a, d_g = a.shape[-1], g.shape[-1]
    mean_a, mean_g = trace(a) / d_a, trace(g) / d_g
    product = mean_a * mean_g
    # Anything smaller is nothing beside λ, and must not be divided by.
    alive = product > jnp.finfo(a.dtype).eps ** 2 * damping.astype(a.dtype)
    safe = jnp.where(alive, product, 1)
    num_matrices = max((d_a > 1) + (d_g > 1), 1)
    relative = (damping.astype(a.dtype) / safe) ** (1 / num_matrices)
    scale = safe ** (1 / num_matrices)
    constant = damping.astype(a.dtype) ** (1 / num_matrices)

    def damped(factor, mean, is_matrix):
        eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        if not is_matrix:
            return eye
        unit = factor / jnp.where(alive, mean, 1)[..., None, None]
        return jnp.where(
            alive[..., None, None], scale[..., None, None] * shift(unit, relative), shift(0 * eye, constant)
        )

    return damped(a, mean_a, d_a > 1 or d_g == 1), damped(g, mean_g, d_g > 1)
