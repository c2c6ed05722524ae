"""Optimizers with a given preconditioner, and gradients and matrices to compare their steps with."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import flat, parameters
from jax.flatten_util import ravel_pytree
from reference import ggn

import kfax


EXACT = kfax.BlockDiagonalCurvature(kfax.ExactGGN())


def make(loss_fn, preconditioner, **options):
    settings: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.0, "damping": 0.1}
    return kfax.Optimizer(loss_fn, preconditioner=preconditioner, **(settings | options))


def train(optimizer, model, batches, **inputs):
    state = eqx.filter_jit(optimizer.init)(model, batches[0])
    step, history = eqx.filter_jit(optimizer.step), []
    for i, batch in enumerate(batches):
        before = model
        model, state, info = step(model, state, batch, key=jax.random.key(i), **inputs)
        history.append((before, model, state, info))
    return history


def objective(case, parameters):
    return jnp.mean(jax.vmap(case.one)(case.outputs(parameters), case.y))


def change(before, after):
    """Parameters before, how to unravel them, and their change, raveled."""
    theta, unravel = ravel_pytree(parameters(before))
    return theta, unravel, flat(parameters(after)) - theta


def gradient_at(case, theta, unravel):
    return jax.grad(lambda v: objective(case, unravel(v)))(theta)


def ggn_at(case, model, batch):
    return ggn(lambda p: jax.vmap(kfax.untag(eqx.combine(p, model)))(batch[0]), parameters(model), case.one, batch[1])
