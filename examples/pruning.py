"""Pruning of a classifier of digits: optimal brain damage, and optimal brain surgeon with Kronecker factors.

Needs `pip install -e '.[examples]'`, and two minutes on two cores. Weights are removed over 15 rounds, three of which
halve their number. They are chosen by magnitude, or by how much the loss rises in a quadratic model, whose curvature is
measured anew in every round; with K-FAC or the exact matrix those that stay make up for those that go. Prints the test
accuracy, without any training after a removal and with some after every round, and saves a plot.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


L2, PER_HALVING = 1e-3, 3
KRONECKER, BLOCKS = kfax.KroneckerFactored(), kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)


def loss_fn(model, batch):
    return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])


@eqx.filter_jit
def train(model, mask, num_steps, batch):
    """By Adam, with an L2 term, what is left of a model."""
    weights, unravel = ravel_pytree(kfax.parameters_of(model))
    adam = optax.chain(optax.add_decayed_weights(L2), optax.adam(3e-3))

    def step(_, carry):
        gradient = jax.grad(lambda weights: loss_fn(eqx.combine(unravel(weights), model), batch).value())(carry[0])
        updates, state = adam.update(gradient, carry[1], carry[0])
        return carry[0] + mask * updates, state

    weights, _ = jax.lax.fori_loop(0, num_steps, step, (weights, adam.init(weights)))
    return eqx.combine(unravel(weights), model)


def by_spectrum(estimator, state, parameters, mask):
    """The diagonal of (C + ηI)⁻¹, as if what was removed before could come back: cheap for K-FAC."""
    return ravel_pytree(estimator.decompose(state, parameters).diagonal(parameters, -1, L2))[0]


def by_matrix(estimator, state, parameters, mask):
    """The same, of the dense matrix of what is left."""
    matrix = jnp.outer(mask, mask) * estimator.to_dense(state, parameters) + L2 * jnp.eye(mask.size)
    return jnp.diagonal(jnp.linalg.inv(matrix))


METHODS = {  # the block of each layer, the estimator, and what the squares of weights are divided by
    "magnitude": (kfax.Diagonal(), BLOCKS, lambda *_: 1),
    "OBD, diagonal": (kfax.Diagonal(), BLOCKS, by_spectrum),
    "OBS, K-FAC": (KRONECKER, BLOCKS, by_spectrum),
    "OBS, exact": (KRONECKER, kfax.ExplicitExactCurvature(kfax.ExactGGN(), decay=1.0), by_matrix),
    "magnitude, K-FAC update": (KRONECKER, BLOCKS, lambda *_: 1),
}


@eqx.filter_jit
def prune(estimator, variances_by, model, mask, number, batch):
    """Removes weights until this number of parameters is left, and changes the others to make up for it.

    With an L2 term of η the objective rises by ½ (v - w)ᵀ (C + ηI) (v - w) from its minimum w. If w_q is set to zero
    and all others are chosen best, that is w_q² / 2 [(C + ηI)⁻¹]_qq, which says what to remove. Of all v that are zero
    where weights have been removed, conjugate gradients then find the best. Biases are not removed.
    """
    parameters = kfax.parameters_of(model)
    weights, unravel = ravel_pytree(parameters)
    is_bias, _ = ravel_pytree(jax.tree.map(lambda x: jnp.full(x.shape, x.ndim == 1), parameters))
    state = estimator.update(estimator.init(model), loss_fn, model, batch)
    saliencies = jnp.where(is_bias, jnp.inf, weights**2 / variances_by(estimator, state, parameters, mask)) * mask
    mask = saliencies >= jnp.sort(saliencies)[-number]

    def multiply(vector):
        return mask * (ravel_pytree(estimator.multiply(state, unravel(vector)))[0] + L2 * vector)

    weights, _ = cg(multiply, multiply(weights), x0=mask * weights, tol=1e-4, maxiter=500)
    return eqx.combine(unravel(weights), model), mask


def accuracies(method, model, fractions, num_steps, batch, test):
    """On test examples, with each of these fractions of the weights."""
    block, estimator, variances_by = method
    model = kfax.tag(kfax.untag(model), block=block)
    leaves = jax.tree.leaves(kfax.parameters_of(model))
    weights, biases = (sum(x.size for x in leaves if x.ndim == n) for n in (2, 1))
    mask = jnp.ones(weights + biases, bool)
    for fraction in fractions:
        if fraction < 1:
            number = jnp.array(round(fraction * weights) + biases)
            model, mask = prune(estimator, variances_by, model, mask, number, batch)
            model = train(model, mask, num_steps, batch) if num_steps else model
        yield np.mean(np.argmax(jax.vmap(model)(test[0]), axis=1) == test[1])


def plot(results, ticks, path):
    figure = Figure(figsize=(9, 3.8), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    for ax, (num_steps, found) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
        for (name, values), style in zip(found.items(), ("C7-", "C1-", "C0-", "k-", "C9:"), strict=True):
            ax.plot(values, style, label=name)
        ax.set(xlabel="weights removed", ylabel="test accuracy", title=f"{num_steps} steps of training between rounds")
        ax.set_xticks(list(ticks), ticks.values())
    figure.axes[-1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many, to average over")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/pruning.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_seeds, num_steps, num_rounds = (1, 2, 3) if options.smoke else (options.seeds, 100, 15)

    images, labels = load_digits(return_X_y=True)
    order, images = np.random.default_rng(0).permutation(len(labels)), (images / 16).astype(np.float32)
    sets = [(images[part], labels[part]) for part in (order[360:], order[:360])]
    models = [eqx.nn.MLP(64, 10, 20, 1, activation=jnp.tanh, key=jax.random.key(seed)) for seed in range(num_seeds)]
    models = [train(kfax.tag(model), True, 20 * num_steps, sets[0]) for model in models]
    fractions = [0.5 ** (i / PER_HALVING) for i in range(num_rounds + 1)]
    results = {0: {}, num_steps: {}}
    for name, method in track(METHODS.items()):
        for steps, found in results.items():
            found[name] = np.mean([list(accuracies(method, m, fractions, steps, *sets)) for m in models], axis=0)

    ticks = {i: f"{1 - fractions[i]:.1%}" for i in range(0, num_rounds + 1, PER_HALVING)}
    table = Table("removed", "steps", *(Column(tick, justify="right") for tick in ticks.values()))
    for steps, found in results.items():
        for name, values in found.items():
            table.add_row(name, f"{steps}", *(f"{values[i]:.1%}" for i in ticks), end_section=name == list(found)[-1])
    plot(results, ticks, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
