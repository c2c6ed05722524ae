"""Regression with error bands: a Laplace approximation, whose prior and noise are chosen by the evidence.

Needs `pip install -e '.[examples]'`, and a minute on two cores. A small network is fitted to 80 noisy values of a
function, with a gap in the middle. Training and the choice of prior precision and noise, by the evidence, take turns;
no value is held out for it. Prints how well new values are predicted, where there were data and in the gap, and saves a
plot of the bands, by the exact matrix and by K-FAC.
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

import kfax


N, NOISE, GAP = 80, 0.15, (-0.4, 0.8)
GGN = kfax.ExactGGN()
ESTIMATORS = {
    "exact": kfax.ExplicitExactCurvature(GGN, decay=1.0),
    "K-FAC": kfax.BlockDiagonalCurvature(GGN, decay=1.0),
}
# All pairs of a prior precision and a standard deviation of the noise.
GRID = [x.reshape(-1) for x in jnp.meshgrid(jnp.logspace(-2, 2, 41), jnp.logspace(-1.5, 0, 46))]


def draw(number, rng):
    """Inputs in [-2, 2], and noisy targets."""
    inputs = rng.uniform(-2, 2, (number, 1)).astype(np.float32)
    return inputs, (np.sin(3 * inputs) + NOISE * rng.standard_normal(inputs.shape)).astype(np.float32)


def is_in_gap(inputs):
    return (inputs[:, 0] > GAP[0]) & (inputs[:, 0] < GAP[1])


def loss_fn(model, batch):
    return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])


@eqx.filter_jit
def advance(optimizer, model, state, batch):
    return optimizer.step(model, state, batch)[:2]


def train(batch, precision, noise, num_steps, seed):
    """A model for this prior, whose L2 term is λ = 2 σ² δ / N."""
    model = kfax.tag(eqx.nn.MLP(1, 1, 20, 1, activation=jnp.tanh, key=jax.random.key(seed)))
    optimizer = kfax.full_batch(loss_fn, l2=2 * noise**2 * precision / N, estimator=kfax.BlockDiagonalCurvature(GGN))
    state = optimizer.init(model, batch)
    for _ in range(num_steps):
        model, state = advance(optimizer, model, state, batch)
    return model


@eqx.filter_jit
def evidences(model, spectrum, loss):
    """For each pair of the grid, with one eigendecomposition."""

    def one(precision, noise):
        temperature = 2 * noise**2
        log_likelihood = -N * (loss / temperature + jnp.log(jnp.pi * temperature) / 2)
        return kfax.Laplace(model, spectrum, N, precision, temperature=temperature).log_evidence(log_likelihood)

    return jax.vmap(one)(*GRID)


@eqx.filter_jit
def predict(laplace, inputs):
    """Means and variances, without noise."""
    predictive = jax.vmap(lambda x: laplace.predict(lambda model: model(x)[0]))(inputs)
    return predictive.mean, predictive.covariance


def fit(estimator, batch, num_rounds, num_steps, seed):
    """Training and the choice of prior and noise in turns; the posterior, δ, σ and the log evidence."""
    precision, noise, results = jnp.array(1.0), jnp.array(0.5), []
    update, decompose = eqx.filter_jit(estimator.update), eqx.filter_jit(estimator.decompose)
    for _ in track(range(num_rounds)):
        model = train(batch, precision, noise, num_steps, seed)
        state = update(estimator.init(model), loss_fn, model, batch)
        spectrum = decompose(state, kfax.parameters_of(model))
        laplace = kfax.Laplace(model, spectrum, N, precision, temperature=2 * noise**2)
        found = evidences(model, spectrum, loss_fn(model, batch).value())
        results.append((laplace, float(precision), float(noise), float(jnp.max(found))))
        precision, noise = (numbers[jnp.argmax(found)] for numbers in GRID)
    return results[-1]


def score(laplace, noise, inputs, targets):
    """The mean log density of targets, and the share of them within 1.96 standard deviations."""
    mean, variance = predict(laplace, inputs)
    deviation = jnp.sqrt(variance + noise**2)
    errors = (targets[:, 0] - mean) / deviation
    return jnp.mean(-(errors**2) / 2 - jnp.log(deviation) - jnp.log(2 * jnp.pi) / 2), jnp.mean(jnp.abs(errors) < 1.96)


def plot(results, batch, path):
    figure = Figure(figsize=(9, 3.5), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    x = jnp.linspace(-2, 2, 200)[:, None]
    for ax, (name, (laplace, _, noise, _)) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
        mean, variance = predict(laplace, x)
        for band, alpha in ((jnp.sqrt(variance + noise**2), 0.15), (jnp.sqrt(variance), 0.3)):
            ax.fill_between(x[:, 0], mean - 2 * band, mean + 2 * band, color="#0072B2", alpha=alpha, lw=0)
        ax.plot(x, mean, color="#0072B2")
        ax.plot(x, jnp.sin(3 * x), color="black", lw=1, ls="--")
        ax.plot(*batch, ".", color="#D55E00", ms=4)
        ax.set(title=name, xlabel="x", ylim=(-3, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/laplace.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_rounds, num_steps = (2, 2) if options.smoke else (6, 200)

    rng = np.random.default_rng(options.seed)
    inputs, targets = draw(1000, rng)
    batch = inputs[~is_in_gap(inputs)][:N], targets[~is_in_gap(inputs)][:N]
    results = {name: fit(e, batch, num_rounds, num_steps, options.seed) for name, e in ESTIMATORS.items()}
    inputs, targets = draw(4000, rng)
    table = Table("", *(Column(name, justify="right") for name in results))
    for i, name in enumerate(("prior precision δ", "noise σ", "log evidence"), 1):
        table.add_row(name, *(f"{result[i]:.3g}" for result in results.values()), end_section=i == 3)
    for name, chosen in (("with data", ~is_in_gap(inputs)), ("in the gap", is_in_gap(inputs))):
        scores = [score(laplace, noise, inputs[chosen], targets[chosen]) for laplace, _, noise, _ in results.values()]
        table.add_row(f"log density, {name}", *(f"{density:.2f}" for density, _ in scores))
        table.add_row(f"within the 95% band, {name}", *(f"{share:.1%}" for _, share in scores))
    plot(results, batch, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
