"""Bases of eigenvalue-corrected blocks: when they change, what becomes of the eigenvalues, and what acts when."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import update
from cases import make_case
from helpers import assert_close, flat, mlp, parameters
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


BLOCK = kfax.EigenvalueCorrected()
ESTIMATOR = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")


def corrected_case(model="mlp", **options):
    case = make_case(model, "softmax", **options)
    return dataclasses.replace(case, model=kfax.set_block(case.model, lambda m: m, BLOCK))


CASE = corrected_case()
P = parameters(CASE.model)


@eqx.filter_jit
def updated(state, batch):
    return ESTIMATOR.update(state, CASE.loss_fn, CASE.model, batch)


@eqx.filter_jit
def refreshed(state, damping):
    return ESTIMATOR.refresh(state, P, damping)


def batch_of(seed):
    x = jax.random.normal(jax.random.key(seed), CASE.x.shape)
    return x, CASE.y


def traces(state):
    return {key: jnp.sum(statistics.values) for key, statistics in state.average.value.items()}


def bases(state):
    return {key: (statistics.left, statistics.right) for key, statistics in state.average.value.items()}


def test_a_refresh_makes_a_basis_of_the_factors_eigenvectors_and_keeps_traces():
    state = updated(updated(ESTIMATOR.init(CASE.model), CASE.batch), batch_of(1))
    for left, right in bases(state).values():  # before the first refresh
        assert jnp.array_equal(left, jnp.eye(len(left))) and jnp.array_equal(right, jnp.eye(len(right)))
    new = refreshed(state, 0.1)
    assert_close(traces(new), traces(state))
    for key, statistics in new.average.value.items():
        assert_close(statistics.factors, state.average.value[key].factors)
        for vectors, factor in ((statistics.left, statistics.factors.g), (statistics.right, statistics.factors.a)):
            rotated = vectors.T @ factor @ vectors
            assert_close(vectors.T @ vectors, jnp.eye(len(factor)))
            assert_close(rotated, jnp.diag(jnp.diag(rotated)))
    # A basis is bit for bit that of the last refresh.
    later = updated(updated(new, CASE.batch), batch_of(2))
    assert all(map(jnp.array_equal, jax.tree.leaves(bases(later)), jax.tree.leaves(bases(new))))


def test_a_basis_that_stays_has_the_same_eigenvalues():
    state = refreshed(updated(ESTIMATOR.init(CASE.model), CASE.batch), 0.1)
    state = updated(ESTIMATOR.restart(state, P), CASE.batch)
    again = refreshed(state, 0.1)
    for key, statistics in again.average.value.items():
        assert_close(statistics.values, state.average.value[key].values, tolerance=1e-8)


def test_present_eigenvalues_act_without_a_refresh():
    state = refreshed(updated(ESTIMATOR.init(CASE.model), CASE.batch), 0.1)
    v = jax.tree.map(jnp.cos, P)
    matrix = ESTIMATOR.to_dense(state, P)
    assert_close(flat(ESTIMATOR.solve(state, v)), jnp.linalg.solve(matrix + 0.1 * jnp.eye(len(matrix)), flat(v)))
    later = updated(state, batch_of(1))
    assert_close(ESTIMATOR.solve(later, v), ESTIMATOR.solve(state, v))  # as of the last refresh
    matrix = ESTIMATOR.to_dense(later, P)
    for damping in (0.1, 0.5):
        expected = jnp.linalg.solve(matrix + damping * jnp.eye(len(matrix)), flat(v))
        assert_close(flat(ESTIMATOR.solve(ESTIMATOR.redamp(later, P, damping), v)), expected)
        assert_close(flat(ESTIMATOR.power(later, v, -1, damping)), expected)


def test_nothing_moves_before_the_first_refresh():
    state = updated(ESTIMATOR.init(CASE.model), CASE.batch)
    for each in (ESTIMATOR.init(CASE.model), state):
        assert_close(ESTIMATOR.solve(ESTIMATOR.redamp(each, P, 0.1), P), jax.tree.map(jnp.zeros_like, P))
    assert_close(ESTIMATOR.eigenvalues(ESTIMATOR.init(CASE.model), P), jnp.zeros(flat(P).size))


def test_what_is_not_finite_leaves_bases_and_eigenvalues():
    state = refreshed(updated(ESTIMATOR.init(CASE.model), CASE.batch), 0.1)
    spoilt = eqx.tree_at(lambda s: s.average.value[".layers[0]"].factors.a, state, replace_fn=lambda a: a * jnp.nan)
    run = eqx.filter_jit(lambda s: ESTIMATOR.refresh_finite(s, P, jnp.asarray(0.2)))
    kept, failed = run(spoilt)
    assert failed
    for key, before in state.average.value.items():
        is_spoilt = key == ".layers[0]"
        after = kept.average.value[key]
        assert_close(jax.tree.leaves(kept.inverses[key])[-1], jnp.asarray(0.1 if is_spoilt else 0.2))  # λ
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (after.left, after.right, after.values))
        if is_spoilt:
            assert_close((after.left, after.right, after.values), (before.left, before.right, before.values))
    nothing, failed = run(ESTIMATOR.init(CASE.model))
    assert failed and all(not bool(jnp.any(x)) for x in jax.tree.leaves(nothing.average))


def test_batches_however_they_are_split():
    """Within one basis Λ is a mean over examples as all statistics are."""
    mean = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0, example_axis="batch")
    state = refreshed(updated(ESTIMATOR.init(CASE.model), batch_of(1)), 0.1)
    start = ESTIMATOR.restart(state, P)
    whole = update(mean, CASE, state=start)
    parts = start
    for part in (slice(0, 2), slice(2, 6)):
        parts = update(mean, CASE, state=parts, batch=jax.tree.map(lambda x, part=part: x[part], CASE.batch))
    assert_close(parts, whole)


def steps(case, number=7, micro_batches=1, **options):
    """The parameters after some steps, and the state."""
    preconditioner = kfax.Preconditioner(ESTIMATOR, **options)
    settings = {"learning_rate": 0.1, "momentum": 0.5, "damping": 0.1, "micro_batches": micro_batches}
    optimizer = kfax.Optimizer(case.loss_fn, preconditioner=preconditioner, **settings)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    step = eqx.filter_jit(optimizer.step)
    for _ in range(number):
        model, state, info = step(model, state, case.batch)
        assert info.result == kfax.StepResult.successful
    return optimizer, model, state


def test_steps_in_parts_are_those_of_whole_batches():
    _, whole, state = steps(CASE, inverse_update_period=3)
    _, parts, split = steps(CASE, micro_batches=3, inverse_update_period=3)
    assert_close(parameters(parts), parameters(whole), tolerance=1e-8)
    values = [[each.values for each in s.curvature.average.value.values()] for s in (split, state)]
    assert_close(*values, tolerance=1e-8)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_a_step_uses_what_is_known_at_present(exponent):
    """Eigenvalues of this step with the basis of the last refresh; of another power all is as of then."""
    number, period = (5, 4) if exponent == -1 else (5, 1)
    optimizer, model, state = steps(CASE, number, inverse_update_period=period, exponent=exponent)
    new, after, info = eqx.filter_jit(optimizer.step)(model, state, CASE.batch)
    matrix = ESTIMATOR.to_dense(after.curvature, parameters(model))
    gradient = eqx.filter_grad(lambda m: CASE.loss_fn(m, CASE.batch).value())(model)
    values, vectors = jnp.linalg.eigh(matrix + 0.1 * jnp.eye(len(matrix)))
    direction = (vectors * values**exponent) @ vectors.T @ flat(parameters(gradient))
    momentum = flat(parameters(new)) - flat(parameters(model)) + info.learning_rate * direction
    assert_close(momentum, 0.5 * flat(state.velocity), tolerance=1e-9)
    for key, (left, _) in bases(after.curvature).items():
        assert not jnp.array_equal(left, jnp.eye(len(left))), key


def test_staggered_refreshes_renew_each_basis_once_in_a_period():
    *_, state = steps(CASE, 3, inverse_update_period=kfax.Staggered(2))
    before = bases(state.curvature)
    *_, state = steps(CASE, 4, inverse_update_period=kfax.Staggered(2))
    changed = {key for key, pair in bases(state.curvature).items() if not jnp.array_equal(pair[0], before[key][0])}
    assert changed and changed != set(before)


def test_an_ensemble_is_its_members():
    keys = jax.random.split(jax.random.key(5), 2)
    models = [kfax.tag(mlp(key, (8, 4, 3)), block=BLOCK) for key in keys]
    stacked = eqx.filter_vmap(lambda key: kfax.tag(mlp(key, (8, 4, 3)), block=BLOCK))(keys)
    optimizer = kfax.Optimizer(CASE.loss_fn, learning_rate=0.1, momentum=0.5, damping=0.1,
                               preconditioner=kfax.Preconditioner(ESTIMATOR, inverse_update_period=2))  # fmt: skip

    def run(model):
        state = optimizer.init(model, CASE.batch)
        for _ in range(3):
            model, state, _ = optimizer.step(model, state, CASE.batch)
        return parameters(model), state.curvature.average

    found = eqx.filter_jit(eqx.filter_vmap(run))(stacked)
    for i, model in enumerate(models):
        expected = eqx.filter_jit(run)(model)
        member = jax.tree.map(lambda x, i=i: x[i], found)
        assert_close(flat(member[0]), flat(expected[0]), tolerance=1e-8)
        assert_close(jax.tree.leaves(member[1].weight), jax.tree.leaves(expected[1].weight))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    arrays, rest = eqx.partition(CASE.model, eqx.is_array)

    def run(loss_fn, arrays, batch):
        preconditioner = kfax.Preconditioner(ESTIMATOR, inverse_update_period=2)
        fixed = {"learning_rate": 0.1, "momentum": 0.5, "damping": 0.1, "preconditioner": preconditioner}
        optimizer, model = kfax.Optimizer(loss_fn, **fixed), eqx.combine(arrays, rest)
        state = optimizer.init(model, batch)
        for _ in range(3):
            model, state, _ = optimizer.step(model, state, batch)
        # Not bases: of few examples factors are singular, and have many.
        return eqx.filter(model, eqx.is_array), [each.values for each in state.curvature.average.value.values()]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = PartitionSpec(), PartitionSpec("data")
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=everywhere, check_vma=check_vma)
    across = shard(lambda *args: run(kfax.across(CASE.loss_fn, "data"), *args), in_specs=(everywhere, split))
    alone = jax.jit(lambda *args: run(CASE.loss_fn, *args))(arrays, CASE.batch)
    assert_close(jax.jit(across)(arrays, CASE.batch), alone, tolerance=1e-8)


def test_inverses_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    state = updated(ESTIMATOR.init(CASE.model), CASE.batch)
    alone = refreshed(state, 0.1)
    shared = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch", placement=kfax.Placement(mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state, p = jax.tree.map(lambda x: jax.device_put(x, everywhere) if eqx.is_array(x) else x, (state, P))
    found = eqx.filter_jit(shared.refresh)(state, p, 0.1)
    assert_close(jax.device_get(found), jax.device_get(alone))
    placed = kfax.PlacedCurvature(ESTIMATOR, kfax.Placement(mesh))
    with pytest.raises(
        ValueError, match=r"The block of `\.layers\[0\]` is EigenvalueCorrected.*BlockDiagonalCurvature"
    ):
        placed.init(CASE.model)


def test_a_state_of_another_model_is_an_error():
    with pytest.raises(ValueError, match="A vector has the blocks"):
        updated(ESTIMATOR.init(kfax.tag(mlp(jax.random.key(0), (8, 4, 3, 3, 3)))), CASE.batch)


def test_transposed_uses_need_another_block():
    shared = eqx.nn.Shared(
        (eqx.nn.Embedding(5, 3, key=jax.random.key(0)), eqx.nn.Linear(3, 5, use_bias=False, key=jax.random.key(1))),
        where=lambda p: p[1].weight,
        get=lambda p: p[0].weight,
    )
    rows = {row.path: row.block for row in kfax.coverage(kfax.tag(shared, block=BLOCK)).rows}
    assert str(kfax.KroneckerSum()) in rows.values()


def test_costs():
    [row] = kfax.coverage(
        kfax.tag({"layer": eqx.nn.Linear(6, 4, dtype=jnp.float32, key=jax.random.key(0))}, block=BLOCK)
    ).rows
    assert row.block == "EigenvalueCorrected(Expand())"
    # Factors and twice the bases, twice the eigenvalues; R and λ.
    assert row.num_bytes == 4 * (3 * (7**2 + 4**2) + 2 * 4 * 7 + 2)
    assert row.refresh_flops == 9 * (7**3 + 4**3)


def test_dtypes():
    model = kfax.tag(eqx.nn.Linear(3, 2, dtype=jnp.bfloat16, key=jax.random.key(0)), block=BLOCK)
    x, y = np.ones((4, 3)), np.zeros((4, 2))

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(jnp.asarray(batch, jnp.bfloat16)), jnp.asarray(y, jnp.bfloat16))

    state = eqx.filter_jit(lambda m: ESTIMATOR_OF_ROWS.update(ESTIMATOR_OF_ROWS.init(m), loss_fn, m, x))(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.average.value)} == {jnp.dtype(jnp.float32)}
    flat_p, _ = ravel_pytree(kfax.parameters_of(model))
    assert flat_p.dtype == jnp.bfloat16


ESTIMATOR_OF_ROWS = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
