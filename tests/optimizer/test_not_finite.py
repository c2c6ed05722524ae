"""What is not finite enters neither model nor state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import parameters
from safety_cases import KINDS, loss_fn, make, RESULT, small_case, train

import kfax


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def held(state):
    """All of a state but the counter."""
    return eqx.tree_at(lambda s: s.step, state, None)


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
