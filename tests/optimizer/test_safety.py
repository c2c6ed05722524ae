"""What must not enter model or state, and steps that are undone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from helpers import mlp, parameters

import kfax


RESULT = kfax.StepResult


def small_case(sizes=(4, 3, 2), dtype=jnp.float64, num_examples=8):
    keys = jax.random.split(jax.random.key(1), 2)
    model = kfax.tag(mlp(keys[0], sizes, dtype=dtype))
    x = jax.random.normal(keys[1], (num_examples, sizes[0]), dtype)
    y = jnp.sin(3 * x[:, :1]) * jnp.ones(sizes[-1], dtype)
    return model, (x, y)


def loss_fn(model, batch):
    return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])


AUTO = kfax.QuadraticModel()
KINDS = {
    "fixed": {"learning_rate": 0.05, "momentum": 0.5, "damping": 0.5},
    "adaptive": {"learning_rate": AUTO, "momentum": AUTO, "damping": kfax.LevenbergMarquardt(0.5, period=2)},
    "rejecting": {
        "learning_rate": AUTO,
        "momentum": AUTO,
        "damping": kfax.LevenbergMarquardt(0.5),
        "rejection": kfax.Rejection(),
    },
    "power": {
        "learning_rate": 0.05,
        "momentum": 0.5,
        "damping": 0.5,
        "preconditioner": kfax.Preconditioner(exponent=-0.5),
    },
    "constrained": {
        "learning_rate": kfax.NormConstraint(0.1, 1e-2),
        "momentum": 0.5,
        "damping": kfax.RelativeDamping(1e-3),
    },
}


def make(kind, **options):
    return kfax.Optimizer(loss_fn, **(KINDS[kind] | options))


def train(optimizer, model, batches):
    """Trains on batches of one shape; models, states and reports after each step."""
    state = eqx.filter_jit(optimizer.init)(model, batches[0])
    step, history = eqx.filter_jit(optimizer.step), []
    for i, batch in enumerate(batches):
        model, state, info = step(model, state, batch, key=jax.random.key(i))
        history.append((model, state, info))
    return history


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def held(state):
    """All of a state but the counter."""
    return eqx.tree_at(lambda s: s.step, state, None)


# -- what is not finite --


@grid(thin=3, kind=KINDS, where=["inputs", "targets"])
def test_a_batch_of_nans_changes_nothing(kind, where):
    model, (x, y) = small_case()
    bad = (x * jnp.nan, y) if where == "inputs" else (x, y * jnp.nan)
    batches = [(x, y)] * 7 + [bad] + [(x, y)] * 5
    history = train(make(kind), model, batches)
    (before, state_before, _), (after, state_after, info) = history[6:8]
    assert info.result == RESULT.non_finite_batch
    assert not jnp.isfinite(info.loss) and info.update_norm == 0
    assert bool(eqx.tree_equal(before, after))
    assert bool(eqx.tree_equal(held(state_before), held(state_after)))
    assert state_after.step == 8
    # As if it had not been there.
    assert all(is_finite(m) and (i.result == RESULT.successful) for m, _, i in history[8:])
    assert history[-1][2].loss < history[6][2].loss


SELDOM = {
    "staggered": {"inverse_update_period": kfax.Staggered(3)},
    "seldom": {"inverse_update_period": 5, "curvature_update_period": 5},
}


@grid(thin=3, kind=[*KINDS, *SELDOM])
def test_a_first_batch_of_nans(kind):
    """There is no inverse yet: it is made at the next step, whatever the periods."""
    seldom = kind in SELDOM and {"preconditioner": kfax.Preconditioner(**SELDOM[kind])}
    optimizer = make("fixed", **seldom) if seldom else make(kind)
    model, (x, y) = small_case()
    history = train(optimizer, model, [(x * jnp.nan, y)] + [(x, y)] * 3)
    assert history[0][2].result == RESULT.non_finite_batch
    assert bool(eqx.tree_equal(history[0][0], model))
    assert all(info.result == RESULT.successful for *_, info in history[1:])
    assert history[2][2].loss < history[1][2].loss == loss_fn(model, (x, y)).value()
    assert is_finite(history[-1][0])


def test_without_an_inverse_a_step_does_not_pass_for_a_good_one():
    model, (x, y) = small_case()
    nothing = jnp.zeros(len(x))

    def loss_fn(model, batch):
        return [
            kfax.squared_error(jax.vmap(model)(batch[0]), batch[1], weights=nothing),
            kfax.Penalty(jnp.sum(model.layers[0].bias)),
        ]

    optimizer = kfax.Optimizer(loss_fn, **KINDS["fixed"])
    state = eqx.filter_jit(optimizer.init)(model, (x, y))
    after, _, info = eqx.filter_jit(optimizer.step)(model, state, (x, y), key=jax.random.key(0))
    assert info.result == RESULT.non_finite_inverse and info.gradient_norm > 0
    assert bool(eqx.tree_equal(after, model))


@grid(thin=2, kind=KINDS)
def test_batches_of_zeros_and_of_one_example(kind):
    model, (x, y) = small_case()
    same = (jnp.broadcast_to(x[:1], x.shape), jnp.broadcast_to(y[:1], y.shape))
    batches = [(0 * x, 0 * y), same, (0 * x, 0 * y), *[(x, y)] * 12]
    history = train(make(kind), model, batches)
    assert all(is_finite(entry[0]) and is_finite(entry[1].velocity) for entry in history)
    assert history[-1][2].loss < history[3][2].loss


@grid(thin=3, kind=KINDS, dtype=[jnp.float32, jnp.bfloat16])
def test_hardly_any_damping_in_low_precision(kind, dtype):
    """Nothing says that this trains well. It must not break."""
    if kind == "rejecting":
        tiny = kfax.LevenbergMarquardt(1e-12, minimum=1e-12)
    else:
        tiny = {"adaptive": kfax.LevenbergMarquardt(1e-12, minimum=1e-12)}.get(kind, 1e-12)
    model, (x, y) = small_case(dtype=dtype)
    same = (jnp.broadcast_to(x[:1], x.shape), jnp.broadcast_to(y[:1], y.shape))
    history = train(make(kind, damping=tiny), model, [same] * 4 + [(x, y)] * 8)
    assert all(is_finite(entry[0]) for entry in history)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(parameters(history[-1][0])))
    assert not bool(eqx.tree_equal(history[-1][0], model))


@grid(kind=["fixed", "adaptive"])
def test_factors_of_size_one(kind):
    model, (x, y) = small_case(sizes=(1, 1, 1, 1))
    history = train(make(kind), model, [(x, y)] * 10)
    assert all(is_finite(entry[0]) for entry in history)
    assert history[-1][2].loss < history[0][2].loss


def test_statistics_that_are_not_finite_are_left_out():
    model, (x, y) = small_case()
    (_, state, info), (_, after, bad) = train(make("fixed"), model, [(x, y), (x * 1e200, y)])
    assert info.result == RESULT.successful
    # Squares of inputs overflow where tanh makes everything else finite.
    assert bad.result == RESULT.non_finite_curvature
    assert bool(eqx.tree_equal(after.curvature.average, state.curvature.average))


def test_a_block_that_cannot_be_inverted_keeps_its_inverse():
    model, batch = small_case()
    optimizer = make("fixed", preconditioner=kfax.Preconditioner(inverse_update_period=1))
    step = eqx.filter_jit(optimizer.step)
    model, state, _ = step(model, eqx.filter_jit(optimizer.init)(model, batch), batch, key=jax.random.key(0))
    first, last = state.curvature.inverses
    # The product of the two factors overflows.
    huge = jax.tree.map(lambda x: 1e200 * jnp.eye(*x.shape) if x.ndim == 2 else x, state.curvature.average.value[last])
    spoiled = eqx.tree_at(lambda s: s.curvature.average.value[last], state, huge)
    _, after, info = step(model, spoiled, batch, key=jax.random.key(1))
    assert info.result == RESULT.non_finite_inverse
    assert bool(eqx.tree_equal(after.curvature.inverses[last], state.curvature.inverses[last]))
    assert not bool(eqx.tree_equal(after.curvature.inverses[first], state.curvature.inverses[first]))
    assert after.preconditioner.is_stale


def test_a_model_state_that_was_never_finite_is_no_reason_to_stop():
    model, (x, y) = small_case()

    def with_state(model, batch, model_state):
        smallest = jnp.minimum(model_state["smallest"], jnp.min(batch[0]))
        return loss_fn(model, batch), {"smallest": smallest, "unused": model_state["unused"]}

    start = {"smallest": jnp.asarray(jnp.inf), "unused": jnp.full(2, jnp.inf)}
    optimizer = kfax.Optimizer(with_state, **KINDS["fixed"])
    state = eqx.filter_jit(optimizer.init)(model, (x, y), model_state=start)
    step = eqx.filter_jit(optimizer.step)
    *_, info = step(model, state, (x, y), key=jax.random.key(0), model_state=start)
    assert info.result == RESULT.successful and info.model_state["smallest"] == jnp.min(x)
    *_, bad = step(model, state, (x.at[0, 0].set(-jnp.inf), y), key=jax.random.key(0), model_state=info.model_state)
    assert bad.result == RESULT.non_finite_batch and bad.model_state["smallest"] == jnp.min(x)


def test_a_model_state_keeps_its_form():
    model, (x, y) = small_case()

    def with_state(model, batch, model_state):
        return loss_fn(model, batch), {"count": jnp.sum(model_state["count"]) + 1}

    optimizer = kfax.Optimizer(with_state, **KINDS["fixed"])
    for count in (0, jnp.zeros((1,), jnp.int8)):
        state = optimizer.init(model, (x, y), model_state={"count": count})
        with pytest.raises(ValueError, match=r"(?s)model state unlike the one.*`model_state\['count'\]`"):
            optimizer.step(model, state, (x, y), key=jax.random.key(0), model_state={"count": count})


def test_an_update_that_is_not_finite_is_not_made():
    model, (x, y) = small_case()
    batch = x, 1e3 * y  # so that the descent is larger than 1
    for kind in ("fixed", "adaptive"):
        optimizer = make(kind)
        model, state, _ = train(optimizer, model, [batch] * 2)[-1]
        step = eqx.filter_jit(optimizer.step)
        after, state_after, info = step(model, state, batch, key=jax.random.key(0), learning_rate=1.7e308)
        assert info.result == RESULT.non_finite_update
        assert bool(eqx.tree_equal(after, model))
        assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(state_after.velocity))
        assert (state_after.damping > state.damping) == (kind == "adaptive")


# -- steps that are undone --


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
