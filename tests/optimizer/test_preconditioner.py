"""The preconditioner: when and of what its parts are renewed, its power, and the norms that it bounds."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest
from cases import grid, make_case
from helpers import as_it_is, assert_close, flat, mlp, parameters
from preconditioner_cases import change, EXACT, ggn_at, gradient_at, make, train

import kfax


def test_a_staggered_refresh_has_every_block_once_in_a_period():
    case = make_case(mlp(jax.random.key(0), (8, 7, 6, 5, 4, 3)), "softmax")
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT, inverse_update_period=kfax.Staggered(3)))
    history = train(optimizer, case.model, [case.batch] * 8)
    inverses = [state.curvature.inverses for _, _, state, _ in history]
    turns = []
    for i in range(1, 8):
        turns.append({key for key in inverses[i] if not bool(eqx.tree_equal(inverses[i][key], inverses[i - 1][key]))})
    assert turns[:3] == turns[3:6]
    assert sorted(key for turn in turns[:3] for key in turn) == sorted(inverses[0])
    costs = {row.path: row.refresh_flops for row in kfax.coverage(case.model).rows}
    totals = [sum(costs[key] for key in turn) for turn in turns[:3]]
    assert max(totals) - min(totals) <= max(costs.values())
    # What is refreshed is what a refresh of everything gives.
    state = history[-1][2].curvature
    everything = EXACT.refresh(state, parameters(case.model), jnp.asarray(0.1))
    for key in turns[-1]:
        assert_close(state.inverses[key], everything.inverses[key])


def test_a_refresh_on_demand():
    case = make_case("mlp", "softmax")
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT, inverse_update_period=100), l2=0.05)
    *_, state, _ = train(optimizer, case.model, [case.batch] * 3)[-1]
    new = optimizer.refresh(case.model, state)
    expected = EXACT.refresh(state.curvature, parameters(case.model), jnp.asarray(0.15))
    assert_close(new.curvature, expected)
    assert not bool(eqx.tree_equal(new.curvature.inverses, state.curvature.inverses))


def test_burn_in_is_updates_without_steps():
    case = make_case("mlp", "softmax", num_examples=8)
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT, curvature_update_period=7))
    state = expected = eqx.filter_jit(optimizer.init)(case.model, case.batch)
    expected = expected.curvature
    for part in (slice(0, 5), slice(5, 8)):
        batch = jax.tree.map(lambda x, part=part: x[part], case.batch)
        state = eqx.filter_jit(optimizer.burn_in)(case.model, state, batch)
        expected = eqx.filter_jit(EXACT.update)(expected, case.loss_fn, case.model, batch)
    assert state.step == 0
    assert_close(state.curvature, expected)


def test_statistics_and_quadratic_model_of_a_part_of_the_batch():
    case = make_case("mlp", "softmax", num_examples=8)
    model = kfax.QuadraticModel(batch=kfax.Fraction(1 / 4))
    preconditioner = kfax.Preconditioner(EXACT, batch=kfax.Fraction(3 / 8), inverse_update_period=1)
    optimizer = make(case.loss_fn, preconditioner, learning_rate=model, momentum=model)
    history = train(optimizer, case.model, [case.batch] * 3)
    expected = EXACT.init(case.model)
    for i, (before, after, state, info) in enumerate(history):
        # 3 examples out of 8, and 2 out of 8: others at each step.
        start = (0, 3, 5)[i]
        part = jax.tree.map(lambda x, start=start: x[start : start + 3], case.batch)
        expected = eqx.filter_jit(EXACT.update)(expected, case.loss_fn, before, part)
        assert_close(state.curvature.average, expected.average)
        theta, unravel, update = change(before, after)
        matrix = ggn_at(case, before, tuple(leaf[2 * i : 2 * i + 2] for leaf in case.batch))
        slope = gradient_at(case, theta, unravel) @ update
        assert_close(info.predicted_change, slope + update @ matrix @ update / 2)
        # The minimum along the update itself, with λ.
        assert abs(slope + update @ (matrix @ update + 0.1 * update)) <= 1e-10 * abs(slope)


def test_a_fraction_of_a_batch():
    batch = {"x": jnp.arange(10.0), "y": jnp.arange(20.0).reshape(10, 2), "name": "train"}
    for step, start in ((0, 0), (1, 3), (2, 6), (3, 7), (4, 0)):
        part = kfax.Fraction(0.3)(batch, jnp.asarray(step))
        assert_close(part["x"], batch["x"][start : start + 3])
        assert_close(part["y"], batch["y"][start : start + 3])
        assert part["name"] == "train"
    assert kfax.Fraction(1e-3)(batch, jnp.asarray(4))["x"] == 4
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"`share` of `kfax.Fraction` must be a number in \(0, 1\]"):
            kfax.Fraction(share)
    with pytest.raises(ValueError, match=r"`kfax.Fraction` splits a batch along axis 0.*`batch\['z'\]`: 3"):
        kfax.Fraction(0.3)(batch | {"z": jnp.zeros(3)}, jnp.asarray(0))


@grid(estimator=["blocks", "explicit"], slow=lambda estimator: estimator == "explicit")
def test_a_power_of_the_curvature(estimator):
    """With the present damping, whenever the eigenbasis was computed."""
    case = make_case("mlp", "softmax", num_examples=7)
    case = dataclasses.replace(case, model=kfax.set_block(case.model, lambda m: m, kfax.Full()))
    made = EXACT if estimator == "blocks" else kfax.ExplicitExactCurvature()
    preconditioner = kfax.Preconditioner(made, inverse_update_period=2, exponent=-0.5)
    optimizer = make(case.loss_fn, preconditioner, damping=lambda step: 0.1 / (1 + step), l2=0.01)
    history = train(optimizer, case.model, [case.batch] * 3)
    held = None
    for i, (before, after, state, _) in enumerate(history):
        theta, unravel, update = change(before, after)
        held = made.to_dense(state.curvature, parameters(before)) if i % 2 == 0 else held
        values, vectors = jnp.linalg.eigh(held)
        gradient = gradient_at(case, theta, unravel) + 0.01 * theta
        damped = jnp.maximum(values, 0) + 0.1 / (1 + i) + 0.01
        assert_close(update, -0.1 * vectors @ ((vectors.T @ gradient) / jnp.sqrt(damped)))


def test_products_as_the_preconditioner():
    """The batch may grow, hide what is not finite, and be bad."""
    case = make_case("mlp", "squared", num_examples=8)

    def loss_fn(model, batch):
        x, y = batch
        return kfax.squared_error(jax.vmap(model)(x), y, mask=jnp.all(jnp.isfinite(y), axis=1))

    estimator = kfax.ImplicitExactCurvature(preconditioner=EXACT, solver=lx.CG(1e-12, 1e-12))
    preconditioner = kfax.Preconditioner(estimator, inverse_update_period=1)
    optimizer = make(loss_fn, preconditioner, learning_rate=as_it_is(0.1))
    hidden = (case.x, case.y.at[0].set(jnp.nan))
    batches = [case.batch, tuple(leaf[:5] for leaf in case.batch), hidden, (case.x * jnp.nan, case.y), case.batch]
    results = []
    for i, (before, after, _, info) in enumerate(train(optimizer, case.model, batches)):
        results.append(info.result == kfax.StepResult.successful)
        if not results[-1]:
            assert bool(eqx.tree_equal(before, after))
            continue
        theta, unravel, update = change(before, after)

        def value(flat, batch=batches[i], unravel=unravel, like=before):
            return loss_fn(eqx.combine(unravel(flat), like), batch).value()

        seen = tuple(leaf[1:] for leaf in case.batch) if i == 2 else batches[i]
        matrix = ggn_at(case, before, seen) + 0.1 * jnp.eye(len(theta))
        assert_close(update, -0.1 * jnp.linalg.solve(matrix, jax.grad(value)(theta)), tolerance=1e-8)
    assert results == [True, True, True, False, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_once_in_a_while_in_low_precision(dtype):
    case = make_case("mlp", "softmax")
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, case.model)
    batch = (case.x.astype(dtype), case.y)
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT, curvature_update_period=2))
    history = train(optimizer, model, [batch] * 3)
    same = [bool(eqx.tree_equal(history[i][2].curvature.average, history[i + 1][2].curvature.average)) for i in (0, 1)]
    assert same == [True, False]
    assert history[2][3].loss < history[0][3].loss


@grid(active=[True, False])
def test_the_norm_constraint_is_tight_where_it_is_active(active):
    case = make_case("mlp", "softmax")
    bound = 1e-4 if active else 1e4
    rate = kfax.NormConstraint(0.3, bound)
    preconditioner = kfax.Preconditioner(EXACT, inverse_update_period=1)
    optimizer = make(case.loss_fn, preconditioner, learning_rate=rate, momentum=0.7)
    velocity, history = 0.0, train(optimizer, case.model, [case.batch] * 3)
    for before, after, state, info in history:
        theta, unravel, update = change(before, after)
        gradient = gradient_at(case, theta, unravel)
        natural = flat(EXACT.solve(state.curvature, unravel(gradient)))
        squared = gradient @ natural
        alpha = jnp.sqrt(bound / squared) if active else 0.3
        assert_close(info.learning_rate, jnp.asarray(alpha))
        assert_close(update, -alpha * natural + 0.7 * velocity, tolerance=1e-9)  # differences of parameters
        velocity = update
    _, model, state, _ = history[-1]
    *_, given = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(9), learning_rate=1e6)
    assert given.learning_rate < 1e6
    assert history[0][3].is_constrained == active and given.is_constrained


@grid(multiple=[0.1, None, jnp.inf])
def test_no_step_promises_more_than_the_loss_has_to_give(multiple):
    """With the mean of all losses so far, of finite batches only; a plain number has a multiple of one."""
    case = make_case("mlp", "softmax")
    rate = 0.3 if multiple is None else kfax.LossConstraint(0.3, multiple)
    preconditioner = kfax.Preconditioner(EXACT, inverse_update_period=1)
    optimizer = make(case.loss_fn, preconditioner, learning_rate=rate, damping=1e-6, momentum=0.0)
    bad = jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, case.batch)
    losses, acted = [], []
    for before, after, state, info in train(optimizer, case.model, [case.batch, bad, case.batch, case.batch]):
        if info.result != kfax.StepResult.successful:
            continue
        theta, unravel, update = change(before, after)
        gradient = gradient_at(case, theta, unravel)
        natural = flat(EXACT.solve(state.curvature, unravel(gradient)))
        losses.append(float(info.loss))
        allowed = (1.0 if multiple is None else multiple) * jnp.mean(jnp.array(losses))
        alpha = 0.3 * jnp.minimum(1, allowed / (gradient @ natural))
        assert_close(info.learning_rate, alpha)
        assert_close(update, -alpha * natural, tolerance=1e-8)  # differences of parameters
        assert info.is_constrained == (gradient @ natural > allowed)
        acted.append(bool(info.is_constrained))
    assert len(losses) == 3 and any(acted) == (multiple != jnp.inf)


def test_norms_of_single_layers():
    case = make_case("mlp", "softmax")
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT), report_layers=True, momentum=0.5)
    before, after, _, info = train(optimizer, case.model, [case.batch] * 2)[-1]
    assert list(info.layers) == [row.path for row in kfax.coverage(case.model).rows]
    for path, norms in info.layers.items():
        pick = lambda m, i=int(path[8]): parameters(m.layers[i])  # noqa: E731
        assert_close(norms.parameter, jnp.linalg.norm(flat(pick(before))))
        assert_close(norms.update, jnp.linalg.norm(flat(pick(after)) - flat(pick(before))), tolerance=1e-9)
    total = sum(norms.gradient**2 for norms in info.layers.values())
    assert_close(jnp.sqrt(total), info.gradient_norm)
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT), report_layers=True, rejection=kfax.Rejection())
    *_, undone = train(optimizer, case.model, [case.batch], learning_rate=1e6)[-1]
    assert undone.result == kfax.StepResult.rejected
    assert all(norms.update == 0 and norms.descent > 0 for norms in undone.layers.values())


def test_a_step_does_not_depend_on_affine_maps_of_the_inputs():
    """Exact case 15: with hardly any damping, the step is the same function whatever basis the inputs come in.

    Source: Martens & Grosse 2015, section 10.
    """
    keys = jax.random.split(jax.random.key(3), 5)
    plain = eqx.nn.MLP(4, 3, 5, 1, activation=jnp.tanh, key=keys[0])
    matrix, offset = jax.random.normal(keys[1], (4, 4)) + 2 * jnp.eye(4), jax.random.normal(keys[2], (4,))
    first = plain.layers[0]
    weight = first.weight @ jnp.linalg.inv(matrix)
    bias = first.bias - weight @ offset
    moved = eqx.tree_at(lambda m: (m.layers[0].weight, m.layers[0].bias), plain, (weight, bias))
    x, y = jax.random.normal(keys[3], (40, 4)), jax.random.normal(keys[4], (40, 3))

    def after_steps(model, inputs):
        def loss_fn(model, batch):
            return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])

        optimizer = make(loss_fn, kfax.Preconditioner(EXACT, inverse_update_period=1), damping=1e-14, l2=0.0)
        return jax.vmap(train(optimizer, kfax.tag(model), [(inputs, y)] * 2)[-1][1])(inputs)

    moved_inputs = x @ matrix.T + offset
    assert_close(jax.vmap(moved)(moved_inputs), jax.vmap(plain)(x))
    steps = after_steps(plain, x) - jax.vmap(plain)(x)
    others = after_steps(moved, moved_inputs) - jax.vmap(plain)(x)
    assert jnp.max(jnp.abs(steps)) > 1e-2
    # What is left is the factors' damping, the root of 1e-14 relative to their smallest eigenvalues.
    assert_close(others, steps, tolerance=1e-4)
