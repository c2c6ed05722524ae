"""Trains a deep autoencoder: K-FAC that adapts learning rate, momentum and damping by itself, against Adam.

Needs `pip install -e '.[examples]'`, and two minutes on two cores. `--help` tells of other data and of mini-batches.
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
from rich.table import Table
from sklearn.datasets import load_digits

import kfax


L2, RATES = 1e-5, (1e-2, 3e-3, 1e-3)  # the rates are those of Adam
SIZES = {"digits": (64, 256, 128, 64, 10), "curves": (784, 400, 200, 100, 50, 25, 6)}  # of the encoder


def draw_curves(number, seed):
    """Images of 28x28 pixels of a smooth curve, given by three random points."""
    points = np.random.default_rng(seed).uniform(4, 23, (number, 3, 2)).astype(np.float32)
    pixels, images = np.arange(28, dtype=np.float32), np.zeros((number, 28, 28), np.float32)
    for t in np.linspace(0, 1, 48):
        weights = np.array([2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)], np.float32)
        column, row = np.exp(-((pixels - (weights @ points)[..., None]) ** 2) / (2 * 0.8**2)).swapaxes(0, 1)
        images = np.maximum(images, row[:, :, None] * column[:, None, :])
    return images.reshape(number, 784)


def make_model(sizes, key):
    layers, sizes = [], (*sizes, *reversed(sizes[:-1]))
    for i, (num_inputs, num_outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
        layer = eqx.nn.Linear(num_inputs, num_outputs, dtype=jnp.float32, key=jax.random.fold_in(key, i))
        # Weights of variance 1/num_inputs, not a third of it, carry the signal through so many layers.
        layers.append(eqx.tree_at(lambda layer: layer.weight, layer, replace_fn=lambda weight: 3**0.5 * weight))
        layers.append(eqx.nn.Lambda(jnp.tanh) if i not in (len(sizes) // 2, len(sizes) - 1) else eqx.nn.Identity())
    return kfax.tag(eqx.nn.Sequential(layers))


def loss_fn(model, batch):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)


def objective(model, batch):
    parameters = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return loss_fn(model, batch).value() + L2 / 2 * sum(jnp.sum(jnp.square(x)) for x in parameters)


def make_kfac(is_full):
    auto, rule = kfax.QuadraticModel(), kfax.LevenbergMarquardt(initial=0.1)
    # Mini-batches vary too much for their quadratic models to be trusted, and for inverses of five steps ago.
    alpha, beta, damping, period = (auto, auto, rule, 5) if is_full else (0.1, 0.9, 0.3, 1)
    settings = {"damping": damping, "l2": L2, "preconditioner": kfax.Preconditioner(inverse_update_period=period)}
    optimizer = kfax.Optimizer(loss_fn, learning_rate=alpha, momentum=beta, **settings)
    return optimizer.init, optimizer.step


def make_adam(rate):
    adam = optax.adam(rate)

    def step(model, state, batch, key):
        loss, gradient = eqx.filter_value_and_grad(objective)(model, batch)
        updates, state = adam.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    return lambda model, batch: adam.init(eqx.filter(model, eqx.is_inexact_array)), step


def train(name, init, step, task, batches, key):
    """Returns a curve of (steps, seconds, training loss, test error), the best images, and seconds of compilation."""
    (model, train_set, test_set), seconds, curve, images = task, 0.0, [], []
    started, step = time.perf_counter(), eqx.filter_jit(step)
    state = init(model, train_set[batches[0]])
    # Steps are pure functions: the result of this one is dropped, only its compilation stays.
    jax.block_until_ready(step(model, state, train_set[batches[0]], key=key))
    compile_seconds = time.perf_counter() - started
    measure = eqx.filter_jit(lambda model: (objective(model, train_set), jax.nn.sigmoid(jax.vmap(model)(test_set))))
    for i, indices in enumerate(track(batches, name), start=1):
        batch, step_key = jax.block_until_ready((train_set[indices], jax.random.fold_in(key, i)))
        started = time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, batch, key=step_key))
        seconds += time.perf_counter() - started
        loss, reconstructed = measure(model)  # off the clock
        curve.append((i, seconds, loss, jnp.mean(jnp.sum(jnp.square(reconstructed - test_set), axis=1))))
        images.append(reconstructed[:16])
    curve = np.array(curve, dtype=float)
    return curve, images[curve[:, 3].argmin()], compile_seconds


def plot(runs, best, train_set, test_set, path):
    entropy = np.mean(np.sum(jax.scipy.special.entr(train_set) + jax.scipy.special.entr(1 - train_set), axis=1))
    figure = Figure(figsize=(10, 6.5), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    axes = figure.subplot_mosaic([["steps", "seconds of stepping"], ["images", "images"]], height_ratios=(3, 2))
    for column, quantity in enumerate(("steps", "seconds of stepping")):
        for (name, (curve, *_)), style in zip(runs.items(), ("-", "-", "--", ":"), strict=True):
            look = {"color": {"K-FAC": "#0072B2", best: "#D55E00"}.get(name, "0.5"), "linewidth": 2, "label": name}
            axes[quantity].plot(curve[:, column], curve[:, 2] - entropy, style, **look)
        axes[quantity].set(yscale="log", xlabel=quantity, ylabel="training loss, less the entropy of the data")
        axes[quantity].grid(alpha=0.3)
    figure.legend(*axes["steps"].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    tiles, side = np.stack([test_set[:16], runs["K-FAC"][1], runs[best][1]]), int(test_set.shape[1] ** 0.5)
    tiles = np.pad(tiles.reshape(3, 16, side, side), ((0, 0), (0, 0), (1, 1), (1, 1))).swapaxes(1, 2)
    axes["images"].imshow(tiles.reshape(3 * (side + 2), -1), cmap="gray_r")
    axes["images"].set(xticks=[], yticks=(np.arange(3) + 0.5) * (side + 2), yticklabels=("test images", "K-FAC", best))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=SIZES, default="digits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, help="if not given, all of the training set")
    parser.add_argument("--seed", type=int, default=0, help="of the initial model and the order of the batches")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/autoencoder.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    test_set, train_set = np.split(np.random.default_rng(0).permutation(load_digits(return_X_y=True)[0] / 16), [360])
    if options.data == "curves":
        train_set, test_set = draw_curves(2000, seed=0), draw_curves(1000, seed=1)
    shuffle, num_steps = np.random.default_rng(options.seed), 3 if options.smoke else options.steps
    batches = [shuffle.permutation(len(train_set))[: options.batch_size] for _ in range(num_steps)]
    key, model_key = jax.random.split(jax.random.key(options.seed))
    task = make_model(SIZES[options.data], model_key), *(jnp.asarray(x, jnp.float32) for x in (train_set, test_set))
    optimizers = {"K-FAC": make_kfac(options.batch_size is None)} | {f"Adam {r:g}": make_adam(r) for r in RATES}
    runs = {name: train(name, *pair, task, batches, key) for name, pair in optimizers.items()}
    target, best = min((runs[name][0][-1, 2], name) for name in runs if name != "K-FAC")
    table = Table("optimizer", title=f"{num_steps} steps on {options.data}")
    for column in ("train loss", "test error (lowest)", "seconds", "compile s", f"steps to {target:.2f}"):
        table.add_column(column, justify="right")
    for name, (curve, _, compile_seconds) in runs.items():
        errors, reached = f"{curve[-1, 3]:.2f} ({curve[:, 3].min():.2f})", np.flatnonzero(curve[:, 2] <= target)
        cells = f"{curve[-1, 2]:.2f}", errors, f"{curve[-1, 1]:.1f}", f"{compile_seconds:.1f}"
        table.add_row(name, *cells, str(1 + reached[0]) if len(reached) else "never")
    plot(runs, best, train_set, test_set, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
