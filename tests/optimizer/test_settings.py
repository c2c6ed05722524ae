"""Numbers out of their range: an error where they are known, and within `jit` a step that is not taken."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import grid, make_case

import kfax


INVALID = kfax.StepResult.invalid_setting
CASE = make_case("mlp", "softmax")


class Rule(kfax.DampingRule):
    """A user's own."""

    number: jax.Array

    def init(self):
        return jnp.ones(())

    def value(self, stored, step):
        return self.number

    def wants_ratio(self, step):
        return False

    def update(self, stored, ratio):
        return stored


def settings(**changed: Any) -> dict[str, Any]:
    return {"learning_rate": 0.1, "momentum": 0.9, "damping": 1.0} | changed


def preconditioned(**options: Any) -> dict[str, Any]:
    return settings(preconditioner=kfax.Preconditioner(**options))


# From a function of the step to the settings of an optimizer.
SCHEDULES = {
    "learning rate": (lambda f: settings(learning_rate=f), "learning_rate", -0.1),
    "constrained": (lambda f: settings(learning_rate=kfax.NormConstraint(f, 1.0)), "learning_rate", -0.1),
    "momentum": (lambda f: settings(momentum=f), "momentum", 1.5),
    "damping": (lambda f: settings(damping=f), "damping", 0.0),
    "relative damping": (lambda f: settings(damping=kfax.RelativeDamping(f)), "damping", -1.0),
    "bound": (lambda f: settings(learning_rate=kfax.NormConstraint(0.1, f)), "bound", -1.0),
    "by the loss": (lambda f: settings(learning_rate=kfax.LossConstraint(f)), "learning_rate", -0.1),
    "preconditioner": (lambda f: preconditioned(damping=f), "damping", -1.0),
}


def held(state):
    """All of a state but the counter, and whether inverses are due."""
    return eqx.tree_at(lambda s: (s.step, s.preconditioner.is_stale), state, (None, None))


def assert_not_taken(before, state, after, new_state, info):
    assert info.result == INVALID and info.update_norm == 0
    assert bool(eqx.tree_equal(before, after))
    assert bool(eqx.tree_equal(held(state), held(new_state)))
    assert new_state.step == state.step + 1


@grid(thin=2, name=SCHEDULES, value=["nan", "inf", "out of range"])
def test_a_schedule_that_leaves_its_range(name, value):
    """For one step: those before and after it are as ever."""
    make, setting, wrong = SCHEDULES[name]
    bad = {"nan": jnp.nan, "inf": jnp.inf, "out of range": wrong}[value]
    optimizer = kfax.Optimizer(CASE.loss_fn, **make(lambda step: jnp.where(step == 2, bad, 0.5)))
    model, state = CASE.model, optimizer.init(CASE.model, CASE.batch)
    step = eqx.filter_jit(optimizer.step)
    for i in range(4):
        after, new_state, info = step(model, state, CASE.batch, key=jax.random.key(i))
        if i == 2:
            assert_not_taken(model, state, after, new_state, info)
            with pytest.raises(ValueError, match=f"`{setting}` must"):
                optimizer.step(model, state, CASE.batch, key=jax.random.key(i))
        else:
            assert info.result == kfax.StepResult.successful
        model, state = after, new_state


def test_a_schedule_that_is_known_to_leave_its_range_is_an_error_within_jit():
    optimizer = kfax.Optimizer(CASE.loss_fn, **settings(learning_rate=kfax.NormConstraint(0.1, lambda step: jnp.nan)))
    state = optimizer.init(CASE.model, CASE.batch)
    with pytest.raises(ValueError, match="`bound` must be positive and finite, got nan"):
        eqx.filter_jit(optimizer.step)(CASE.model, state, CASE.batch, key=jax.random.key(0))


@grid(name=["learning_rate", "momentum", "damping"], value=[jnp.nan, jnp.inf, -0.5])
def test_what_is_given_to_one_step(name, value):
    optimizer = kfax.Optimizer(CASE.loss_fn, **settings())
    state = optimizer.init(CASE.model, CASE.batch)
    with pytest.raises(ValueError, match=f"`{name}` must"):
        optimizer.step(CASE.model, state, CASE.batch, key=jax.random.key(0), **{name: value})
    step = eqx.filter_jit(optimizer.step)
    given = {name: jnp.asarray(value)}
    after = step(CASE.model, state, CASE.batch, key=jax.random.key(0), **given)
    assert_not_taken(CASE.model, state, *after)


# From a number to the settings of an optimizer.
NUMBERS = {
    "learning rate": (lambda x: settings(learning_rate=x), -1.0),
    "momentum": (lambda x: settings(momentum=x), 1.5),
    "damping": (lambda x: settings(damping=x), 0.0),
    "l2": (lambda x: settings(l2=x), -1.0),
    "l2 of a part": (lambda x: settings(l2=kfax.L2(x, lambda model: model.layers[0])), -1.0),
    "bound": (lambda x: settings(learning_rate=kfax.NormConstraint(0.1, x)), 0.0),
    "multiple of the loss": (lambda x: settings(learning_rate=kfax.LossConstraint(0.1, x)), 0.0),
    "tolerance": (lambda x: settings(rejection=kfax.Rejection(x)), -1.0),
    "decay": (lambda x: preconditioned(estimator=kfax.BlockDiagonalCurvature(decay=x)), 1.5),
    "decay of the matrix": (lambda x: preconditioned(estimator=kfax.ExplicitExactCurvature(decay=x)), 0.0),
    "multiple": (lambda x: preconditioned(damping=kfax.DampingMultiple(x)), 0.0),
    "initial": (lambda x: settings(damping=kfax.LevenbergMarquardt(x)), -1.0),
    "decay of damping": (lambda x: settings(damping=kfax.LevenbergMarquardt(1.0, decay=x)), 1.5),
    "lower": (lambda x: settings(damping=kfax.LevenbergMarquardt(1.0, lower=x)), 0.9),
    "upper": (lambda x: settings(damping=kfax.LevenbergMarquardt(1.0, upper=x)), 0.1),
    "minimum": (lambda x: settings(damping=kfax.LevenbergMarquardt(1.0, minimum=x)), 1e9),
    "maximum": (lambda x: settings(damping=kfax.LevenbergMarquardt(1.0, maximum=x)), -1.0),
}


@grid(thin=2, name=NUMBERS, value=["nan", "out of range"])
def test_numbers_given_within_jit(name, value):
    make, wrong = NUMBERS[name]
    number = jnp.nan if value == "nan" else wrong
    with pytest.raises(ValueError, match="must"):
        kfax.Optimizer(CASE.loss_fn, **make(number))

    @eqx.filter_jit
    def train(number, model, batch):
        optimizer = kfax.Optimizer(CASE.loss_fn, **make(number))
        state = optimizer.init(model, batch)
        return state, *optimizer.step(model, state, batch, key=jax.random.key(0))

    state, model, new_state, info = train(jnp.asarray(number), CASE.model, CASE.batch)
    assert info.result == INVALID and info.update_norm == 0
    assert bool(eqx.tree_equal(model, CASE.model))
    assert new_state.curvature.average.weight == 0 and new_state.step == state.step + 1


def test_a_rule_of_ones_own_that_leaves_the_range():
    optimizer = kfax.Optimizer(CASE.loss_fn, **settings(damping=Rule(jnp.asarray(1.0))))
    state = optimizer.init(CASE.model, CASE.batch)
    optimizer = eqx.tree_at(lambda o: o.damping.number, optimizer, jnp.asarray(-1.0))
    with pytest.raises(ValueError, match="`damping` must be positive and finite, got -1"):
        optimizer.step(CASE.model, state, CASE.batch, key=jax.random.key(0))
    after = eqx.filter_jit(optimizer.step)(CASE.model, state, CASE.batch, key=jax.random.key(0))
    assert_not_taken(CASE.model, state, *after)


def test_calibrate_and_burn_in_keep_what_they_cannot_improve():
    make = NUMBERS["decay of damping"][0]

    @eqx.filter_jit
    def calibrate(decay, model, batch):
        optimizer = kfax.Optimizer(CASE.loss_fn, **make(decay))
        state = optimizer.init(model, batch)
        return optimizer.calibrate(model, state, batch, key=jax.random.key(0)).damping

    assert calibrate(jnp.asarray(1.5), CASE.model, CASE.batch) == 1.0

    @eqx.filter_jit
    def burn_in(decay, model, batch):
        optimizer = kfax.Optimizer(CASE.loss_fn, **NUMBERS["decay"][0](decay))
        state = optimizer.init(model, batch)
        return optimizer.burn_in(model, state, batch, key=jax.random.key(0)).curvature.average.weight

    weights = [burn_in(jnp.asarray(decay), CASE.model, CASE.batch) for decay in (1.5, 0.5)]
    assert weights == [0, 6]


LINKS = {
    "damping": lambda f: {"damping": f},
    "bound": lambda f: {"damping": 1.0, "norm_constraint": f},
    "preconditioner": lambda f: {"damping": 1.0, "preconditioner": kfax.Preconditioner(damping=f)},
}


@grid(name=LINKS)
def test_the_link_of_optax_makes_no_update(name):
    options = LINKS[name](lambda step: jnp.where(step == 1, -1.0, 0.5))
    optim: Any = optax.chain(kfax.scale_by_curvature(CASE.loss_fn, **options), optax.scale(-0.1))
    parameters = eqx.filter(CASE.model, eqx.is_inexact_array)
    gradient = eqx.filter_grad(lambda m: CASE.loss_fn(m, CASE.batch).value())(CASE.model)
    update, state = eqx.filter_jit(optim.update), optim.init(parameters)
    for i in range(3):
        inputs = {"model": CASE.model, "batch": CASE.batch, "key": jax.random.key(i)}
        updates, new_state = update(gradient, state, parameters, **inputs)
        moved = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))
        assert moved == (i != 1)
        if i == 1:
            old, new = state[0].preconditioner.curvature, new_state[0].preconditioner.curvature
            assert bool(eqx.tree_equal(old, new)) and new_state[0].step == 2
            with pytest.raises(ValueError, match="must be positive and finite"):
                optim.update(gradient, state, parameters, **inputs)
        state = new_state
