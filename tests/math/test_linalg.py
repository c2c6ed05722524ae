"""Dense linear algebra, running averages and PyTree operations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from reference import kronecker

from kfax._math import linalg, tree
from kfax._math.moving_average import MovingAverage


def psd(key, size, stack=()):
    root = jax.random.normal(key, (*stack, size, size + 2))
    return root @ jnp.swapaxes(root, -1, -2) / size


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_psd_inverse(key, size, stack):
    matrix = psd(key, size, stack)
    assert_close(linalg.psd_inverse(matrix) @ matrix, jnp.broadcast_to(jnp.eye(size), matrix.shape))


def test_psd_inverse_of_an_indefinite_matrix_is_nan():
    assert jnp.all(jnp.isnan(linalg.psd_inverse(jnp.diag(jnp.array([1.0, -1.0])))))


def test_by_size_calls_once_for_each_size_but_on_the_cpu_and_keeps_order(key):
    shapes = [(3, 3), (2, 4, 4), (3, 3), (4, 4), (1, 2, 3, 3)]
    matrices = [psd(jax.random.fold_in(key, i), s[-1], s[:-2]) for i, s in enumerate(shapes)]
    calls = []

    def function(stack):
        calls.append(stack.shape)
        return linalg.psd_inverse(stack)

    results = jax.jit(lambda matrices: linalg.by_size(function, matrices))(matrices)
    assert sorted(calls) == sorted([*shapes, (3, 4, 4), (4, 3, 3)])  # traced for both, lowered for one of them
    assert_close(results, [linalg.psd_inverse(m) for m in matrices])


def diagonalize_both(matrix):
    return linalg.diagonalize_both(matrix, matrix @ matrix, matrix.ndim - 2)


FACTORIZATIONS = [linalg.psd_inverse, linalg.eigh, diagonalize_both]


@pytest.mark.parametrize("function", FACTORIZATIONS)
def test_the_cpu_factorizes_one_by_one_however_it_is_mapped(key, function):
    """Two batched calls at the same time could stop XLA for good: see "One matrix at a time" in the design notes."""
    matrix = psd(key, 4, (2, 3, 2))
    mapped = jax.jit(jax.vmap(jax.vmap(function)))
    text = mapped.trace(matrix).lower(lowering_platforms=("cpu",)).as_text()
    calls = re.findall(r"custom_call @lapack_\w+\(.*num_batch_dims = \"(\d)\"", text)
    assert calls and set(calls) == {"0"}
    single = [function(m) for m in matrix.reshape(-1, 4, 4)]
    expected = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, 2, *x[0].shape), *single)
    assert_close(mapped(matrix), expected)
    assert_close(function(matrix), expected)


@pytest.mark.parametrize("function", FACTORIZATIONS)
def test_accelerators_factorize_in_batches(function):
    matrix = jax.ShapeDtypeStruct((2, 3, 4, 4), jnp.float32)
    for platform in ("cuda", "tpu"):
        text = jax.export.export(jax.jit(jax.vmap(function)), platforms=[platform])(matrix).mlir_module()
        assert "stablehlo.while" not in text and "6x4x4xf32" in text


@pytest.mark.parametrize("order", [1, 2])
def test_factorizations_have_derivatives(key, order):
    matrix, change, weights = psd(key, 4, (3,)), psd(jax.random.key(1), 4, (3,)), psd(jax.random.key(2), 4, (3,))

    def by_both(m):
        k, s = linalg.diagonalize_both(m, jnp.eye(4) + m @ m, 1)
        return k @ (s[..., None] * jnp.swapaxes(k, -1, -2))

    def by_eigh(m):
        values, vectors = linalg.eigh(m)
        return vectors @ (jnp.exp(-values)[..., None] * jnp.swapaxes(vectors, -1, -2))

    def derivative(function):
        along = lambda t: jnp.sum(weights * function(matrix + t * change))  # noqa: E731
        for _ in range(order):
            along = jax.grad(along)
        return along(0.1)

    assert_close(derivative(linalg.psd_inverse), derivative(jnp.linalg.inv))
    assert_close(derivative(by_eigh), derivative(lambda m: jax.vmap(jax.scipy.linalg.expm)(-m)))
    # Of K and s with Kᵀ B K = I and Kᵀ M K = diag(s): K s Kᵀ = B⁻¹ M B⁻¹.
    inverse = lambda m: jnp.linalg.inv(jnp.eye(4) + m @ m)  # noqa: E731
    assert_close(derivative(by_both), derivative(lambda m: inverse(m) @ m @ inverse(m)))


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_factored_damping_is_the_formula_of_the_paper(key, damping):
    a, g = psd(key, 5), 1e-3 * psd(jax.random.fold_in(key, 1), 3)
    pi = jnp.sqrt((jnp.trace(a) / 5) / (jnp.trace(g) / 3))
    gamma = jnp.sqrt(damping)
    expected = kronecker(a + pi * gamma * jnp.eye(5), g + gamma / pi * jnp.eye(3))
    damped_a, damped_g = linalg.damp_factors(a, g, jnp.asarray(damping), 0)
    assert_close(kronecker(damped_a, damped_g), expected)
    assert_close(jnp.trace(damped_a) / 5, jnp.trace(damped_g) / 3)


@pytest.mark.parametrize(("d_a", "d_g"), [(4, 1), (1, 4), (1, 1)])
def test_damping_is_exact_beside_a_one_by_one_factor(key, d_a, d_g):
    a, g = psd(key, d_a), psd(jax.random.fold_in(key, 1), d_g)
    damped = kronecker(*linalg.damp_factors(a, g, jnp.asarray(0.3), 0))
    assert_close(damped, kronecker(a, g) + 0.3 * jnp.eye(d_a * d_g))


@pytest.mark.parametrize("d_g", [1, 3])
def test_a_vanished_factor_leaves_the_damping(key, d_g):
    for a, g in [(psd(key, 4), jnp.zeros((d_g, d_g))), (jnp.zeros((4, 4)), psd(key, d_g))]:
        assert_close(kronecker(*linalg.damp_factors(a, g, jnp.asarray(0.3), 0)), 0.3 * jnp.eye(4 * d_g))


def test_stacked_factors_are_damped_one_by_one(key):
    a, g = psd(key, 4, (3,)), psd(jax.random.fold_in(key, 1), 2, (3,))
    g = g.at[1].set(0)
    stacked = linalg.damp_factors(a, g, jnp.asarray(0.1), 1)
    single = [linalg.damp_factors(a[i], g[i], jnp.asarray(0.1), 0) for i in range(3)]
    assert_close(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *single))


@pytest.mark.parametrize("decay", [0.5, 0.95, 1.0])
def test_moving_average_is_the_weighted_mean(decay):
    values = [jnp.array([1.0, -2.0]), jnp.array([4.0, 0.5]), jnp.array([-3.0, 7.0])]
    average = MovingAverage.zeros({"x": values[0]})
    for k, value in enumerate(values):
        average = average.update({"x": value}, jnp.asarray(decay))
        weights = jnp.asarray([decay ** (k - i) for i in range(k + 1)])
        expected = jnp.einsum("i,ij->j", weights, jnp.stack(values[: k + 1])) / weights.sum()
        assert_close(average.value, {"x": expected}, tolerance=1e-6)  # the weight is kept in float32


def test_tree_operations():
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0, jnp.float32), "c": None}
    y = {"a": jnp.array([-1.0, 0.5]), "b": jnp.array(2.0, jnp.float32), "c": None}
    assert_close(tree.dot(x, y), jnp.asarray(6.0))
    assert_close(tree.norm(x), jnp.sqrt(14.0))
    combined = tree.combine((2, jnp.asarray(-1.0)), (x, y))
    assert_close(combined, {"a": jnp.array([3.0, 3.5]), "b": jnp.array(4.0, jnp.float32), "c": None})


def test_inner_products_are_those_of_single_leaves():
    shapes = {"matrix": (3, 4), "vector": (5,), "number": (), "images": (2, 3, 4)}
    rng, pairs = np.random.default_rng(0), [(0, 0), (0, 2), (1, 2)]
    draws = [{k: jnp.asarray(rng.normal(size=shape)) for k, shape in shapes.items()} for _ in range(3)]
    products, sizes = tree.inner_products(draws, pairs, measured=[0, 2])
    expected = [[jnp.sum(draws[i][k] * draws[j][k]) for i, j in pairs] for k in sorted(shapes)]
    assert_close(products, jnp.array(expected))
    assert_close(sizes, jnp.array([[jnp.abs(draws[i][k]).max() for i in (0, 2)] for k in sorted(shapes)]))
    draws[1]["vector"] = draws[1]["vector"].at[2].set(jnp.nan)
    assert jnp.isnan(tree.inner_products(draws, [(0, 0)], measured=range(3))[1]).any(0).tolist() == [False, True, False]


def test_cond_leaves_out_what_both_branches_hand_on():
    kept, changed = jnp.ones(3), jnp.ones(2)

    def choose(flag, kept, changed):
        return tree.cond(flag, lambda: {"k": kept, "c": 2 * changed}, lambda: {"k": kept, "c": changed})

    [equation] = [e for e in jax.make_jaxpr(choose)(True, kept, changed).eqns if e.primitive.name == "cond"]
    assert [v.aval.shape for v in equation.outvars] == [(2,)]
    assert_close(jax.jit(choose)(False, kept, changed), {"k": kept, "c": changed})


def test_tie_maps_over_what_the_others_are_mapped_over(key):
    def mapped(to):
        def inner(to):
            out = tree.tie(jnp.zeros(2), to)
            return out, jax.vmap(lambda x: x)(jnp.zeros(1))

        return jax.make_jaxpr(lambda t: jax.vmap(lambda z: inner(z)[0])(t))(to).out_avals[0].shape

    for to in (jnp.zeros((4, 3)), jnp.zeros((4, 0)), jnp.arange(4), jax.random.split(key, 4)):
        assert mapped(to) == (4, 2)
    assert_close(tree.tie(jnp.ones(2), (jnp.full(3, jnp.nan), None, "text")), jnp.ones(2))


def test_cond_is_an_if_where_the_predicate_is_known():
    calls = []
    assert tree.cond(jnp.asarray(True), lambda: 1, lambda: calls.append(0)) == 1
    assert not calls
    assert jax.jit(lambda p: tree.cond(p, lambda: jnp.array(1), lambda: jnp.array(2)))(False) == 2
