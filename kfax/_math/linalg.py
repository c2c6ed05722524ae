"""Dense linear algebra on (stacks of) symmetric matrices; knows matrices, not layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .types import ArrayTree, Scalar


# Preconditioning must not lose digits to the reduced-precision matrix units of accelerators.
PRECISION = jax.lax.Precision.HIGHEST


def matmul(*matrices: Array) -> Array:
    """The product of (stacks of) matrices, left to right, at full precision."""
    product, *rest = matrices
    for matrix in rest:
        product = jnp.matmul(product, matrix, precision=PRECISION)
    return product


def is_diagonal(factor: Float[Array, "..."], ndim: int) -> bool:
    """Whether a factor with `ndim` leading axes is the diagonal of a diagonal matrix, rather than a dense matrix."""
    return factor.ndim == ndim + 1


def as_dense(factor: Float[Array, "..."], ndim: int) -> Float[Array, "*leading d d"]:
    """A factor as a matrix."""
    if not is_diagonal(factor, ndim):
        return factor
    return factor[..., None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)


def diagonal(factor: Float[Array, "..."], ndim: int) -> Float[Array, "*leading d"]:
    """The diagonal of a factor with `ndim` leading axes."""
    if is_diagonal(factor, ndim):
        return factor
    *leading, size, _ = factor.shape
    return factor.reshape(*leading, size * size)[..., :: size + 1]  # a slice, which compiles faster than a gather


def or_identity(factor: Float[Array, "..."] | None, ndim: int) -> Float[Array, "..."] | None:
    """A factor with `ndim` leading axes, where it is not zero, and the identity where it is. `None` stays so."""
    if factor is None:
        return None
    if is_diagonal(factor, ndim):
        return jnp.where(jnp.any(factor != 0, axis=-1, keepdims=True), factor, 1)
    is_known = jnp.any(factor != 0, axis=(-2, -1), keepdims=True)
    return jnp.where(is_known, factor, jnp.eye(factor.shape[-1], dtype=factor.dtype))


def inner(factor: Float[Array, "..."], other: Float[Array, "..."] | None, ndim: int) -> Float[Array, "*leading"]:
    """`tr(X Y)` of symmetric factors with `ndim` leading axes, both dense or both diagonal; `None` is the identity."""
    if other is None:
        return jnp.sum(diagonal(factor, ndim), axis=-1)
    return jnp.sum(factor * other, axis=tuple(range(ndim, factor.ndim)))


def transpose(matrix: Float[Array, "*leading d e"] | None) -> Float[Array, "*leading e d"] | None:
    return None if matrix is None else jnp.swapaxes(matrix, -1, -2)


def sandwich(
    left: Float[Array, "..."] | None, vector: Float[Array, "*leading d_g d_a"], right: Float[Array, "..."] | None
) -> Float[Array, "*leading d_g d_a"]:
    """`L V R`, where either factor may be the diagonal of a diagonal matrix, or `None` for the identity."""
    ndim = vector.ndim - 2
    if left is not None:
        vector = left[..., :, None] * vector if is_diagonal(left, ndim) else matmul(left, vector)
    if right is not None:
        vector = vector * right[..., None, :] if is_diagonal(right, ndim) else matmul(vector, right)
    return vector


def shift(factor: Float[Array, "..."], by: Scalar, ndim: int) -> Float[Array, "..."]:
    """Adds a multiple of the identity to a factor with `ndim` leading axes: of a matrix, at least `least_damping`.

    A matrix whose trace is not finite becomes one with NaN on its diagonal: of an infinite one some libraries make an
    inverse of zeros.
    """
    by = by.astype(factor.dtype)
    if is_diagonal(factor, ndim):
        return factor + by
    size, mean = factor.shape[-1], _mean_eigenvalues([factor], ndim)[..., 0]
    by = jnp.where(jnp.isfinite(mean), jnp.maximum(by, least_damping(size, factor.dtype) * mean), jnp.nan)
    return factor + by[..., None, None] * jnp.eye(size, dtype=factor.dtype)


def least_damping(size: int, dtype: DTypeLike) -> float:
    """What must be added to a matrix of any rank, relative to its mean eigenvalue, for Cholesky not to break down.

    Half of it sufficed in float32 for matrices of rank one of up to 1001 rows, the worst case.
    """
    return 8 * size * float(jnp.finfo(dtype).eps) if size > 1 else 0.0


def _one_by_one(function: Callable[[Array], ArrayTree]) -> Callable[[Array], Any]:
    """`function`, which calls LAPACK for matrices `(*stack, d, d)`, made to factorize one after the other on the CPU.

    There a batched call occupies a thread of XLA's pool while it waits for tasks that it hands to the same pool: with
    as many of them as threads, forever (jaxlib 0.10.2). A call for one matrix waits for nothing. Axes that are mapped
    by `jax.vmap` join the stack, which otherwise would make a batched call of the single ones. Accelerators factorize
    in batches.
    """

    @jax.custom_batching.custom_vmap
    def over_stack(stack):
        return jax.lax.platform_dependent(stack, cpu=functools.partial(_in_turn, function), default=function)

    @over_stack.def_vmap
    def _(axis_size, in_batched, stack):
        del in_batched
        results = over_stack(stack.reshape(-1, *stack.shape[2:]))
        results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    @functools.wraps(function)
    def factorize(matrix):
        leading, size = matrix.shape[:-2], matrix.shape[-1]
        results = over_stack(matrix.reshape(-1, size, size))
        return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), results)

    return factorize


def _in_turn(function: Callable[[Array], ArrayTree], stack: Float[Array, "k d d"]) -> ArrayTree:
    """`function` of one matrix after the other."""
    if 0 < len(stack) <= _MAX_WRITTEN_OUT:
        return jax.tree.map(lambda *x: jnp.stack(x), *[function(matrix) for matrix in stack])
    return jax.lax.map(function, stack)


# So few matrices are faster to compile without a loop: by a quarter, for the ten sizes of a deep autoencoder.
_MAX_WRITTEN_OUT = 4


@jax.custom_jvp
@_one_by_one
def _inverse_root(matrix: Float[Array, "*stack d d"]) -> Float[Array, "*stack d d"]:
    """`L⁻ᵀ` of a positive definite `L Lᵀ`, where L is lower triangular.

    LAPACK stores matrices by columns. It is given a transpose, and so is what it returns: XLA has nothing to copy.
    """
    root = jnp.linalg.cholesky(matrix.mT, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True).mT


@_inverse_root.defjvp
def _(primals, tangents):
    [matrix], [tangent] = primals, tangents
    root = _inverse_root(matrix)
    change = matmul(root.mT, tangent, root)
    upper = jnp.triu(change) - as_dense(diagonal(change, change.ndim - 2), change.ndim - 2) / 2
    return root, -matmul(root, upper)


@jax.custom_jvp
@_one_by_one
def _eigh(matrix: Float[Array, "*stack d d"]) -> tuple[Float[Array, "*stack d"], Float[Array, "*stack d d"]]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@_eigh.defjvp
def _(primals, tangents):
    [matrix], [tangent] = primals, tangents
    values, vectors = _eigh(matrix)
    change = matmul(vectors.mT, tangent, vectors)
    gaps = values[..., None, :] - values[..., :, None] + jnp.eye(values.shape[-1], dtype=values.dtype)
    rotation = jnp.where(jnp.eye(values.shape[-1], dtype=bool), 0, change / gaps)
    return (values, vectors), (diagonal(change, change.ndim - 2), matmul(vectors, rotation))


def psd_inverse(matrix: Float[Array, "*stack d d"]) -> Float[Array, "*stack d d"]:
    """The inverse of (a stack of) symmetric positive definite matrices, by Cholesky: about d³ multiply-adds each.

    NaN where a matrix is not positive definite to working precision, or has a NaN.
    """
    if matrix.shape[-1] == 1:
        return jnp.where((matrix > 0) & jnp.isfinite(matrix), 1 / matrix, jnp.nan)
    root = _inverse_root(matrix)
    return matmul(root, root.mT)


def eigh(matrix: Float[Array, "*stack d d"]) -> tuple[Float[Array, "*stack d"], Float[Array, "*stack d d"]]:
    """Eigenvalues and eigenvectors (as columns) of (a stack of) symmetric matrices: about 9 d³ flops each.

    NaN where a matrix is not finite.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0], jnp.ones_like(matrix)
    # Some libraries return numbers for what is not finite, or never return.
    finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
    values, vectors = _eigh(jnp.where(finite, matrix, jnp.eye(matrix.shape[-1], dtype=matrix.dtype)))
    return jnp.where(finite[..., 0], values, jnp.nan), jnp.where(finite, vectors, jnp.nan)


@_one_by_one
def orthonormal(matrix: Float[Array, "*stack d d"]) -> Float[Array, "*stack d d"]:
    """Orthonormal columns for (a stack of) square matrices, the first k of which span the first k of the matrix.

    About 8/3 d³ flops each. NaN where a matrix is not finite.
    """
    return jnp.linalg.qr(matrix)[0]


def diagonalize_both(
    matrix: Float[Array, "..."], metric: Float[Array, "..."], ndim: int
) -> tuple[Float[Array, "..."], Float[Array, "*leading d"]]:
    """K and s with `Kᵀ metric K = I` and `Kᵀ matrix K = diag(s)`, for a metric that is positive definite.

    Of two diagonals K is a diagonal too.
    """
    if is_diagonal(metric, ndim):
        return jax.lax.rsqrt(metric), matrix / metric
    root = _inverse_root(metric)
    values, vectors = eigh(matmul(root.mT, as_dense(matrix, ndim), root))
    return matmul(root, vectors), jnp.maximum(values, 0)


def by_size(function: Callable[[Array], ArrayTree], matrices: Sequence[Array]) -> list:
    """Applies `function`, which factorizes a stack of matrices, to several, once for each size and dtype among them.

    Fewer, larger calls: batched kernels on accelerators. The CPU factorizes one by one in any case, and is spared the
    copies.
    """
    groups: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape[-1], matrix.dtype), []).append(i)

    def apart(*members):
        return [function(matrix) for matrix in members]

    def together(*members):
        stacks = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in members]
        ends = np.cumsum([len(stack) for stack in stacks])
        out = jax.tree.map(lambda x: jnp.split(x, ends[:-1]), function(jnp.concatenate(stacks)))
        return [
            jax.tree.map(lambda x, i=i, m=m: x[i].reshape(*m.shape[:-2], *x[i].shape[1:]), out, is_leaf=_is_list)
            for i, m in enumerate(members)
        ]

    results: list = [None] * len(matrices)
    for indices in groups.values():
        members = [matrices[i] for i in indices]
        found = (
            apart(*members) if len(members) == 1 else jax.lax.platform_dependent(*members, cpu=apart, default=together)
        )
        for i, result in zip(indices, found, strict=True):
            results[i] = result
    return results


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def damp_factors(
    a: Float[Array, "..."], g: Float[Array, "..."], damping: Scalar, ndim: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Factored Tikhonov damping: symmetric positive definite `Â`, `Ĝ` with `Ĝ ⊗ Â` close to `G ⊗ A + λI`.

    With `π² = (tr A / d_a) / (tr G / d_g)`, `Â ∝ A + π√λ I` and `Ĝ ∝ G + √λ/π I` (Martens & Grosse 2015, section
    6.3). They are returned on a common scale, `tr Â / d_a = tr Ĝ / d_g`, which leaves the product unchanged and keeps
    both near the middle of the exponent range. A 1x1 factor is left undamped and all of λ goes to the other one,
    which makes the damping exact. If either factor vanishes (beside λ) the product is `λI`. Each factor has `ndim`
    leading axes, and may be the diagonal of a diagonal matrix. Neither is damped by less than `least_damping`. NaN if
    the product of their traces is not finite.
    """
    d_a, d_g = a.shape[-1], g.shape[-1]
    # Numbers for A and G side by side, for the sake of few kernels.
    means, damping = _mean_eigenvalues((a, g), ndim), damping.astype(a.dtype)[..., None]
    product = means * means[..., ::-1]
    # Anything smaller is nothing beside λ, and must not be divided by.
    alive = product > jnp.finfo(a.dtype).eps ** 2 * damping
    safe = jnp.where(alive, product, 1)
    root = jnp.sqrt if d_a > 1 and d_g > 1 else lambda x: x  # of two matrices, or one
    scale, least = root(safe), np.array([least_damping(d, a.dtype) for d in (d_a, d_g)], a.dtype)
    multiples = jnp.where(alive, scale / jnp.where(alive, means, 1), 0) + 0 * product  # or NaN
    added = jnp.maximum(root(damping), jnp.where(alive, scale, 0) * least)

    def damped(factor, index, is_matrix):
        size, shape = factor.shape[-1], (*means.shape[:-1], *(1,) * (factor.ndim - ndim))
        eye = jnp.ones(size, factor.dtype) if is_diagonal(factor, ndim) else jnp.eye(size, dtype=factor.dtype)
        if not is_matrix:
            return jnp.broadcast_to(eye, factor.shape)
        return multiples[..., index].reshape(shape) * factor + added[..., index].reshape(shape) * eye

    return damped(a, 0, d_a > 1 or d_g == 1), damped(g, 1, d_g > 1)


def _mean_eigenvalues(factors: Sequence[Float[Array, "..."]], ndim: int) -> Float[Array, "*leading k"]:
    """Those of k factors with the same leading axes."""
    diagonals = [diagonal(factor, ndim) for factor in factors]
    sizes = np.array([each.shape[-1] for each in diagonals])
    fill = [[(0, 0)] * ndim + [(0, max(sizes) - size)] for size in sizes]
    rows = jnp.stack([jnp.pad(each, pad) for each, pad in zip(diagonals, fill, strict=True)], axis=-2)
    return jnp.sum(rows, axis=-1) / sizes.astype(rows.dtype)
