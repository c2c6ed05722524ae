"""Solves with the matrix of a data set that comes in batches, and scores of examples that do, against dense ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from helpers import assert_close, parameters
from influence_cases import BLOCKS, gradients_of, is_kept, matrix, stacked, WEIGHTS
from reference import ggn

import kfax


PARTS = (slice(0, 1), slice(1, 4), slice(4, 6))
CASE = make_case("mlp", "softmax")


def loss_fn(model, batch):
    return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1], weights=batch[2])


def batches(parts):
    return [jax.tree.map(lambda x, part=part: x[part], (*CASE.batch, WEIGHTS)) for part in parts]


@eqx.filter_jit
def curvature(model, batches, damping):
    state = BLOCKS.init(model)
    for batch in batches:
        state = BLOCKS.update(state, loss_fn, model, batch)
    return BLOCKS.refresh(state, parameters(model), damping)


@eqx.filter_jit
def iterate(solver, state, model, batches, number, **options):
    def one(state, _):
        for batch in batches:
            state = solver.update(state, loss_fn, model, batch, **options)
        return solver.step(state), None

    return jax.lax.scan(one, state, length=number)[0]


@pytest.mark.parametrize("preconditioner", [None, BLOCKS], ids=["plain", "K-FAC"])
def test_the_matrix_of_a_data_set(preconditioner):
    model, damping, vectors = CASE.model, 0.05, stacked(parameters(CASE.model), 1, 3)
    vectors = jax.tree.map(lambda x: x.at[1].set(0), vectors)
    solver = kfax.ConjugateGradients(preconditioner=preconditioner)
    start = solver.init(curvature(model, batches(PARTS), damping) if preconditioner else None, vectors, damping)
    assert_close(start.relative_residual, jnp.array([1.0, 0.0, 1.0]))
    dense = ggn(CASE.outputs, parameters(model), CASE.one, CASE.y, WEIGHTS)
    dense += damping * jnp.eye(len(dense))
    few = iterate(solver, start, model, batches(PARTS), 4)
    residual = jnp.linalg.norm(matrix(vectors) - matrix(few.solution) @ dense, axis=1)
    scale = jnp.linalg.norm(matrix(vectors), axis=1)
    assert_close(few.relative_residual * scale, residual)
    assert_close(few.solution, iterate(solver, start, model, batches([slice(0, 6)]), 4).solution)
    many = iterate(solver, start, model, batches(PARTS), 40)
    assert jnp.all(many.relative_residual < 1e-9)
    # Rounding errors of as many iterations.
    assert_close(matrix(many.solution), jnp.linalg.solve(dense, matrix(vectors).T).T, tolerance=1e-7)
    assert jnp.all(few.relative_residual[::2] > 1e-3)


def test_frozen_parts_and_the_empirical_fisher():
    frozen = lambda model: model.layers[2]  # noqa: E731
    model, p = CASE.model, kfax.parameters_of(CASE.model, frozen=frozen)
    gradients, vectors = gradients_of(CASE)[:, is_kept(CASE.model, frozen)], stacked(p, 1, 2)
    dense = jnp.einsum("n,ni,nj->ij", WEIGHTS / WEIGHTS.sum(), gradients, gradients)
    solver = kfax.ConjugateGradients(kfax.EmpiricalFisher())
    state = iterate(solver, solver.init(None, vectors, 0.1), model, batches(PARTS), 15, frozen=frozen)
    expected = jnp.linalg.solve(dense + 0.1 * jnp.eye(len(dense)), matrix(vectors).T).T
    assert_close(matrix(state.solution), expected, tolerance=1e-7)  # as above


def test_scores_and_self_influence_of_batches_are_those_of_all():
    """Curvature, gradients, scores: with weights, and batches of one example and of several."""
    model, influence = CASE.model, kfax.Influence(loss_fn, BLOCKS)
    queries = stacked(parameters(model), 2, 4)

    @eqx.filter_jit
    def run(state, batches):
        directions = influence.solve(state, queries)
        scores = [influence.scores(model, batch, directions) for batch in batches]
        own = [influence.self_influence(state, model, batch) for batch in batches]
        return jnp.concatenate(scores, axis=1), jnp.concatenate(own)

    whole = run(curvature(model, batches([slice(0, 6)]), 0.1), batches([slice(0, 6)]))
    assert_close(run(curvature(model, batches(PARTS), 0.1), batches(PARTS)), whole)
    assert_close(whole[0][:, 2], jnp.zeros(4))  # of weight zero


def test_a_step_without_a_pass():
    solver, vectors = kfax.ConjugateGradients(), stacked(parameters(CASE.model), 1, 2)
    with pytest.raises(Exception, match="needs a pass over the data set"):
        jax.block_until_ready(solver.step(solver.init(None, vectors, 0.1)).decrement)
    with pytest.raises(ValueError, match="`vectors` must be a PyTree like"):
        solver.init(None, parameters(CASE.model), 0.1)
    with pytest.raises(ValueError, match="`damping` must not be negative"):
        solver.init(None, vectors, -0.1)
    blocks = kfax.ConjugateGradients(preconditioner=BLOCKS)
    with pytest.raises(ValueError, match="`state` must be that of the preconditioner"):
        blocks.init(None, vectors, 0.1)
    with pytest.raises(ValueError, match="`state` must be that of the preconditioner"):
        solver.init(BLOCKS.init(CASE.model), vectors, 0.1)
