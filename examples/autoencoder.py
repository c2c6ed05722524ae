"""Trains a deep autoencoder: K-FAC that adapts learning rate, momentum and damping by itself, against Adam.

Run `python examples/autoencoder.py` (it needs `pip install "kfax[examples]"`, and about a minute on two cores) for full
batches of handwritten digits, with `--data curves` for images of random curves, with `--batch-size 256` for mini-batches.
It prints a table and saves a plot of the training loss and of reconstructed test images.
"""

import argparse
import functools
import itertools
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kfax


L2 = 1e-5
RATES = (1e-2, 3e-3, 1e-3)  # of Adam: the middle one is the best
SIZES = {"digits": (64, 256, 128, 64, 10), "curves": (784, 400, 200, 100, 50, 25, 6)}  # of the encoder's layers


def draw_curves(number, seed):
    """Images of 28x28 pixels of a smooth curve, given by three random points."""
    points = np.random.default_rng(seed).uniform(4, 23, (number, 3, 2)).astype(np.float32)
    pixels, image = np.arange(28, dtype=np.float32), np.zeros((number, 28, 28), np.float32)
    for t in np.linspace(0, 1, 48):
        weights = np.array([2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)], np.float32)
        column, row = np.exp(-((pixels - (weights @ points)[..., None]) ** 2) / (2 * 0.8**2)).swapaxes(0, 1)
        image = np.maximum(image, row[:, :, None] * column[:, None, :])
    return image.reshape(number, 784)


def make_model(sizes, key):
    """Layers of the sizes and back, with tanh after all but the code and the output."""
    layers, sizes = [], (*sizes, *reversed(sizes[:-1]))
    for i, (num_inputs, num_outputs) in enumerate(itertools.pairwise(sizes), start=1):
        layer = eqx.nn.Linear(num_inputs, num_outputs, dtype=jnp.float32, key=jax.random.fold_in(key, i))
        # Weights of variance 1/num_inputs, not a third of it, carry the signal through so many layers.
        layers.append(eqx.tree_at(lambda layer: layer.weight, layer, replace_fn=lambda weight: 3**0.5 * weight))
        if i not in (len(sizes) // 2, len(sizes) - 1):
            layers.append(eqx.nn.Lambda(jnp.tanh))
    return kfax.tag(eqx.nn.Sequential(layers))


def loss_fn(model, batch):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)


def objective(model, batch):
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))]
    return loss_fn(model, batch).value() + L2 / 2 * sum(squares)


def make_kfac(model, batch, is_full):
    """The first state of K-FAC, and its step."""
    exact, damping = kfax.QuadraticModel(), kfax.LevenbergMarquardt(initial=0.1)
    # On a small batch the model of the batch would be trusted too much: there the coefficients are fixed.
    alpha, beta, damping = (exact, exact, damping) if is_full else (0.1, 0.9, 0.3)
    optimizer = kfax.Optimizer(loss_fn, learning_rate=alpha, momentum=beta, damping=damping, l2=L2)
    return optimizer.init(model, batch), optimizer.step


def make_adam(model, batch, rate):
    """The first state of Adam, and its step."""
    del batch
    transform = optax.adam(rate)

    def step(model, state, batch, key):
        del key
        loss, gradient = eqx.filter_value_and_grad(objective)(model, batch)
        updates, state = transform.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    return transform.init(eqx.filter(model, eqx.is_inexact_array)), step


def train(make_optimizer, model, train_set, batches, key, advance):
    """Takes a step for each of the batches, which are arrays of indices.

    Returns the model, a curve with rows of steps, seconds and training loss, and the seconds of compilation.
    """
    started = time.perf_counter()
    state, step = make_optimizer(model, train_set[batches[0]])
    step = eqx.filter_jit(step)
    # Steps are pure functions: the result of this one is dropped, only its compilation stays.
    jax.block_until_ready(step(model, state, train_set[batches[0]], key=key))
    compile_seconds = time.perf_counter() - started

    measure = eqx.filter_jit(objective)
    seconds, curve = 0.0, [(0, 0.0, float(measure(model, train_set)))]
    for i, indices in enumerate(batches, start=1):
        batch, step_key = jax.block_until_ready((train_set[indices], jax.random.fold_in(key, i)))
        started = time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, batch, key=step_key))
        seconds += time.perf_counter() - started
        curve.append((i, seconds, float(measure(model, train_set))))  # off the clock
        advance()
    return model, np.array(curve), compile_seconds


def plot(curves, best, entropy, images, path):
    figure = Figure(figsize=(10, 7), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    axes = figure.subplot_mosaic([["steps", "seconds"], ["images", "images"]], height_ratios=(3, 2))
    for i, ax in enumerate((axes["steps"], axes["seconds"])):
        for (name, curve), style in zip(curves.items(), (("#0072B2", 2.5, "-"), ), strict=False):
            pass
