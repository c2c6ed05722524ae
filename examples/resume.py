"""Trains a classifier of digits that may be killed at any moment: run it again, and it goes on to the same result.

Needs `pip install -e '.[examples]'`. Model, optimizer state and the losses so far are written to one file, which
replaces the old one at once, so that there is always a whole one. Batches and keys follow from the number of the step.
Saves a plot of the losses, with another color for each process that took part.
"""

import argparse
import hashlib
import os
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import kfax


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def save(path, history, model_and_state):
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        np.save(file, np.array(history))
        eqx.tree_serialise_leaves(file, model_and_state)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path, like):
    """The history, and model and state with the shapes and dtypes of `like`, whose values are replaced."""
    with open(path, "rb") as file:
        return np.load(file).tolist(), *eqx.tree_deserialise_leaves(file, like)


def plot(history, path):
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    steps, (losses, processes) = np.arange(1, len(history) + 1), np.array(history).T
    for process in np.unique(processes):
        part = processes == process
        ax.plot(steps[part], losses[part], ".-", label=f"process {process + 1:.0f}")
    ax.set(yscale="log", xlabel="steps", ylabel="cross entropy of the batch")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="how many steps between two checkpoints")
    parser.add_argument("--checkpoint", type=pathlib.Path, default="examples/output/resume.eqx")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/resume.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    model = kfax.tag(eqx.nn.MLP(64, 10, 32, 2, activation=jnp.tanh, key=jax.random.key(0)))
    optimizer = kfax.stochastic(loss_fn, learning_rate=0.1)
    history, state = [], eqx.filter_jit(optimizer.init)(model, (images[:128], labels[:128]))
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if options.checkpoint.exists():
        history, model, state = load(options.checkpoint, (model, state))
        print(f"goes on from step {state.step}", flush=True)
    process = 1 + history[-1][1] if history else 0
    step = eqx.filter_jit(optimizer.step)
    for i in range(int(state.step), num_steps):
        chosen = np.random.default_rng(i).permutation(len(images))[:128]
        key = jax.random.fold_in(jax.random.key(1), i)
        model, state, info = step(model, state, (images[chosen], labels[chosen]), key=key)
        history.append((float(info.loss), process))
        if (i + 1) % options.every == 0 or i + 1 == num_steps:
            save(options.checkpoint, history, (model, state))
            print(f"step {i + 1}, loss {info.loss:.6f}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plot(history, options.output)
    leaves = jax.tree.leaves(eqx.filter((model, state), eqx.is_array))
    print("digest", hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())


if __name__ == "__main__":
    main()
