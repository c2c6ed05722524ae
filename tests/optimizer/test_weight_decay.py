"""Decoupled weight decay: what it takes off, of what, and when."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from helpers import as_it_is, assert_close, parameters
from optimizer_cases import fixed

import kfax


def one_step(case, **options):
    optimizer = fixed(case.loss_fn, learning_rate=as_it_is(0.1), **options)
    state = eqx.filter_jit(optimizer.init)(case.model, case.batch)
    return eqx.filter_jit(optimizer.step)(case.model, state, case.batch, key=jax.random.key(0))


@pytest.mark.parametrize("momentum", [0.9, kfax.QuadraticModel()])
def test_it_shrinks_the_parameters_before_the_step(momentum):
    case = make_case("mlp", "softmax")
    plain, before, _ = one_step(case, momentum=momentum)
    decayed, state, info = one_step(case, momentum=momentum, weight_decay=0.5)
    shrunk = jax.tree.map(lambda new, old: new - 0.1 * 0.5 * old, parameters(plain), parameters(case.model))
    assert_close(parameters(decayed), shrunk)
    # Momentum and objective know nothing of it.
    assert_close(state, before)
    assert info.learning_rate == 0.1


def test_of_some_of_the_parameters():
    case = make_case("mlp", "softmax")
    weights = lambda model: [model.layers[0].weight, model.layers[2].weight]  # noqa: E731
    plain, *_ = one_step(case)
    decayed, *_ = one_step(case, weight_decay=kfax.WeightDecay(0.5, weights))
    for i in (0, 2, 4):
        old, new, expected = (model.layers[i] for model in (case.model, decayed, plain))
        assert_close(new.weight, expected.weight - (0.05 * old.weight if i < 4 else 0.0))
        assert_close(new.bias, expected.bias)


def test_with_no_gradient_it_is_exponential():
    case = make_case("mlp", "softmax")
    nothing = lambda m, b: 0.0 * case.loss_fn(m, b)  # noqa: E731
    optimizer = fixed(nothing, learning_rate=0.1, l2=None, weight_decay=0.5)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    for _ in range(4):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch)
    assert_close(parameters(model), jax.tree.map(lambda x: 0.95**4 * x, parameters(case.model)))


def test_a_step_that_is_undone_decays_nothing():
    case = make_case("mlp", "squared")
    # With the decay alone the loss would rise, and that is what is judged.
    best, rejection = make_fitted(case), kfax.Rejection()
    optimizer = fixed(case.loss_fn, learning_rate=as_it_is(1e-14), momentum=0.0, weight_decay=1e13, rejection=rejection)
    state = eqx.filter_jit(optimizer.init)(best, case.batch)
    after, _, info = eqx.filter_jit(optimizer.step)(best, state, case.batch)
    assert info.result == kfax.StepResult.rejected
    assert_close(info.loss_after, decayed_loss(case, best))
    assert bool(eqx.tree_equal(after, best))


def make_fitted(case):
    optimizer = kfax.full_batch(case.loss_fn)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    for i in range(15):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(i))
    return model


def decayed_loss(case, model):
    shrunk = eqx.apply_updates(model, jax.tree.map(lambda x: -0.1 * x, parameters(model)))
    squares = sum(jnp.sum(x * x) for x in jax.tree.leaves(parameters(shrunk)))
    return case.loss_fn(shrunk, case.batch).value() + 1e-3 / 2 * squares


def test_a_schedule_of_the_learning_rate_is_one_of_the_decay():
    case = make_case("mlp", "softmax")
    schedule = lambda step: 0.2 - 0.1 * step  # noqa: E731
    nothing = lambda m, b: 0.0 * case.loss_fn(m, b)  # noqa: E731
    optimizer = fixed(nothing, learning_rate=schedule, l2=None, weight_decay=0.5)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    for _ in range(3):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch)
    assert_close(parameters(model), jax.tree.map(lambda x: 0.9 * 0.95 * x, parameters(case.model)))


def test_mistakes():
    case = make_case("mlp", "softmax")
    with pytest.raises(ValueError, match="`weight_decay` must not be negative"):
        fixed(case.loss_fn, weight_decay=-0.1)
    stranger = kfax.WeightDecay(0.1, lambda model: jnp.zeros(3))
    with pytest.raises(ValueError, match="`where` of `kfax.WeightDecay` must return nodes of the model"):
        fixed(case.loss_fn, weight_decay=stranger).init(case.model, case.batch)
