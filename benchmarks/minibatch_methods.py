"""What `minibatch.py` compares: methods with the numbers that are tuned for each of them.

A variant of K-FAC is a function from the sampled numbers to a `kfax.Optimizer`, and a line in `METHODS`:

    def no_momentum(task, numbers, rate):
        estimator = kfax.BlockDiagonalCurvature(example_axis="batch")
        preconditioner = kfax.Preconditioner(estimator, inverse_update_period=kfax.Staggered(10))
        learning_rate = kfax.NormConstraint(rate, 1e-3)
        return kfax.Optimizer(task.loss_fn, learning_rate=learning_rate, momentum=0.0, damping=numbers["damping"], ...)

`numbers` are traced, and `rate` is a schedule of them: one program runs all trials.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from minibatch_soap import scale_by_soap
from scipy.stats import qmc

import kfax


class LogUniform(NamedTuple):
    """From low to high, evenly in the logarithm."""

    low: float
    high: float

    def __call__(self, uniform):
        return self.low * (self.high / self.low) ** uniform


class Choice(NamedTuple):
    """One of several values."""

    values: tuple

    def __call__(self, uniform):
        return self.values[int(uniform * len(self.values))]


class Method(NamedTuple):
    """`make(task, numbers, rate)` returns the two functions of a training run; `space` says what is tuned, and how."""

    make: Callable
    space: dict[str, LogUniform | Choice]

    def trials(self, count):
        """The numbers of each trial, well spread over the space; the first ones are the same for any count."""
        points = qmc.Halton(len(self.space), rng=0).random(count)
        names = list(self.space)
        return [{name: float(self.space[name](u)) for name, u in zip(names, point, strict=True)} for point in points]


def schedule(numbers):
    """Linearly up in a part of all steps, then down to zero as a cosine; the first step is taken."""
    warmup = numbers["warmup"] * numbers["steps"]

    def rate(step):
        up = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1)
        progress = jnp.clip((step - warmup) / (numbers["steps"] - warmup), 0, 1)
        return numbers["rate"] * up * (1 + jnp.cos(jnp.pi * progress)) / 2

    return rate


def from_optax(make):
    """Of a function from the sampled numbers to a transformation of gradients."""

    def functions(task, numbers, rate):
        transform = make(task, numbers, rate)

        def objective(model, batch, model_state):
            loss, model_state = task.loss_fn(model, batch, model_state)
            return loss.value(), model_state

        def init(model, batch, model_state):
            return transform.init(eqx.filter(model, eqx.is_inexact_array))

        def step(model, state, batch, model_state, key):
            evaluate = eqx.filter_value_and_grad(objective, has_aux=True)
            (loss, model_state), gradient = evaluate(model, batch, model_state)
            updates, state = transform.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state, model_state, loss

        return init, step

    return functions


def from_kfax(make):
    """Of a function from the sampled numbers to an optimizer."""

    def functions(task, numbers, rate):
        optimizer = make(task, numbers, rate)

        def init(model, batch, model_state):
            return optimizer.init(model, batch, model_state=model_state)

        def step(model, state, batch, model_state, key):
            model, state, info = optimizer.step(model, state, batch, model_state=model_state, key=key)
            return model, state, info.model_state, info.loss

        return init, step

    return functions


def adamw(task, numbers, rate):
    return optax.adamw(rate, b2=0.99, weight_decay=numbers["weight_decay"])


def muon(task, numbers, rate):
    """Of matrices and kernels, as matrices with a row for each output; AdamW of the head and of vectors."""

    def matrices(parameters):
        head = task.head(parameters)

        def numbers_of(x):
            if x is head or x.ndim < 2 or min(x.shape[:2]) == 1:
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(1, x.ndim)), 0)

        return jax.tree.map(numbers_of, parameters)

    decay = numbers["weight_decay"]
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        adam_b2=0.99,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def soap(task, numbers, rate):
    decay = optax.add_decayed_weights(numbers["weight_decay"])
    return optax.chain(scale_by_soap(), decay, optax.scale_by_learning_rate(rate))


def kron(task, numbers, rate):
    """PSGD with a Kronecker product for each matrix, in the form that whitens gradients; kernels as matrices."""
    import psgdax

    return optax.chain(
        psgdax.scale_by_kron(whiten_grad=True, preconditioner_update_probability=1.0),
        optax.add_decayed_weights(numbers["weight_decay"]),
        optax.scale_by_learning_rate(rate),
    )


def kfac(task, numbers, rate):
    """K-FAC itself, with the settings of the documentation."""
    estimator = kfax.BlockDiagonalCurvature(example_axis="batch")
    return kfax.Optimizer(
        task.loss_fn,
        learning_rate=kfax.NormConstraint(rate, 1e-3),
        momentum=0.9,
        damping=numbers["damping"],
        l2=numbers["l2"],
        preconditioner=kfax.Preconditioner(estimator, inverse_update_period=kfax.Staggered(10)),
    )


def kfax_stochastic(task, numbers, rate):
    estimator = kfax.BlockDiagonalCurvature(example_axis="batch", decay=0.6)
    decay = numbers["weight_decay"]
    return kfax.stochastic(task.loss_fn, learning_rate=rate, weight_decay=decay, estimator=estimator)


WARMUP = {"warmup": Choice((0.02, 0.1, 0.3))}
FIRST_ORDER = {"rate": LogUniform(3e-3, 6e-2), "weight_decay": LogUniform(1e-3, 1.0), **WARMUP}
WHITENED = {"rate": LogUniform(6e-4, 1.2e-2), "weight_decay": LogUniform(3e-3, 3.0), **WARMUP}
RATE_ONLY = {"rate": Choice((0.01, 0.02, 0.04)), "weight_decay": Choice((0.0,)), "warmup": Choice((0.1,))}
KFAC = {"rate": LogUniform(1e-2, 1.0), "damping": LogUniform(1e-3, 1.0), "l2": LogUniform(1e-6, 1e-3), **WARMUP}

METHODS = {
    "adamw": Method(from_optax(adamw), FIRST_ORDER),
    "muon": Method(from_optax(muon), FIRST_ORDER),
    "soap": Method(from_optax(soap), FIRST_ORDER),
    "kfac": Method(from_kfax(kfac), KFAC),
    "kfax": Method(from_kfax(kfax_stochastic), FIRST_ORDER),
    "kfax, rate only": Method(from_kfax(kfax_stochastic), RATE_ONLY),
}
if importlib.util.find_spec("psgdax"):  # `pip install psgdax`
    METHODS["kron"] = Method(from_optax(kron), WHITENED)
