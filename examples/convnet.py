"""Trains a convolutional network with batch normalization, whose state is threaded: K-FAC against Adam.

Needs `pip install -e '.[examples]'`, and a minute on two cores. Prints a table, and saves a plot of the training loss.
"""

import argparse
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kfax


BATCH_SIZE, RATES = 128, (1e-1, 3e-2, 1e-2)  # the rates are those of Adam: the middle one is the best


def make_model(key):
    layers, (*keys, head_key) = [], jax.random.split(key, 4)
    for (num_inputs, num_outputs, stride), conv_key in zip([(1, 16, 1), (16, 32, 2), (32, 32, 2)], keys, strict=True):
        # No bias: the normalization would subtract it. Its averages would need more steps than these with 0.99.
        layers.append(eqx.nn.Conv2d(num_inputs, num_outputs, 3, stride, 1, use_bias=False, key=conv_key))
        layers.append(eqx.nn.BatchNorm(num_outputs, axis_name="batch", momentum=0.9, mode="batch"))
        layers.append(eqx.nn.PReLU(0.25))
    layers += [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(32 * 2 * 2, 10, key=head_key)]
    return kfax.tag(eqx.nn.Sequential(layers))


def loss_fn(model, batch, model_state):
    """Returns the loss, and the running averages of the normalizations with this batch included."""
    images, labels = batch
    logits, model_state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(images, model_state)
    return kfax.softmax_cross_entropy(logits, labels), model_state


def make_kfac(num_steps):
    """K-FAC's functions for the first state, and for a step."""
    curvature = kfax.Preconditioner(kfax.BlockDiagonalCurvature(example_axis="batch"))
    fixed = {"momentum": 0.9, "damping": 0.1, "preconditioner": curvature}
    optimizer = kfax.Optimizer(loss_fn, learning_rate=optax.cosine_decay_schedule(0.1, num_steps), **fixed)

    def init(model, batch, model_state):
        return optimizer.init(model, batch, model_state=model_state)

    def step(model, state, batch, model_state, key):
        model, state, info = optimizer.step(model, state, batch, model_state=model_state, key=key)
        return model, state, info.model_state

    return init, step


def make_adam(num_steps, rate):
    adam = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def objective(model, batch, model_state):
        loss, model_state = loss_fn(model, batch, model_state)
        return loss.value(), model_state

    def init(model, batch, model_state):
        return adam.init(eqx.filter(model, eqx.is_inexact_array))

    def step(model, state, batch, model_state, key):
        gradient, model_state = eqx.filter_grad(objective, has_aux=True)(model, batch, model_state)
        updates, state = adam.update(gradient, state)
        return eqx.apply_updates(model, updates), state, model_state

    return init, step


def train(name, init, step, task, batches, key):
    """Returns a curve of (steps, seconds, training loss, test accuracy), and seconds of compilation."""
    model, model_state, train_set, test_set = task
    started, step, state = time.perf_counter(), eqx.filter_jit(step), init(model, batches[0], model_state)
    # Steps are pure functions: the result of this one is dropped, only its compilation stays.
    jax.block_until_ready(step(model, state, batches[0], model_state, key))
    compile_seconds, seconds, curve = time.perf_counter() - started, 0.0, []

    @eqx.filter_jit
    def measure(model, model_state):
        model = eqx.nn.inference_mode(model)  # normalizes by the running averages
        logits, labels = loss_fn(model, test_set, model_state)[0].outputs, test_set[1]
        return loss_fn(model, train_set, model_state)[0].value(), jnp.mean(jnp.argmax(logits, axis=1) == labels)

    for i, batch in enumerate(track(batches, name), start=1):
        step_key = jax.block_until_ready(jax.random.fold_in(key, i))
        started = time.perf_counter()
        model, state, model_state = jax.block_until_ready(step(model, state, batch, model_state, step_key))
        seconds += time.perf_counter() - started
        if i % max(len(batches) // 50, 1) == 0 or i == len(batches):  # off the clock
            curve.append((i, seconds, *measure(model, model_state)))
    return np.array(curve, dtype=float), compile_seconds


def plot(runs, best, path):
    figure = Figure(figsize=(10, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    for column, ax in enumerate(figure.subplots(1, 2, sharey=True)):
        for (name, (curve, _)), style in zip(runs.items(), ("-", "-", "--", ":"), strict=True):
            look = {"color": {"K-FAC": "#0072B2", best: "#D55E00"}.get(name, "0.5"), "linewidth": 2, "label": name}
            ax.plot(curve[:, column], curve[:, 2], style, **look)
        ax.set(yscale="log", xlabel=("steps", "seconds of stepping")[column], ylabel="cross entropy, training set")
        ax.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the initial model and the order of the batches")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/convnet.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    images, labels = load_digits(return_X_y=True)
    data = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(*data, test_size=360, stratify=labels, random_state=0)
    train_set, test_set = jax.tree.map(jnp.asarray, ((train_x, train_y), (test_x, test_y)))
    shuffle, num_steps = np.random.default_rng(options.seed), 3 if options.smoke else options.steps
    indices = [shuffle.choice(len(train_y), BATCH_SIZE, replace=False) for _ in range(num_steps)]
    batches = [jax.tree.map(lambda x, i=i: x[i], train_set) for i in indices]
    model_key, key = jax.random.split(jax.random.key(options.seed))
    model, model_state = eqx.nn.make_with_state(make_model)(model_key)
    print(kfax.coverage(model))

    optimizers = {"K-FAC": make_kfac(num_steps)} | {f"Adam {r:g}": make_adam(num_steps, r) for r in RATES}
    task = model, model_state, train_set, test_set
    runs = {name: train(name, *pair, task, batches, key) for name, pair in optimizers.items()}
    best = min((name for name in runs if name != "K-FAC"), key=lambda name: runs[name][0][-1, 2])
    plot(runs, best, options.output)
    columns = [Column(name, justify="right") for name in ("train loss", "test accuracy", "seconds", "compile s")]
    table = Table("optimizer", *columns, title=f"{num_steps} steps on batches of {BATCH_SIZE}")
    for name, (curve, compile_seconds) in runs.items():
        seconds, loss, accuracy = curve[-1, 1:]
        table.add_row(name, f"{loss:.2e}", f"{accuracy:.1%}", f"{seconds:.2f}", f"{compile_seconds:.1f}")
    rich.print(table)


if __name__ == "__main__":
    main()
