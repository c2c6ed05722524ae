"""Steps that are undone, and what is done to the damping and the velocity then."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from helpers import parameters
from safety_cases import loss_fn, make, RESULT, small_case

import kfax


def normalized(model, batch, model_state):
    call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    outputs, model_state = call(batch[0], model_state)
    return kfax.squared_error(outputs, batch[1]), model_state


def build(key):
    keys = jax.random.split(key, 2)
    layers = [
        eqx.nn.Linear(4, 3, key=keys[0]),
        eqx.nn.BatchNorm(3, "batch", mode="ema"),
        eqx.nn.Linear(3, 2, key=keys[1]),
    ]
    return eqx.nn.Sequential(layers)


@grid(period=[1, 5])
def test_a_step_that_raises_the_loss_is_undone(period):
    """Parameters, velocity and model state; at every period of the damping, which stays raised."""
    _, (x, y) = small_case()
    plain, model_state = eqx.nn.make_with_state(build)(jax.random.key(0))
    model = kfax.tag(plain)
    rule = kfax.LevenbergMarquardt(0.5, period=period, decay=0.9)
    curvature = kfax.BlockDiagonalCurvature(example_axis="batch")
    optimizer = kfax.Optimizer(
        normalized,
        learning_rate=0.1,
        momentum=0.5,
        damping=rule,
        rejection=kfax.Rejection(),
        preconditioner=kfax.Preconditioner(curvature, inverse_update_period=100),
    )
    state = eqx.filter_jit(optimizer.init)(model, (x, y), model_state=model_state)
    step = eqx.filter_jit(optimizer.step)
    for i, rate in enumerate([0.1, 0.1, 1e4, 0.1, 0.1, 1e4, 1e4, 0.1]):
        inputs = {"key": jax.random.key(i), "model_state": model_state, "learning_rate": rate}
        new_model, new_state, info = step(model, state, (x, y), **inputs)
        if rate == 1e4:
            assert info.result == RESULT.rejected
            assert info.update_norm == 0 and info.reduction_ratio != 0
            assert info.proposed_norm > 1e3 * info.descent_norm and info.loss_after > info.loss
            assert bool(eqx.tree_equal((new_model, info.model_state), (model, model_state)))
            # The second time in a row it may have been the velocity's fault.
            kept = jax.tree.map(jnp.zeros_like, state.velocity) if i == 6 else state.velocity
            assert bool(eqx.tree_equal(new_state.velocity, kept))
            assert jnp.allclose(new_state.damping, state.damping / 0.9**period, rtol=1e-12)
            assert new_state.preconditioner.is_stale
        else:
            assert info.result == RESULT.successful
            assert not bool(eqx.tree_equal(new_model, model)) and not new_state.preconditioner.is_stale
            assert not bool(eqx.tree_equal(info.model_state, model_state))
        # The period would allow one refresh, at the first step; each rejection asks for one more.
        refreshed = not bool(eqx.tree_equal(new_state.curvature.inverses, state.curvature.inverses))
        assert refreshed == (i in (0, 3, 6, 7))
        model, state, model_state = new_model, new_state, info.model_state


@grid(maximum=[1e8, 1.0])
def test_how_much_damping_is_raised_after_an_undone_step(maximum):
    model, batch = small_case()
    rule = kfax.LevenbergMarquardt(0.5, period=5, undone_factor=3.0, maximum=maximum)
    optimizer = make("fixed", damping=rule, rejection=kfax.Rejection())
    state = eqx.filter_jit(optimizer.init)(model, batch)
    step = eqx.filter_jit(optimizer.step)
    for expected, rate in ((0.5, 0.05), (min(1.5, maximum), 1e6), (min(4.5, maximum), 1e6)):
        model, state, info = step(model, state, batch, key=jax.random.key(0), learning_rate=rate)
        assert (info.result == RESULT.rejected) == (rate == 1e6)
        assert jnp.allclose(state.damping, expected, rtol=1e-12)
    # An adjustment is as ever: a ratio that is too low, or high, says nothing of steps that were undone.
    assert jnp.allclose(rule.update(jnp.asarray(0.5), jnp.asarray(0.1)), 0.5 / 0.95**5, rtol=1e-12)
    with pytest.raises(ValueError, match="`undone_factor` must be at least 1"):
        kfax.LevenbergMarquardt(0.5, undone_factor=0.5)


def test_a_step_reports_what_it_measured():
    model, batch = small_case()
    for options in ({"damping": 0.5}, {"damping": kfax.LevenbergMarquardt(0.5, period=2)}):
        optimizer = make("fixed", l2=0.1, momentum=0.0, **options)
        state = eqx.filter_jit(optimizer.init)(model, batch)
        step = eqx.filter_jit(optimizer.step)
        for i in range(2):
            after, state, info = step(model, state, batch, key=jax.random.key(i))
            assert info.proposed_norm == info.update_norm > 0
            assert jnp.allclose(info.update_norm, 0.05 * info.descent_norm, rtol=1e-12)
            squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(parameters(after)))
            if i == 1 and options["damping"] != 0.5:
                assert jnp.allclose(info.loss_after, loss_fn(after, batch).value() + 0.05 * squares, rtol=1e-12)
            else:
                assert jnp.isnan(info.loss_after)
            model = after


def test_levenberg_marquardt_undoes_a_step_into_infinity():
    """Without `Rejection` too: from there no later step would come back."""
    model, batch = small_case()

    def exploding(model, batch):
        outputs = jax.vmap(model)(batch[0])
        return kfax.squared_error(jnp.where(jnp.max(jnp.abs(outputs)) > 1e3, jnp.nan, outputs), batch[1])

    rule = kfax.LevenbergMarquardt(0.5, period=1)
    optimizer = kfax.Optimizer(exploding, learning_rate=0.1, momentum=0.0, damping=rule)
    state = eqx.filter_jit(optimizer.init)(model, batch)
    after, state_after, info = eqx.filter_jit(optimizer.step)(
        model, state, batch, key=jax.random.key(0), learning_rate=1e9
    )
    assert info.result == RESULT.rejected
    assert bool(eqx.tree_equal(after, model)) and state_after.damping > state.damping


def test_rejection_does_not_go_on_forever():
    """A velocity that is too long stays so whatever λ is."""
    model, batch = small_case()
    optimizer = make("fixed", momentum=1.0, rejection=kfax.Rejection(), damping=kfax.LevenbergMarquardt(0.5))
    state = eqx.filter_jit(optimizer.init)(model, batch)
    state = eqx.tree_at(lambda s: s.velocity, state, jax.tree.map(lambda v: v + 100, state.velocity))
    step, results = eqx.filter_jit(optimizer.step), []
    for i in range(4):
        model, state, info = step(model, state, batch, key=jax.random.key(i))
        results.append(info.result)
    assert results[0] == results[1] == RESULT.rejected
    assert results[2] == results[3] == RESULT.successful


@grid(change=["nothing", "increase"])
def test_damping_stays_where_the_ratio_says_nothing(change):
    model, batch = small_case()
    rule = kfax.LevenbergMarquardt(0.5, period=1)
    optimizer = make("fixed", damping=rule, learning_rate=0.0, momentum=0.5)
    state = eqx.filter_jit(optimizer.init)(model, batch)
    if change == "increase":  # uphill, as the model knows: its ratio is about 1
        uphill = eqx.filter_grad(lambda m: loss_fn(m, batch).value())(model)
        state = eqx.tree_at(lambda s: s.velocity, state, jax.tree.map(lambda g: 0.01 * g, parameters(uphill)))
    _, new, info = eqx.filter_jit(optimizer.step)(model, state, batch, key=jax.random.key(0))
    assert (info.predicted_change > 0) == (change == "increase") and not info.predicted_change < 0
    assert (info.reduction_ratio > 0.75) == (change == "increase")
    assert new.damping == state.damping


def test_a_damping_given_once_does_not_stay():
    model, batch = small_case()
    optimizer = make("adaptive")
    state = eqx.filter_jit(optimizer.init)(model, batch)
    step = eqx.filter_jit(optimizer.step)
    _, new, info = step(model, state, batch, key=jax.random.key(0), damping=70.0)
    assert info.damping == 70 and new.damping == 0.5


def test_rounding_is_no_reason_for_rejection():
    assert kfax.Rejection().accepts(jnp.asarray(1.0))(jnp.asarray(1.0 + 1e-7))
    assert not kfax.Rejection().accepts(jnp.asarray(1.0))(jnp.asarray(1.0 + 1e-5))
    assert not kfax.Rejection().accepts(jnp.asarray(-1.0))(jnp.asarray(-1.0 + 1e-5))
    assert not kfax.Rejection(0.1).accepts(jnp.asarray(1.0))(jnp.asarray(jnp.nan))
    with pytest.raises(ValueError, match="`tolerance` must not be negative"):
        kfax.Rejection(-1.0)


def test_results_can_be_scanned_and_read():
    case = make_case("mlp", "squared")
    optimizer = kfax.Optimizer(case.loss_fn, learning_rate=0.1, momentum=0.0, damping=1.0)
    dynamic, static = eqx.partition(case.model, eqx.is_array)
    state = eqx.filter_jit(optimizer.init)(case.model, case.batch)

    def body(carry, key):
        model, state, info = optimizer.step(eqx.combine(carry[0], static), carry[1], case.batch, key=key)
        return (eqx.filter(model, eqx.is_array), state), info.result

    _, results = jax.jit(lambda c: jax.lax.scan(body, c, jax.random.split(jax.random.key(0), 3)))((dynamic, state))
    assert bool(jnp.all(results == RESULT.successful))
    assert "step was taken" in str(RESULT[RESULT.successful])
