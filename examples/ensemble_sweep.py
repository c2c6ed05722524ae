"""Trains eight classifiers of digits at once, and one classifier with eight dampings, each by one `filter_vmap`.

Needs `pip install -e '.[examples]'`, and a minute on two cores. Prints two tables, and saves a plot. The members of the
ensemble differ in their initial weights; their averaged predictions are better than those of most members.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


MEMBERS, BATCH_SIZE = 8, 256
DAMPINGS = tuple(10.0**k for k in range(-5, 3))


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def make_model(key):
    return kfax.tag(eqx.nn.MLP(64, 10, 32, 2, activation=jnp.tanh, key=key))


def train_ensemble(keys, batches):
    """Models with another axis in front of all their arrays, and the losses of each at every step."""
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.NormConstraint(0.1, bound=1e-3),
        momentum=0.9,
        damping=1e-2,
        preconditioner=kfax.Preconditioner(inverse_update_period=kfax.Staggered(10)),
    )
    models = eqx.filter_vmap(make_model)(keys)
    # All arrays of the state have an axis of members, but the number of the step is the same for all: so "is a refresh
    # due?" stays one question.
    axes = optimizer.state_axes(eqx.filter_eval_shape(optimizer.init, make_model(keys[0]), batches[0]))
    members = eqx.if_array(0)
    init = eqx.filter_vmap(optimizer.init, in_axes=(members, None), out_axes=axes)
    one_step = lambda model, state, batch, key: optimizer.step(model, state, batch, key=key)  # noqa: E731
    in_axes, out_axes = (members, axes, None, None), (members, axes, members)
    step = eqx.filter_jit(eqx.filter_vmap(one_step, in_axes=in_axes, out_axes=out_axes))
    states, losses = eqx.filter_jit(init)(models, batches[0]), []
    for i, batch in enumerate(track(batches, "ensemble")):
        models, states, info = step(models, states, batch, jax.random.key(i))
        losses.append(info.loss)
    return models, np.array(losses)


def train_sweep(dampings, model, batches):
    """The losses of one model at every step, for each damping."""

    @eqx.filter_vmap(in_axes=(0, None, None))
    def train(damping, model, batches):
        optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=damping)
        arrays, rest = eqx.partition(model, eqx.is_array)

        def body(carry, batch_and_key):
            batch, key = batch_and_key
            model, state, info = optimizer.step(eqx.combine(carry[0], rest), carry[1], batch, key=key)
            return (eqx.filter(model, eqx.is_array), state), info.loss

        state = optimizer.init(model, jax.tree.map(lambda x: x[0], batches))
        keys = jax.random.split(jax.random.key(0), len(batches[0]))
        return jax.lax.scan(body, (arrays, state), (batches, keys))[1]

    with rich.get_console().status("sweep"):
        return np.array(eqx.filter_jit(train)(dampings, model, batches)).T


def accuracy(logits, labels):
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


def plot(ensemble, sweep, path):
    figure = Figure(figsize=(10, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].plot(ensemble, color="#0072B2", alpha=0.6)
    axes[0].set(title="eight initial models", ylabel="cross entropy of the batch")
    colors = [(0.1, 0.2 + 0.7 * i / len(DAMPINGS), 0.9 - 0.8 * i / len(DAMPINGS)) for i in range(len(DAMPINGS))]
    for losses, damping, color in zip(sweep.T, DAMPINGS, colors, strict=True):
        axes[1].plot(losses, color=color, label=f"λ = {damping:g}")
    axes[1].set(title="eight dampings")
    axes[1].legend(fontsize="small")
    for ax in axes:
        ax.set(yscale="log", xlabel="steps", ylim=(1e-4, 10))
        ax.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/ensemble_sweep.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    shuffle = np.random.default_rng(1)
    indices = np.stack([360 + shuffle.choice(len(images) - 360, BATCH_SIZE, replace=False) for _ in range(num_steps)])
    batches = images[indices], labels[indices]

    keys = jax.random.split(jax.random.key(0), MEMBERS)
    models, ensemble = train_ensemble(keys, list(zip(*batches, strict=True)))
    sweep = train_sweep(jnp.asarray(DAMPINGS), make_model(keys[0]), batches)
    plot(ensemble, sweep, options.output)

    test_x, test_y = images[:360], labels[:360]
    logits = eqx.filter_vmap(lambda model: jax.vmap(model)(test_x))(models)
    right = sorted(accuracy(each, test_y) for each in logits)
    table = Table("test accuracy", Column("", justify="right"), title=f"ensemble, {num_steps} steps")
    table.add_row("members, from worst to best", f"{right[0]:.1%} to {right[-1]:.1%}")
    table.add_row("averaged predictions", f"{accuracy(jnp.mean(jax.nn.softmax(logits), axis=0), test_y):.1%}")
    rich.print(table)
    table = Table("λ", Column("last ten batches", justify="right"), title="sweep, cross entropy")
    for damping, losses in zip(DAMPINGS, sweep.T, strict=True):
        table.add_row(f"{damping:g}", f"{losses[-10:].mean():.2e}")
    rich.print(table)


if __name__ == "__main__":
    main()
