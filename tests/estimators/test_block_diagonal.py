"""The block-diagonal estimator at work: solves, products, averages, and the programs that it compiles to."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
from block_cases import estimate, members, update
from cases import grid, make_case, MODELS
from helpers import assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import kronecker

import kfax
from kfax._layers import to_matrices


@grid(thin=2, model=MODELS)
def test_solve_inverts_the_damped_factors(model):
    case = make_case(model, "softmax")
    estimator, state = estimate(case)
    p = parameters(case.model)
    refreshed = estimator.refresh(state, p, jnp.asarray(0.1))
    vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), p)
    solved = estimator.solve(refreshed, vector)
    for path, factors in state.average.value.items():
        for index in members(case.model, path):
            pick = lambda leaf, i=index: leaf if i is None else leaf[i]  # noqa: E731
            a, g = pick(factors.a), pick(factors.g) / pick(factors.positions)
            pi = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(g) / len(g)))
            damped = kronecker(a + pi * jnp.sqrt(0.1) * jnp.eye(len(a)), g + jnp.sqrt(0.1) / pi * jnp.eye(len(g)))
            before, after = (pick(to_matrices(tree)[path]) for tree in (vector, solved))
            # The condition number of the damped block, some hundreds, multiplies the rounding of its inverse.
            assert_close(damped @ after.reshape(-1), before.reshape(-1), tolerance=1e-9)
    # Neither statistics nor an estimate that was not refreshed change.
    assert eqx.tree_equal(refreshed.average, state.average)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(estimator.solve(state, vector)))


@grid(thin=2, model=MODELS)
def test_multiply_and_eigenvalues_are_those_of_the_dense_matrix(model):
    case = make_case(model, "softmax")
    estimator, state = estimate(case)
    p = parameters(case.model)
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), p))
    matrix = estimator.to_dense(state, p)
    assert_close(ravel_pytree(estimator.multiply(state, unravel(flat)))[0], matrix @ flat)
    eigenvalues = estimator.eigenvalues(state, p)
    # Many eigenvalues are near zero, and are known only to the rounding of the dense eigensolver.
    assert_close(jnp.sort(eigenvalues), jnp.linalg.eigvalsh(matrix), tolerance=1e-9)


def test_statistics_are_averaged_over_updates():
    case = make_case("mlp", "softmax")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
    state, singles = estimator.init(case.model), []
    for i in range(3):
        batch = (case.x + i, case.y)
        state = update(estimator, case, state, batch=batch)
        singles.append(update(estimator, case, batch=batch).average.value)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *singles)
    assert_close(state.average.value, mean)


def test_batch_size_may_change():
    case = make_case("attention", "softmax", sharing=kfax.Reduce())
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.init(case.model)
    for size in (6, 2, 5):
        new = update(estimator, case, state, batch=(case.x[:size], case.y[:size]))
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new


@grid(thin=2, model=["attention", "mlp-scan"], sharing=["Expand", "Reduce"])
def test_jit_scan_and_checkpoint_change_nothing(model, sharing):
    case = make_case(model, "softmax", sharing=getattr(kfax, sharing)())
    _, expected = estimate(case)
    eager = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    state = eager.update(eager.init(case.model), case.loss_fn, case.model, case.batch)
    assert_close(state.average.value, expected.average.value)

    def rematerialized(model, batch):
        return kfax.softmax_cross_entropy(
            jax.vmap(eqx.filter_checkpoint(lambda x: model(x)), axis_name="batch")(batch[0]), batch[1]
        )

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    again = update(estimator, case, loss_fn=rematerialized)
    assert_close(again.average.value, expected.average.value)


def test_bfloat16_computation_keeps_float32_statistics():
    network = mlp(jax.random.key(3), (8, 5, 3), dtype=jnp.float32)
    model = kfax.tag(network)
    x, y = jax.random.normal(jax.random.key(1), (6, 8), jnp.float32), jnp.arange(6) % 3

    def low(model, batch):
        cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, model)
        return kfax.softmax_cross_entropy(jax.vmap(cast)(batch[0].astype(jnp.bfloat16)), batch[1])

    def full(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    found, exact = (update(estimator, None, model=model, batch=(x, y), loss_fn=f).average.value for f in (low, full))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert_close(found, exact, tolerance=0.05)  # bfloat16 has three digits


def test_no_array_of_one_matrix_for_each_example():
    model = kfax.tag(mlp(jax.random.key(3), (11, 13, 17)))
    x, y = jnp.ones((7, 11)), jnp.zeros(7, int)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    def run(x, y):
        return estimator.update(estimator.init(model), loss_fn, model, (x, y)).average.value

    text = jax.jit(run).lower(x, y).compile().as_text() or ""
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f64\[(\d+(?:,\d+)+)\]", text)]
    assert (14, 14) in shapes and (7, 13) in shapes  # the expression finds what it looks for
    assert not [dims for dims in shapes if 7 in dims and len(dims) >= 3 and min(dims) > 1]


def test_program_size_does_not_grow_with_the_number_of_classes():
    def size(classes):
        model = kfax.tag(mlp(jax.random.key(3), (4, 5, classes)))
        estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())

        def loss_fn(model, batch):
            return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

        def run(x, y):
            return estimator.update(estimator.init(model), loss_fn, model, (x, y)).average.value

        return jax.jit(run).lower(jnp.ones((3, 4)), jnp.zeros(3, int)).as_text().count("\n")

    assert size(1000) == size(10)
