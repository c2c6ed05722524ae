"""Two tasks one after the other, without forgetting the first: elastic weight consolidation with Kronecker factors.

Needs `pip install -e '.[examples]'`, and two minutes on two cores. A small network learns to classify digits, and then
digits whose pixels are in another order, without seeing the first ones again. A penalty keeps it where the loss of the
first task is low: a quadratic one, whose matrix is the curvature of that loss, by its exact diagonal, by K-FAC or as it
is. The strength of the penalty is chosen on validation sets, from the same grid for all. Prints the test accuracy of
both tasks, and saves a plot of one against the other.
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
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


L2, STRENGTHS = 1e-4, np.logspace(0, 3.5, 8, dtype=np.float32)
BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
METHODS = {  # the block of each layer, and the estimator
    "diagonal": (kfax.Diagonal(), BLOCKS),
    "K-FAC": (kfax.KroneckerFactored(), BLOCKS),
    "exact": (kfax.KroneckerFactored(), kfax.ExplicitExactCurvature(kfax.ExactGGN(), decay=1.0)),
}


def load(seed):
    """Training sets of the two tasks; and their validation and test sets."""
    rng, (images, labels) = np.random.default_rng(seed), load_digits(return_X_y=True)
    order, pixels = rng.permutation(len(labels)), rng.permutation(64)
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    parts = slice(1000), slice(1000, 1400), slice(1400, None)
    training, *held_out = ([(x[part], labels[part]) for x in (images, images[:, pixels])] for part in parts)
    return training, held_out


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


@eqx.filter_jit
def train(model, batch, num_steps, penalty=lambda parameters: 0.0):
    """By Adam on full batches, with a term more of the parameters."""
    adam = optax.chain(optax.add_decayed_weights(L2), optax.adam(optax.cosine_decay_schedule(3e-3, num_steps)))

    @jax.grad
    def gradient(parameters):
        return loss_fn(eqx.combine(parameters, model), batch).value() + penalty(parameters)

    def step(_, carry):
        updates, state = adam.update(gradient(carry[0]), carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    parameters = kfax.parameters_of(model)
    parameters, _ = jax.lax.fori_loop(0, num_steps, step, (parameters, adam.init(parameters)))
    return eqx.combine(parameters, model)


@eqx.filter_jit
def measure(model, held_out):
    """Accuracies: of validation and test, of each task."""

    def accuracy(images, labels):
        return jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == labels)

    return jnp.array([[accuracy(*task) for task in tasks] for tasks in held_out])


@eqx.filter_jit
def consolidate(estimator, model, old, new, num_steps, held_out):
    """The accuracies for each strength of the penalty, of which 1 is the curvature of the loss on old examples."""
    parameters = kfax.parameters_of(model)
    state = estimator.update(estimator.init(model), loss_fn, model, old)

    def one(strength):
        def penalty(changed):
            change = jax.tree.map(jnp.subtract, changed, parameters)
            return strength / 2 * optax.tree.vdot(change, estimator.multiply(state, change))

        return measure(train(model, new, num_steps, penalty), held_out)

    return jax.vmap(one)(STRENGTHS)


def run(seed, num_steps):
    """The accuracies of everything with this seed."""
    (old, new), held_out = load(seed)
    fresh = kfax.tag(eqx.nn.MLP(64, 10, 30, 1, activation=jnp.tanh, key=jax.random.key(seed)))
    model, both = train(fresh, old, num_steps), jax.tree.map(lambda *arrays: np.concatenate(arrays), old, new)
    yield "first task only", measure(model, held_out)[None]
    yield "no penalty", measure(train(model, new, num_steps), held_out)[None]
    for name, (block, estimator) in METHODS.items():
        tagged = kfax.tag(kfax.untag(model), block=block)
        yield name, consolidate(estimator, tagged, old, new, num_steps, held_out)
    yield "both at once", measure(train(fresh, both, num_steps), held_out)[None]


def plot(results, path):
    figure = Figure(figsize=(6, 4.5), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    for name, style in {"diagonal": "C1o-", "K-FAC": "C0o-", "exact": "ko-", "both at once": "C2D"}.items():
        ax.plot(*np.mean(results[name], axis=0)[:, 1].T, style, label=name)
    ax.set(xlabel="test accuracy, first task", ylabel="test accuracy, second task")
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many, to average over")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/continual.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_seeds, num_steps = (1, 2) if options.smoke else (options.seeds, 1000)

    runs = [dict(run(seed, num_steps)) for seed in track(range(num_seeds), "seeds")]
    results = {name: np.stack([found[name] for found in runs]) for name in runs[0]}
    table = Table("penalty", *(Column(x, justify="right") for x in ("strength", "first task", "second task", "mean")))
    for name, found in results.items():
        best = np.argmax(found[:, :, 0].mean(axis=-1), axis=1)  # on the validation sets
        tests = found[np.arange(num_seeds), best, 1]
        strength = f"{STRENGTHS[best].min():.3g} to {STRENGTHS[best].max():.3g}" if name in METHODS else ""
        numbers = (f"{values.mean():.1%} ± {values.std():.1%}" for values in (*tests.T, tests.mean(axis=1)))
        table.add_row(name, strength, *numbers)
    plot(results, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
