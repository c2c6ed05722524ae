"""Optimizers of every kind, and a few steps with them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import kfax


def exact_ggn(period=3, source: Any = kfax.ExactGGN, **options):
    return kfax.Preconditioner(kfax.BlockDiagonalCurvature(source()), inverse_update_period=period, **options)


def adaptive(loss_fn, **options):
    settings = {
        "learning_rate": kfax.QuadraticModel(),
        "momentum": kfax.QuadraticModel(),
        "damping": kfax.LevenbergMarquardt(1.0, period=2),
        "preconditioner": exact_ggn(),
        "l2": 1e-3,
    }
    return kfax.Optimizer(loss_fn, **(settings | options))


def fixed(loss_fn, **options):
    settings = {"learning_rate": 0.1, "momentum": 0.9, "damping": 0.5}
    return adaptive(loss_fn, **(settings | options))


KINDS = {
    "adaptive": adaptive,
    "fixed": fixed,
    "scheduled": lambda f, **o: fixed(
        f,
        learning_rate=optax.cosine_decay_schedule(0.1, 10),
        momentum=optax.linear_schedule(0.0, 0.9, 5),
        damping=optax.exponential_decay(1.0, 3, 0.5),
        **o,
    ),
    "mixed": lambda f, **o: fixed(f, learning_rate=kfax.QuadraticModel(), damping=kfax.LevenbergMarquardt(1.0), **o),
    "amortized": lambda f, **o: fixed(
        f, preconditioner=exact_ggn(curvature_update_period=2), damping=kfax.LevenbergMarquardt(0.1, period=1), **o
    ),
    "random": lambda f, **o: adaptive(f, preconditioner=exact_ggn(source=kfax.SampledFisher), **o),
}


def begin(optimizer, case, **inputs):
    """The first state, without the check, which has tests of its own and takes a second."""
    return eqx.filter_jit(optimizer.init)(case.model, case.batch, **inputs)


def run(optimizer, case, steps=7):
    model, state = case.model, begin(optimizer, case)
    step, infos = eqx.filter_jit(optimizer.step), []
    for i in range(steps):
        model, state, info = step(model, state, case.batch, key=jax.random.key(i))
        infos.append(info)
    return model, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
