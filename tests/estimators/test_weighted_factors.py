"""Weights of blocks that measure with them: when they change, and what they leave as it is."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import exact_blocks, update
from cases import make_case
from helpers import assert_close, mlp, parameters
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


BLOCKS = {
    "frobenius": kfax.FrobeniusOptimal(),
    "kl": kfax.KLOptimal(),
    "kl-eigh": kfax.KLOptimal(inversion=kfax.Eigh()),
}
ESTIMATOR = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")


def weighted_case(block, model="mlp", **options):
    case = make_case(model, "softmax", **options)
    return dataclasses.replace(case, model=kfax.set_block(case.model, lambda m: m, block))


CASES = {name: weighted_case(block) for name, block in BLOCKS.items()}
P = parameters(CASES["kl"].model)


@functools.cache
def compiled(name):
    """An update and a refresh."""
    case, p = CASES[name], parameters(CASES[name].model)
    updated = eqx.filter_jit(lambda state, batch: ESTIMATOR.update(state, case.loss_fn, case.model, batch))
    return updated, eqx.filter_jit(lambda state, damping: ESTIMATOR.refresh(state, p, damping))


def batch_of(seed):
    return jax.random.normal(jax.random.key(seed), CASES["kl"].x.shape), CASES["kl"].y


def weights(state):
    return {key: (kept.left, kept.right) for key, kept in state.average.value.items()}


def traces(state):
    return {key: (kept.a, kept.g, kept.scale) for key, kept in state.average.value.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_refresh_changes_the_weights_and_nothing_else(name):
    (updated, refreshed), case = compiled(name), CASES[name]
    state = updated(updated(ESTIMATOR.init(case.model), case.batch), batch_of(1))
    for left, right in weights(state).values():  # before the first refresh
        assert jnp.array_equal(left, jnp.eye(len(left))) and jnp.array_equal(right, jnp.eye(len(right)))
    new = refreshed(state, 0.1)
    assert_close(traces(new), traces(state))
    assert_close(ESTIMATOR.to_dense(new, P), ESTIMATOR.to_dense(state, P))
    for kept in new.average.value.values():
        g, a, s = kept.g, kept.a, kept.scale
        assert_close((jnp.vdot(kept.left, g), jnp.vdot(kept.right, a)), (s, s))
        if name == "frobenius":
            expected = g * s / jnp.sum(g * g), a * s / jnp.sum(a * a)
        else:
            pi = jnp.sqrt(jnp.trace(a) / len(a) / (jnp.trace(g / s) / len(g)))
            shift = jnp.sqrt(0.1)
            expected = [jnp.linalg.inv(f + by * jnp.eye(len(f))) for f, by in ((g / s, shift / pi), (a, shift * pi))]
            expected = tuple(s * w / jnp.vdot(w, f) for w, f in zip(expected, (g, a), strict=True))
        assert_close((kept.left, kept.right), expected, tolerance=1e-9)
    # Bit for bit those of the last refresh.
    later = updated(updated(new, case.batch), batch_of(2))
    assert all(map(jnp.array_equal, jax.tree.leaves(weights(later)), jax.tree.leaves(weights(new))))


def test_with_a_large_damping_it_remains_that_of_the_partial_traces():
    updated, refreshed = compiled("kl")
    state = refreshed(updated(ESTIMATOR.init(CASES["kl"].model), CASES["kl"].batch), 1e14)
    for left, right in weights(state).values():
        for weight in (left, right):
            assert_close(weight / weight[0, 0], jnp.eye(len(weight)), tolerance=1e-5)


@pytest.mark.parametrize("name", ["frobenius", "kl"])
def test_what_is_a_product_is_found_whatever_the_weights(name):
    """A layer's block of one example; and as a mean of statistics with different weights."""
    case = weighted_case(BLOCKS[name], num_examples=1)
    p = parameters(case.model)

    @eqx.filter_jit
    def run(model, batch):
        states = [ESTIMATOR.update(ESTIMATOR.init(model), case.loss_fn, model, batch)]
        for damping in (0.1, 1e-3):
            refreshed = ESTIMATOR.refresh(states[-1], p, damping)
            states.append(ESTIMATOR.update(refreshed, case.loss_fn, model, batch))
        return [(ESTIMATOR.to_dense(state, p), weights(state)) for state in states]

    found = run(case.model, case.batch)
    for matrix, _ in found:
        assert_close(matrix, exact_blocks(case))
    for before, after in zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(found[2][1]), strict=True):
        assert jnp.max(jnp.abs(after - before)) > 0.1


def test_batches_however_they_are_split():
    """Between two refreshes statistics are means over examples as all are."""
    case, (updated, refreshed) = CASES["kl"], compiled("kl")
    mean = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0, example_axis="batch")
    start = ESTIMATOR.restart(refreshed(updated(ESTIMATOR.init(case.model), batch_of(1)), 0.1), P)
    assert start.average.weight == 0 and not any(jnp.any(x) for x in jax.tree.leaves(traces(start)))
    parts = start
    for part in (slice(0, 2), slice(2, 6)):
        parts = update(mean, case, state=parts, batch=jax.tree.map(lambda x, part=part: x[part], case.batch))
    assert_close(parts, update(mean, case, state=start))


def test_what_is_not_finite_leaves_the_weights():
    case, (updated, refreshed) = CASES["kl"], compiled("kl")
    state = refreshed(updated(ESTIMATOR.init(case.model), case.batch), 0.1)
    spoilt = eqx.tree_at(lambda s: s.average.value[".layers[0]"].a, state, replace_fn=lambda a: a * jnp.nan)
    run = eqx.filter_jit(lambda s: ESTIMATOR.refresh_finite(s, P, jnp.asarray(0.2)))
    kept, failed = run(spoilt)
    assert failed
    for key, before in weights(state).items():
        is_same = all(map(jnp.array_equal, weights(kept)[key], before))
        assert is_same == (key == ".layers[0]")
        assert all(bool(jnp.all(jnp.isfinite(w))) for w in weights(kept)[key])
    nothing, failed = run(ESTIMATOR.init(case.model))
    assert failed and not any(jnp.any(x) for x in jax.tree.leaves(nothing.average))


def steps(case, number, micro_batches=1, **options):
    """The parameters after some steps, and the state."""
    preconditioner = kfax.Preconditioner(ESTIMATOR, **options)
    settings = {"learning_rate": 0.1, "momentum": 0.5, "damping": 0.1, "micro_batches": micro_batches}
    optimizer = kfax.Optimizer(case.loss_fn, preconditioner=preconditioner, **settings)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    step = eqx.filter_jit(optimizer.step)
    for _ in range(number):
        model, state, info = step(model, state, case.batch)
        assert info.result == kfax.StepResult.successful
    return parameters(model), state.curvature


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kl", {"inverse_update_period": 2}),
        pytest.param("frobenius", {"inverse_update_period": kfax.Staggered(2)}, marks=pytest.mark.slow),
        pytest.param("kl", {"inverse_update_period": 2, "exponent": -0.5}, marks=pytest.mark.slow),
    ],
)
def test_steps_in_parts_are_those_of_whole_batches(name, options):
    whole, parts = (steps(CASES[name], 4, number, **options) for number in (1, 3))
    assert_close(parts[0], whole[0], tolerance=1e-8)
    assert_close(traces(parts[1]), traces(whole[1]), tolerance=1e-8)
    for left, _ in weights(whole[1]).values():
        assert jnp.max(jnp.abs(left - jnp.eye(len(left)))) > 1e-3


def test_an_ensemble_is_its_members():
    keys = jax.random.split(jax.random.key(5), 2)

    def run(key):
        model = kfax.tag(mlp(key, (8, 4, 3)), block=BLOCKS["kl"])
        p = parameters(model)
        state = ESTIMATOR.update(ESTIMATOR.init(model), CASES["kl"].loss_fn, model, CASES["kl"].batch)
        return ESTIMATOR.update(ESTIMATOR.refresh(state, p, 0.1), CASES["kl"].loss_fn, model, batch_of(1)).average

    found = eqx.filter_jit(eqx.filter_vmap(run))(keys)
    for i, key in enumerate(keys):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), eqx.filter_jit(run)(key), tolerance=1e-8)


def test_on_several_devices():
    case, (updated, refreshed) = CASES["kl"], compiled("kl")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    state = updated(ESTIMATOR.init(case.model), case.batch)
    shared = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch", placement=kfax.Placement(mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed, p = jax.tree.map(lambda x: jax.device_put(x, everywhere) if eqx.is_array(x) else x, (state, P))
    assert_close(jax.device_get(eqx.filter_jit(shared.refresh)(placed, p, 0.1)), jax.device_get(refreshed(state, 0.1)))
    alone = kfax.PlacedCurvature(ESTIMATOR, kfax.Placement(mesh))
    for block in (kfax.FrobeniusOptimal(), kfax.KLOptimal()):
        name = type(block).__name__
        with pytest.raises(ValueError, match=rf"The block of `\.layers\[0\]` is {name}.*its weights.*TensorNormal"):
            alone.init(kfax.set_block(case.model, lambda m: m, block))


def test_parts_of_a_tensor_normal_curvature_are_kept_on_several_devices():
    case = weighted_case(kfax.TensorNormal())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    placed = kfax.PlacedCurvature(ESTIMATOR, kfax.Placement(mesh))
    run = eqx.filter_jit(lambda e: e.update(e.init(case.model), case.loss_fn, case.model, case.batch))
    found, alone = placed.gathered(run(placed)), run(ESTIMATOR)
    assert_close(jax.device_get(found.average), jax.device_get(alone.average))


def test_costs_and_dtypes():
    model = kfax.tag({"layer": eqx.nn.Linear(6, 4, dtype=jnp.bfloat16, key=jax.random.key(0))}, block=BLOCKS["kl"])
    [row] = kfax.coverage(model).rows
    assert row.block == "KLOptimal()"
    # Factors, weights, inverses; s.
    assert row.num_bytes == 4 * (3 * (7**2 + 4**2) + 1)
    assert row.refresh_flops == 2 * (7**3 + 4**3)
    x = np.ones((4, 6))

    def loss_fn(model, batch):
        out = jax.vmap(model["layer"])(jnp.asarray(batch, jnp.bfloat16))
        return kfax.squared_error(out, jnp.zeros((4, 4), jnp.bfloat16))

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = eqx.filter_jit(lambda m: estimator.update(estimator.init(m), loss_fn, m, x))(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.average.value)} == {jnp.dtype(jnp.float32)}


def test_max_dim_is_checked():
    for block in (kfax.TensorNormal, kfax.FrobeniusOptimal, kfax.KLOptimal):
        with pytest.raises(ValueError, match="`max_dim` must be a whole number, at least 0, got -1"):
            block(max_dim=-1)
