"""The parts of a step: when inverses change, values given to it, L2, frozen parameters, keys, dtypes, files, losses."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import make_case
from helpers import assert_close, parameters, random
from optimizer_cases import adaptive, begin, exact_ggn, fixed, KINDS, run

import kfax


def test_inverses_change_only_when_due():
    case = make_case("mlp", "softmax")
    optimizer = fixed(case.loss_fn, preconditioner=exact_ggn(curvature_update_period=2))
    model, state = case.model, begin(optimizer, case)
    for i in range(7):
        previous = state.curvature
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        assert bool(eqx.tree_equal(state.curvature.inverses, previous.inverses)) == (i % 3 != 0)
        assert bool(eqx.tree_equal(state.curvature.average, previous.average)) == (i % 2 != 0)


def test_values_given_at_the_step_win():
    case = make_case("mlp", "softmax")
    everywhere = {"learning_rate": 0.05, "momentum": 0.3, "damping": 2.0}
    expected = run(fixed(case.loss_fn, **everywhere), case, steps=3)[0]
    for kind in ("adaptive", "scheduled"):
        optimizer = KINDS[kind](case.loss_fn)
        model, state = case.model, begin(optimizer, case)
        for _ in range(3):
            model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch, **everywhere)
            assert_close(info.learning_rate, jnp.asarray(0.05))
        assert_close(parameters(model), parameters(expected))


def test_schedules_see_the_step():
    case = make_case("mlp", "softmax")
    _, _, infos = run(KINDS["scheduled"](case.loss_fn), case)
    steps = jnp.arange(7)
    # optax computes its schedules partly in float32.
    assert_close(infos.learning_rate, jax.vmap(optax.cosine_decay_schedule(0.1, 10))(steps), tolerance=1e-6)
    assert_close(infos.momentum, jax.vmap(optax.linear_schedule(0.0, 0.9, 5))(steps), tolerance=1e-6)
    assert_close(infos.damping, jax.vmap(optax.exponential_decay(1.0, 3, 0.5))(steps), tolerance=1e-6)


def test_l2_touches_what_it_is_told_to():
    case = make_case("mlp", "softmax")
    where = lambda m: [layer.weight for layer in m.layers if isinstance(layer, kfax.TaggedLinear)]  # noqa: E731
    optimizer = fixed(case.loss_fn, l2=kfax.L2(0.5, where))
    model, state = case.model, begin(optimizer, case)
    _, _, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
    plain = case.loss_fn(model, case.batch).value()
    weights = sum(jnp.sum(leaf**2) for leaf in where(model))
    assert_close(info.loss, plain + 0.25 * weights)


def test_frozen_parameters_stay():
    case = make_case("mlp", "softmax")
    frozen = lambda m: [m.layers[0], m.layers[2].bias]  # noqa: E731
    optimizer = adaptive(case.loss_fn, frozen=frozen)
    model, _, _ = run(optimizer, case, steps=4)
    for before, after in zip(jax.tree.leaves(frozen(case.model)), jax.tree.leaves(frozen(model)), strict=True):
        assert jnp.array_equal(before, after)
    assert not jnp.array_equal(model.layers[2].weight, case.model.layers[2].weight)
    assert not jnp.array_equal(model.layers[4].weight, case.model.layers[4].weight)


def test_keys_aux_and_model_state_go_through():
    case = make_case("mlp", "softmax")

    def loss_fn(model, batch, model_state, *, key):
        noise = 0.1 * jax.random.normal(key, batch[0].shape)
        outputs = jax.vmap(model)(batch[0] + noise)
        return kfax.softmax_cross_entropy(outputs, batch[1]), model_state + 1, {"mean": outputs.mean()}

    optimizer = adaptive(loss_fn)
    state = begin(optimizer, case, key=jax.random.key(0), model_state=jnp.array(3))
    step = functools.partial(eqx.filter_jit(optimizer.step), case.model, state, case.batch, model_state=jnp.array(3))
    first, again, other = (step(key=jax.random.key(i)) for i in (1, 1, 2))
    assert first[2].model_state == 4
    assert first[2].aux["mean"].shape == ()
    assert_close(first, again, tolerance=0.0)
    assert not jnp.array_equal(first[2].loss, other[2].loss)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_dtype(dtype):
    case = make_case("mlp", "softmax", num_examples=9)
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, case.model)
    batch = (case.x.astype(dtype), case.y)
    optimizer = adaptive(case.loss_fn)
    state = eqx.filter_jit(optimizer.init)(model, batch)
    losses = []
    for _ in range(10):
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, batch)
        losses.append(float(info.loss))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(parameters(model)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.curvature.average.value))
    assert losses[-1] < losses[0]


def test_state_survives_a_file(tmp_path):
    case = make_case("mlp", "softmax")
    optimizer = adaptive(case.loss_fn)
    model, state, _ = run(optimizer, case, steps=3)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", (model, state))
    like = (case.model, begin(optimizer, case))
    model2, state2 = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    step = eqx.filter_jit(optimizer.step)
    assert eqx.tree_equal(step(model, state, case.batch), step(model2, state2, case.batch))


def test_learned_variances_with_the_quadratic_model():
    model = kfax.tag(eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0)))
    x = random(1, 12, 2)

    def loss_fn(model, batch):
        means, log_variances = jnp.split(jax.vmap(model)(batch), 2, axis=1)
        return kfax.gaussian_nll(means, log_variances, batch[:, :1])

    auto = kfax.QuadraticModel(kfax.ExactFisher())
    settings: dict[str, Any] = {
        "learning_rate": auto,
        "momentum": auto,
        "damping": kfax.LevenbergMarquardt(initial=1.0),
        "preconditioner": kfax.Preconditioner(
            kfax.BlockDiagonalCurvature(kfax.CurvaturePropagation(source=kfax.ExactFisher()))
        ),
    }
    optimizer = kfax.Optimizer(loss_fn, **settings)
    state, losses = optimizer.init(model, x), []
    step = eqx.filter_jit(optimizer.step)
    for i in range(5):
        model, state, info = step(model, state, x, key=jax.random.key(i))
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    settings["momentum"] = kfax.QuadraticModel()
    with pytest.raises(ValueError, match="by one `kfax.QuadraticModel`"):
        kfax.Optimizer(loss_fn, **settings)
    with pytest.raises(ValueError, match="must be `kfax.ExactGGN"):
        kfax.QuadraticModel(kfax.SampledFisher())
