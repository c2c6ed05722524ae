"""A small model with optimizers of every kind that may have to leave a step out."""

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import mlp

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
