"""Classifies handwritten digits: K-FAC with a scheduled learning rate against Adam, on the same mini-batches.

Needs `pip install -e '.[examples]'`, and a minute on two cores. Prints a table, and saves a plot of the training loss.
"""

import argparse
import functools
import pathlib
import time
from typing import NamedTuple

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


BATCH_SIZE, RATES = 128, (1e-1, 3e-2, 1e-2)  # the rates are those of Adam: the middle one is the best


class Task(NamedTuple):
    """What every optimizer is given: the initial model, the data, and for each step the indices of its batch."""

    model: eqx.Module
    train_set: tuple[jax.Array, jax.Array]
    test_set: tuple[jax.Array, jax.Array]
    indices: np.ndarray
    key: jax.Array

    def batch(self, step):
        return jax.tree.map(lambda x: x[self.indices[step]], self.train_set)


class Run(NamedTuple):
    """What one optimizer did. Its curve has rows of steps, seconds, and the loss on the whole training set."""

    name: str
    curve: np.ndarray
    accuracy: float
    compile_seconds: float


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def make_kfac(task):
    """The first state of K-FAC, and its step."""
    schedule = optax.cosine_decay_schedule(0.1, len(task.indices))
    optimizer = kfax.Optimizer(loss_fn, learning_rate=schedule, momentum=0.9, damping=0.1)
    return optimizer.init(task.model, task.batch(0)), optimizer.step


def make_adam(task, learning_rate):
    """The first state of Adam, and its step, with a schedule of the same shape."""
    transform = optax.adam(optax.cosine_decay_schedule(learning_rate, len(task.indices)))

    def step(model, state, batch, key):
        del key
        loss, gradient = eqx.filter_value_and_grad(lambda model: loss_fn(model, batch).value())(model)
        updates, state = transform.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    return transform.init(eqx.filter(task.model, eqx.is_inexact_array)), step


def train(name, make_optimizer, task, advance):
    started = time.perf_counter()
    state, step = make_optimizer(task)
    step = eqx.filter_jit(step)
    # Steps are pure functions: the result of this one is dropped, only its compilation stays.
    jax.block_until_ready(step(task.model, state, task.batch(0), key=task.key))
    compile_seconds = time.perf_counter() - started

    measure = eqx.filter_jit(lambda model: loss_fn(model, task.train_set).value())
    model, seconds, num_steps, curve = task.model, 0.0, len(task.indices), [(0, 0.0, float(measure(task.model)))]
    for i in range(num_steps):
        batch, key = jax.block_until_ready((task.batch(i), jax.random.fold_in(task.key, i)))
        started = time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, batch, key=key))
        seconds += time.perf_counter() - started
        if (i + 1) % max(num_steps // 50, 1) == 0 or i + 1 == num_steps:  # off the clock
            curve.append((i + 1, seconds, float(measure(model))))
        advance()
    correct = jnp.argmax(jax.vmap(model)(task.test_set[0]), axis=1) == task.test_set[1]
    return Run(name, np.array(curve), float(correct.mean()), compile_seconds)


def plot(kfac, adams, best, path):
    figure = Figure(figsize=(10, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    axes = figure.subplots(1, 2, sharey=True)
    for column, ax in enumerate(axes):
        for run, style in zip(adams, ("-", "--", ":"), strict=True):
            color, label = ("#D55E00", f"{run.name} (best)") if run is best else ("0.5", run.name)
            ax.plot(run.curve[:, column], run.curve[:, 2], style, color=color, label=label)
        ax.plot(kfac.curve[:, column], kfac.curve[:, 2], color="#0072B2", linewidth=2.5, label=kfac.name)
        ax.set(yscale="log", xlabel=("steps", "seconds of stepping, without compilation")[column])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("cross entropy on the training set")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the initial model and the order of the batches")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/digits_classifier.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps

    images, labels = load_digits(return_X_y=True)
    data = (images / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(*data, test_size=360, stratify=labels, random_state=0)
    train_set, test_set = jax.tree.map(jnp.asarray, ((train_x, train_y), (test_x, test_y)))
    shuffle = np.random.default_rng(options.seed)
    indices = np.stack([shuffle.choice(len(train_y), BATCH_SIZE, replace=False) for _ in range(num_steps)])
    model_key, key = jax.random.split(jax.random.key(options.seed))
    model = kfax.tag(eqx.nn.MLP(64, 10, 128, 2, dtype=jnp.float32, key=model_key))
    print(kfax.coverage(model))

    optimizers = {"K-FAC": make_kfac} | {f"Adam {r:g}": functools.partial(make_adam, learning_rate=r) for r in RATES}
    task = Task(model, train_set, test_set, indices, key)
    with Progress() as progress:
        bar = progress.add_task("training", total=len(optimizers) * num_steps)
        kfac, *adams = [train(*item, task, lambda: progress.advance(bar)) for item in optimizers.items()]
    best = min(adams, key=lambda run: run.curve[-1, 2])
    plot(kfac, adams, best, options.output)
    columns = [Column(name, justify="right") for name in ("train loss", "test accuracy", "seconds", "compile s")]
    title = f"{num_steps} steps on batches of {BATCH_SIZE}; Adam: best of {len(RATES)} learning rates"
    table = Table("optimizer", *columns, title=title)
    for name, (_, seconds, loss), accuracy, compiled in [(run.name, run.curve[-1], *run[2:]) for run in (kfac, best)]:
        table.add_row(name, f"{loss:.2e}", f"{accuracy:.1%}", f"{seconds:.2f}", f"{compiled:.1f}")
    progress.console.print(table)


if __name__ == "__main__":
    main()
