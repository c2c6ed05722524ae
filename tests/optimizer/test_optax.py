"""The preconditioner as a link in a chain of optax."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import grid, make_case
from helpers import assert_close, parameters
from jax.flatten_util import ravel_pytree

import kfax


EXACT = kfax.BlockDiagonalCurvature(kfax.ExactGGN())


def run(optim, case, steps=4, model=None, loss_fn=None):
    model, loss_fn = model or case.model, loss_fn or case.loss_fn
    state = optim.init(parameters(model))

    @eqx.filter_jit
    def step(model, state, key):
        gradients = eqx.filter_grad(lambda model: loss_fn(model, case.batch).value())(model)
        updates, state = optim.update(gradients, state, parameters(model), model=model, batch=case.batch, key=key)
        return eqx.apply_updates(model, updates), state, updates

    history = []
    for i in range(steps):
        model, state, updates = step(model, state, jax.random.key(i))
        history.append((model, state, updates))
    return history


@grid(slow=lambda kind: kind == "plain", kind=["plain", "amortized"])
def test_a_chain_is_the_optimizer(kind):
    """With momentum and learning rate from optax."""
    case = make_case("mlp-scan", "softmax")
    preconditioner = kfax.Preconditioner(EXACT, inverse_update_period=3)
    if kind == "amortized":
        preconditioner = kfax.Preconditioner(EXACT, inverse_update_period=kfax.Staggered(2), curvature_update_period=2)
    damping = kfax.RelativeDamping(optax.exponential_decay(1.0, 1, 0.5))
    link = kfax.scale_by_curvature(case.loss_fn, damping=damping, preconditioner=preconditioner)
    found = run(optax.chain(link, optax.trace(0.9), optax.scale(-0.1)), case)
    as_it_is = kfax.LossConstraint(0.1, jnp.inf)
    optimizer = kfax.Optimizer(
        case.loss_fn, learning_rate=as_it_is, momentum=0.9, damping=damping, preconditioner=preconditioner
    )
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    for i in range(4):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(i))
    assert_close(parameters(found[-1][0]), parameters(model))
    assert_close(found[-1][1][0].preconditioner, state.preconditioner)


def test_a_norm_constraint_bounds_the_update():
    case = make_case("mlp", "softmax")
    plain = kfax.scale_by_curvature(case.loss_fn, damping=0.1, preconditioner=kfax.Preconditioner(EXACT))
    schedule = lambda step: 1e-3 / (1 + step)  # noqa: E731
    bounded = kfax.scale_by_curvature(
        case.loss_fn, damping=0.1, preconditioner=kfax.Preconditioner(EXACT), norm_constraint=schedule
    )
    [(_, _, full)], [(_, state, short)] = run(plain, case, 1), run(bounded, case, 1)
    update = ravel_pytree(short)[0]
    gradient = ravel_pytree(eqx.filter_grad(lambda m: case.loss_fn(m, case.batch).value())(case.model))[0]
    assert_close(update / jnp.linalg.norm(update), ravel_pytree(full)[0] / jnp.linalg.norm(ravel_pytree(full)[0]))
    # uᵀ(C + λI)u for u = c P∇h is c ∇hᵀu.
    ratio = jnp.linalg.norm(update) / jnp.linalg.norm(ravel_pytree(full)[0])
    assert_close(ratio * gradient @ update, jnp.asarray(1e-3))
    assert state.step == 1


def test_frozen_parameters_and_gradients_that_are_not_finite():
    case = make_case("mlp", "softmax")
    link = kfax.scale_by_curvature(case.loss_fn, damping=0.1, frozen=lambda m: m.layers[0])
    model, before, updates = run(link, case, 1)[0]
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(updates.layers[0]))
    assert bool(eqx.tree_equal(model.layers[0], case.model.layers[0]))
    nans = jax.tree.map(lambda x: x * jnp.nan, updates)
    arguments: Any = {"model": case.model, "batch": case.batch, "key": jax.random.key(0)}
    update: Any = eqx.filter_jit(link.update)
    zeros, after = update(nans, before, None, **arguments)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(zeros))
    assert bool(eqx.tree_equal(after.preconditioner, before.preconditioner)) and after.step == 2


def test_mistakes():
    case = make_case("mlp", "softmax")
    with pytest.raises(ValueError, match="`LevenbergMarquardt` adapts λ by the loss after each step"):
        kfax.scale_by_curvature(case.loss_fn, damping=kfax.LevenbergMarquardt(1.0))
    link = kfax.scale_by_curvature(case.loss_fn, damping=1.0)
    gradients = parameters(case.model)
    with pytest.raises(ValueError, match="needs to see model and batch: call `optim.update"):
        link.update(gradients, link.init(gradients), gradients)
    with pytest.raises(ValueError, match="`norm_constraint` must be positive"):
        kfax.scale_by_curvature(case.loss_fn, damping=1.0, norm_constraint=0.0)
    plain = kfax.untag(gradients)
    with pytest.raises(ValueError, match="is one of the two not tagged"):
        link.update(plain, link.init(gradients), model=case.model, batch=case.batch)


@pytest.mark.parametrize("period", [4, kfax.Staggered(4)], ids=["period", "staggered"])
def test_a_first_gradient_that_is_not_finite_costs_one_step(period):
    """The inverses are then due at the next step, and not only in their turn."""
    case = make_case("mlp", "softmax")
    preconditioner = kfax.Preconditioner(EXACT, inverse_update_period=period)
    optim = kfax.scale_by_curvature(case.loss_fn, damping=0.1, preconditioner=preconditioner)
    gradient = eqx.filter_grad(lambda model: case.loss_fn(model, case.batch).value())(case.model)
    update = eqx.filter_jit(lambda g, state: optim.update(g, state, model=case.model, batch=case.batch))
    updates, state = update(jax.tree.map(lambda g: g * jnp.nan, gradient), optim.init(parameters(case.model)))
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, _ = update(gradient, state)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(updates))


def test_an_ensemble_refreshes_only_when_due():
    """Though optax maps the counter as well."""
    case = make_case("mlp", "softmax")
    optim = kfax.scale_by_curvature(case.loss_fn, damping=0.1, preconditioner=kfax.Preconditioner(EXACT))
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]) if eqx.is_inexact_array(x) else x, case.model)
    states = eqx.filter_vmap(lambda model: optim.init(parameters(model)))(models)

    @eqx.filter_vmap
    def update(model, state):
        return optim.update(parameters(model), state, model=model, batch=case.batch)

    dynamic, static = eqx.partition((models, states), eqx.is_array)
    program = jax.make_jaxpr(lambda d: eqx.filter(update(*eqx.combine(d, static)), eqx.is_array))(dynamic)
    assert "cholesky" in str(program)
    assert not any("cholesky" in str(equation) for equation in program.eqns if equation.primitive.name != "cond")
