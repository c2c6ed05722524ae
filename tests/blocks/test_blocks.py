"""The algebra of blocks (exact case 14): everything a block can be asked, against its dense matrix, in float64.

The dense matrices are made here, from random gradients or factors; that statistics are what they should be is the
subject of other files.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from cases import grid
from helpers import assert_close

import kfax
from kfax._math import linalg


N = 40
SHAPES = {
    "plain": kfax.MatrixShape((), 3, 4, True, jnp.dtype(float)),
    "column": kfax.MatrixShape((), 3, 1, False, jnp.dtype(float)),
    "row": kfax.MatrixShape((), 1, 4, True, jnp.dtype(float)),
    "stacked": kfax.MatrixShape((2,), 3, 2, True, jnp.dtype(float)),
    "grouped": kfax.MatrixShape((2,), 2, 2, True, jnp.dtype(float), groups=(3,)),
}
INVERSIONS = {"cholesky": kfax.Cholesky(), "eigh": kfax.Eigh()}
EXPONENTS = (-1, -0.5, 0.5, 1, 2, 0.3)


def random_gradients(shape):
    return jax.random.normal(jax.random.key(0), (*shape.leading, N, shape.d_g, shape.d_a))


def positions(shape):
    """The place of every number of V in V raveled."""
    dims = (*shape.leading, shape.d_g, shape.d_a)
    return jnp.arange(shape.num_parameters).reshape(dims)


def fill(shape, index, blocks):
    """Dense blocks, placed at the rows `index` of a matrix of zeros."""
    matrix = jnp.zeros((shape.num_parameters, shape.num_parameters))
    for rows, block in zip(index, blocks, strict=True):
        matrix = matrix.at[rows[:, None], rows[None, :]].set(block)
    return matrix


def exact(shape, gradients):
    """The second moment of the gradients of each layer of a stack, nothing between layers."""
    by_example = jnp.moveaxis(gradients, len(shape.leading), 0).reshape(N, -1)
    matrix = by_example.T @ by_example / N
    return jnp.where(_same(shape, len(shape.stack)), matrix, 0)


def _same(shape, axes):
    """Whether two numbers of V agree in their indices along the first `axes` axes."""
    index = positions(shape)
    first = index.reshape(*index.shape[:axes], -1)[..., :1]
    groups = jnp.broadcast_to(first, (*index.shape[:axes], index.size // first.size)).reshape(-1)
    return groups[:, None] == groups[None, :]


def weighted_traces(shape, matrix, left, right):
    """The sums of the blocks of either kind, weighted by `right` and `left`, `(d_g, d_g)` and `(d_a, d_a)`, for each
    matrix of a stack. Of weights that are diagonal, so is the other result.
    """
    blocks = [matrix[i][:, i] for i in positions(shape).reshape(-1, shape.d_g * shape.d_a)]
    blocks = jnp.stack(blocks).reshape(*shape.leading, *2 * (shape.d_g, shape.d_a))
    return jnp.einsum("...iajb,...ab->...ij", blocks, right), jnp.einsum("...iajb,...ij->...ab", blocks, left)


def gradient_case(block, shape):
    gradients = random_gradients(shape)
    inputs, moment = (), block.second_moment(shape, gradients, None)
    statistics = block.statistics(shape, inputs, moment, None, N, None)
    matrix, ndim = exact(shape, gradients), len(shape.leading)
    if isinstance(block, kfax.Diagonal):
        matrix = jnp.diag(jnp.diag(matrix))
    elif isinstance(block, kfax.UnitWise):
        matrix = jnp.where(_same(shape, ndim + 1), matrix, 0)
    elif isinstance(block, kfax.ScaledIdentity):
        means = jnp.mean(jnp.diag(matrix).reshape(*shape.leading, -1), axis=-1, keepdims=True)
        matrix = jnp.diag(jnp.broadcast_to(means, (*shape.leading, shape.d_g * shape.d_a)).reshape(-1))
    return statistics, matrix


def dense(factor, ndim):
    return factor if factor.ndim == ndim + 2 else factor[..., None] * jnp.eye(factor.shape[-1])


def weighted_factors(block, shape):
    """The statistics of gradients with any weights, and the factors `G / s` and A."""
    sides, ndim = [side <= block.max_dim for side in (shape.d_a, shape.d_g)], len(shape.leading)
    any_weights = _factors(jax.random.key(1), shape, *sides)
    given = (None, None) if isinstance(block, kfax.TensorNormal) else (any_weights.g, any_weights.a)
    sizes = zip(given, (shape.d_g, shape.d_a), strict=True)
    weights = [jnp.broadcast_to(jnp.eye(d), (*shape.leading, d, d)) if w is None else dense(w, ndim) for w, d in sizes]
    gradients = random_gradients(shape)
    statistics = block.statistics(shape, (), block.second_moment(shape, gradients, given), None, N, given)
    left, right = weighted_traces(shape, exact(shape, gradients), *weights)
    scale = jnp.einsum("...ij,...ij->...", left, weights[0])[..., None, None]
    kept = [f if is_dense else dense(jnp.diagonal(f, axis1=-2, axis2=-1), ndim)
            for f, is_dense in zip((right, left), sides, strict=True)]  # fmt: skip
    return statistics, kept[1] / scale, kept[0]


def weighted_case(block, shape):
    statistics, left, right = weighted_factors(block, shape)
    return statistics, kron_blocks(shape, left, right)


def _factors(key, shape, a_dense, g_dense):
    def factor(key, size, dense):
        root = jax.random.normal(key, (*shape.leading, size, size + 2))
        square = root @ jnp.swapaxes(root, -1, -2) / size
        return square if dense else jnp.diagonal(square, axis1=-2, axis2=-1)

    k1, k2 = jax.random.split(key)
    r = jnp.full(shape.leading, 2.0)
    return kfax.KroneckerFactors(factor(k1, shape.d_a, a_dense), 1e-2 * factor(k2, shape.d_g, g_dense), r)


def kron_blocks(shape, left, right):
    """`left ⊗ right` for each matrix of a stack."""
    left = dense(left, len(shape.leading)).reshape(-1, shape.d_g, shape.d_g)
    right = dense(right, len(shape.leading)).reshape(-1, shape.d_a, shape.d_a)
    index = positions(shape).reshape(len(left), -1)
    return fill(shape, index, [jnp.kron(x, y) for x, y in zip(left, right, strict=True)])


def corrected_case(block, shape):
    """Any eigenvalues, in any basis."""
    factors = _factors(jax.random.key(1), shape, shape.d_a <= block.max_dim, shape.d_g <= block.max_dim)
    pair = (factors.g, factors.a)
    u_g, u_a = (jnp.linalg.eigh(f)[1] if f.ndim == len(shape.leading) + 2 else None for f in pair)
    values = jnp.square(jax.random.normal(jax.random.key(2), (*shape.leading, shape.d_g, shape.d_a))) + 0.01
    statistics = kfax.CorrectedFactors(factors, u_g, u_a, values)
    identities = [jnp.broadcast_to(jnp.eye(d), (*shape.leading, d, d)) for d in (shape.d_g, shape.d_a)]
    left, right = (eye if basis is None else basis for basis, eye in zip((u_g, u_a), identities, strict=True))
    vectors = kron_blocks(shape, left, right)
    return statistics, (vectors * values.reshape(-1)) @ vectors.T


def kronecker_case(block, shape):
    a_dense, g_dense = shape.d_a <= block.max_dim, shape.d_g <= block.max_dim
    direct = _factors(jax.random.key(1), shape, a_dense, g_dense)
    matrix = kron_blocks(shape, direct.g / 2, direct.a)
    if isinstance(block, kfax.KroneckerFactored):
        return direct, matrix
    swapped = _factors(jax.random.key(2), shape, a_dense, g_dense)
    reverse = kfax.KroneckerFactors(swapped.g, swapped.a, swapped.positions)
    return (direct, reverse), matrix + kron_blocks(shape, reverse.a, reverse.g / 2)


WEIGHTED = (kfax.TensorNormal, kfax.FrobeniusOptimal, kfax.KLOptimal)
BLOCKS = {
    "identity": kfax.ScaledIdentity(),
    "diagonal": kfax.Diagonal(),
    **{f"unitwise-{n}": kfax.UnitWise(inversion=i) for n, i in INVERSIONS.items()},
    **{f"full-{n}": kfax.Full(inversion=i) for n, i in INVERSIONS.items()},
    **{f"tensor-normal-{n}": kfax.TensorNormal(inversion=i) for n, i in INVERSIONS.items()},
    "tensor-normal-3": kfax.TensorNormal(max_dim=3),
    **{f"frobenius-{n}": kfax.FrobeniusOptimal(inversion=i) for n, i in INVERSIONS.items()},
    "kl-cholesky": kfax.KLOptimal(),
    "kl-3-eigh": kfax.KLOptimal(max_dim=3, inversion=kfax.Eigh()),
    "kl-0-cholesky": kfax.KLOptimal(max_dim=0),
    **{f"kronecker-{n}": kfax.KroneckerFactored(inversion=i) for n, i in INVERSIONS.items()},
    **{f"kronecker-3-{n}": kfax.KroneckerFactored(inversion=i, max_dim=3) for n, i in INVERSIONS.items()},
    **{f"kronecker-0-{n}": kfax.KroneckerFactored(inversion=i, max_dim=0) for n, i in INVERSIONS.items()},
    **{f"corrected-{d}": kfax.EigenvalueCorrected(max_dim=d) for d in (100, 3, 0)},
    "sum": kfax.KroneckerSum(),
    "sum-3": kfax.KroneckerSum(max_dim=3),
}


def make(name, shape) -> tuple[kfax.Block, kfax.MatrixShape, Any, jax.Array]:
    block, dims = BLOCKS[name], SHAPES[shape]
    case = gradient_case if isinstance(block, kfax.GradientBlock) else kronecker_case
    case = corrected_case if isinstance(block, kfax.EigenvalueCorrected) else case
    case = weighted_case if isinstance(block, WEIGHTED) else case
    statistics, matrix = case(block, dims)
    return block, dims, statistics, matrix


def vector_like(shape, seed=5):
    return jax.random.normal(jax.random.key(seed), (*shape.leading, shape.d_g, shape.d_a))


def refreshed(block, shape, statistics, damping):
    damping = jnp.asarray(damping)
    function = linalg.eigh if block.diagonalizes else linalg.psd_inverse
    results = tuple(function(m) for m in block.matrices(shape, statistics, damping))
    return block.refresh(shape, statistics, damping, results)


def as_matrix(function, shape):
    columns = jax.vmap(lambda e: function(e.reshape(positions(shape).shape)).reshape(-1))
    return columns(jnp.eye(shape.num_parameters)).T


@grid(thin=3, name=BLOCKS, shape=SHAPES)
def test_products_diagonal_and_dense(name, shape):
    block, shape, statistics, matrix = make(name, shape)
    assert_close(as_matrix(lambda v: block.multiply(shape, statistics, v), shape), matrix)
    assert_close(block.diagonal(shape, statistics).reshape(-1), jnp.diag(matrix))
    blocks = block.to_dense(shape, statistics)
    blocks = blocks.reshape(-1, *blocks.shape[-2:])
    assert_close(fill(shape, positions(shape).reshape(len(blocks), -1), blocks), matrix)


@grid(thin=3, name=BLOCKS, shape=SHAPES)
def test_any_power_from_one_eigendecomposition(name, shape):
    block, shape, statistics, matrix = make(name, shape)
    spectrum = block.spectrum(shape, statistics, tuple(map(linalg.eigh, block.factors(shape, statistics))))
    values, vectors = jnp.linalg.eigh(matrix)
    assert_close(jnp.sort(spectrum.values.reshape(-1)), values)
    for damping in (0.01, 3.0):
        assert_close(spectrum.logdet(damping), jnp.linalg.slogdet(matrix + damping * jnp.eye(len(matrix)))[1])
        for exponent in EXPONENTS:
            expected = (vectors * (values + damping) ** exponent) @ vectors.T
            power = as_matrix(lambda v, p=exponent, d=damping: spectrum.power(v, p, d), shape)
            # Eigenvalues down to 1e-3 of the largest, to the power of -1, lose three digits.
            assert_close(power, expected, tolerance=1e-9)
            assert_close(spectrum.diagonal(exponent, damping).reshape(-1), jnp.diag(expected), tolerance=1e-9)


@grid(thin=3, name=BLOCKS, shape=SHAPES)
def test_axes_are_the_block_or_its_partial_traces(name, shape):
    block, shape, statistics, matrix = make(name, shape)
    axes = block.axes(shape, statistics)
    if isinstance(block, kfax.EigenvalueCorrected):
        factors = statistics.factors
        matrix = kron_blocks(shape, factors.g / 2, factors.a)
    if not isinstance(block, kfax.KroneckerSum):
        assert_close(as_matrix(lambda v: axes.multiply(v), shape), matrix)
        return
    index = positions(shape).reshape(-1, shape.d_g * shape.d_a)
    whole = matrix[index[:, :, None], index[:, None, :]].reshape(*shape.leading, *(shape.d_g, shape.d_a) * 2)
    ndim = len(shape.leading)
    assert_close(dense(axes.left, ndim), jnp.einsum("...iaja->...ij", whole))
    assert_close(dense(axes.right, ndim), jnp.einsum("...iaib->...ab", whole))


@grid(thin=3, name=BLOCKS, shape=SHAPES)
def test_inverse_of_the_damped_block(name, shape):
    block, shape, statistics, matrix = make(name, shape)
    eye = jnp.eye(shape.num_parameters)
    for damping, other in itertools.permutations((0.02, 1.0)):
        inverse = refreshed(block, shape, statistics, damping)
        found = as_matrix(inverse.solve, shape)
        assert_close(found, jnp.linalg.inv(damped_matrix(block, shape, statistics, matrix, damping)), tolerance=1e-9)
        changed = as_matrix(block.redamp(shape, statistics, inverse, jnp.asarray(other)).solve, shape)
        if block.diagonalizes and not isinstance(block, kfax.KroneckerSum):
            assert_close(changed, jnp.linalg.inv(matrix + other * eye), tolerance=1e-9)
        else:  # takes effect with the next refresh
            assert_close(changed, found)


def damped_matrix(block, shape, statistics, matrix, damping):
    """With λI added, in factored form where the block says so."""
    if isinstance(block, kfax.KroneckerSum):
        direct, reverse = statistics
        term = factored(shape, reverse.a, reverse.g / 2, damping)
        return kron_blocks(shape, direct.g / 2, direct.a) + term
    if isinstance(block, kfax.KroneckerFactored) and not block.diagonalizes:
        return factored(shape, statistics.g / 2, statistics.a, damping)
    if isinstance(block, WEIGHTED) and not block.diagonalizes:
        _, left, right = weighted_factors(block, shape)
        return factored(shape, left, right, damping)
    return matrix + damping * jnp.eye(len(matrix))


def factored(shape, left, right, damping):
    """Martens & Grosse 2015, section 6.3; exact where one side has a single entry."""
    if 1 in (shape.d_g, shape.d_a):
        return kron_blocks(shape, left, right) + damping * jnp.eye(shape.num_parameters)
    ndim = len(shape.leading)

    def damped(factor, by):
        size, by = factor.shape[-1], by[(..., *[None] * (factor.ndim - ndim))]
        return factor + by * (jnp.eye(size) if factor.ndim == ndim + 2 else 1)

    def mean(factor):
        return jnp.mean(jnp.diagonal(factor, axis1=-2, axis2=-1) if factor.ndim == ndim + 2 else factor, axis=-1)

    pi = jnp.sqrt(mean(right) / mean(left))
    return kron_blocks(shape, damped(left, jnp.sqrt(damping) / pi), damped(right, jnp.sqrt(damping) * pi))


@grid(thin=3, name=BLOCKS, shape=SHAPES)
def test_the_first_inverse_is_the_identity(name, shape):
    block, shape, statistics, _ = make(name, shape)
    state = block.init(shape)
    v = vector_like(shape)
    assert_close(state.inverse.solve(v), v)
    assert jax.tree.structure(state.statistics) == jax.tree.structure(statistics)
    assert [x.shape for x in jax.tree.leaves(state.statistics)] == [x.shape for x in jax.tree.leaves(statistics)]
    again = jax.eval_shape(lambda: refreshed(block, shape, statistics, 0.1))
    assert jax.tree.structure(again) == jax.tree.structure(state.inverse)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (again, state.inverse)]
    assert shapes[0] == shapes[1]


@grid(name=BLOCKS)
def test_half_power_draws_with_the_inverse_as_covariance(name):
    block, shape, statistics, matrix = make(name, "plain")
    spectrum = block.spectrum(shape, statistics, tuple(map(linalg.eigh, block.factors(shape, statistics))))
    root = as_matrix(lambda v: spectrum.power(v, -0.5, 0.1), shape)
    assert_close(root @ root.T, jnp.linalg.inv(matrix + 0.1 * jnp.eye(len(matrix))), tolerance=1e-9)


@grid(name=BLOCKS)
def test_costs_are_positive_and_grow(name):
    block = BLOCKS[name]
    small, large = SHAPES["plain"], kfax.MatrixShape((), 30, 40, True, jnp.dtype(float))
    if "-3" in name:  # a factor that is dense in the small one is diagonal in the large one
        small = kfax.MatrixShape((), 10, 12, True, jnp.dtype(float))
    for cost in (block.update_flops, block.refresh_flops, block.solve_flops):
        assert 0 < cost(small) < cost(large)


def test_descriptions_tell_what_is_not_default():
    assert str(kfax.Full()) == "Full()"
    assert str(kfax.Diagonal()) == "Diagonal()"
    assert str(kfax.Full(inversion=kfax.Eigh())) == "Full(Eigh())"
    assert str(kfax.KroneckerFactored(kfax.Reduce(), inversion=kfax.Eigh())) == "KroneckerFactored(Reduce(), Eigh())"
