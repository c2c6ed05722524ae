"""The preconditioner as a link in a chain of optax, with clipping, decoupled weight decay and an average of weights.

Needs `pip install -e '.[examples]'`, and half a minute on two cores. Prints a table, and saves a plot: the same chain
on digits, with `kfax.scale_by_curvature` and with `optax.scale_by_adam` (the best of four rates, 1e-3 to 3e-2).
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


BATCH_SIZE = 128


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def chain(link, rate, num_steps):
    """Everything but the link comes from optax, and does not know of it."""
    return optax.chain(
        link,
        optax.clip_by_global_norm(10.0),
        optax.add_decayed_weights(1e-4),
        optax.trace(decay=0.9),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(rate, num_steps)),
    )


def train(transform, model, batches, advance):
    """The averaged model, and the loss of each batch."""
    transform = optax.with_extra_args_support(transform)

    @eqx.filter_jit
    def step(model, state, average, batch, key):
        loss, gradient = eqx.filter_value_and_grad(lambda model: loss_fn(model, batch).value())(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        # A link that needs model, batch and key takes them from here; others ignore them.
        updates, state = transform.update(gradient, state, params, model=model, batch=batch, key=key)
        model = eqx.apply_updates(model, updates)
        average = optax.incremental_update(eqx.filter(model, eqx.is_inexact_array), average, step_size=0.05)
        return model, state, average, loss

    average = eqx.filter(model, eqx.is_inexact_array)
    state, losses = transform.init(average), []
    for i, batch in enumerate(batches):
        model, state, average, loss = step(model, state, average, batch, jax.random.key(i))
        losses.append(float(loss))
        advance()
    return eqx.combine(average, model), losses


def plot(curves, path):
    figure = Figure(figsize=(6, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    for (name, losses), color in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        ax.plot(losses, color=color, alpha=0.3, linewidth=0.7)
        window = max(min(len(losses) // 10, 20), 1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        ax.plot(np.arange(len(smooth)) + window - 1, smooth, color=color, linewidth=2, label=name)
    ax.set(yscale="log", xlabel="steps", ylabel="cross entropy of the batch")
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/optax_chain.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    shuffle = np.random.default_rng(1)
    batches = []
    for _ in range(num_steps):
        chosen = 360 + shuffle.choice(len(images) - 360, BATCH_SIZE, replace=False)
        batches.append((images[chosen], labels[chosen]))
    model = kfax.tag(eqx.nn.MLP(64, 10, 64, 2, key=jax.random.key(0)))
    kfax.check(loss_fn, model, batches[0])  # what `kfax.Optimizer.init` would do

    # Curvature on every other batch, its inverses a few at a time.
    preconditioner = kfax.Preconditioner(curvature_update_period=2, inverse_update_period=kfax.Staggered(10))
    curvature = kfax.scale_by_curvature(loss_fn, damping=1e-2, preconditioner=preconditioner, norm_constraint=0.1)
    chains = {
        "scale_by_curvature": chain(curvature, 0.1, num_steps),
        "scale_by_adam": chain(optax.scale_by_adam(), 3e-3, num_steps),
    }
    with Progress() as progress:
        bar = progress.add_task("training", total=len(chains) * num_steps)
        advance = lambda: progress.advance(bar)  # noqa: E731
        results = {name: train(transform, model, batches, advance) for name, transform in chains.items()}
    plot({name: losses for name, (_, losses) in results.items()}, options.output)
    table = Table("link", *(Column(name, justify="right") for name in ("last 20 batches", "test accuracy, averaged")))
    for name, (averaged, losses) in results.items():
        right = jnp.argmax(jax.vmap(averaged)(images[:360]), axis=1) == labels[:360]
        table.add_row(name, f"{np.mean(losses[-20:]):.2e}", f"{right.mean():.1%}")
    rich.print(table)


if __name__ == "__main__":
    main()
