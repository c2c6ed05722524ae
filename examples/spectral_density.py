"""Trace, norm, log-determinant and spectral density of an exact GGN from products with it, which is never formed.

Needs `pip install -e '.[examples]'`, and a minute on two cores. Prints a table, and saves a plot. The estimators are
those of matfree, which asks for nothing but the product with a vector. They are run on a network whose exact matrix can
be formed, as a check, and on a larger one before and after training. Each stands beside K-FAC.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich
from jax.flatten_util import ravel_pytree
from matfree import decomp, stochtrace
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


DAMPING, SMOOTHING = 1e-3, 0.15  # λ; the standard deviation of a Gaussian, in decades
COLORS = {"exact": "black", "matfree": "#D55E00", "K-FAC": "#0072B2"}


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def train(model, data, num_steps):
    optimizer = kfax.full_batch(loss_fn)
    state, step = optimizer.init(model, data), eqx.filter_jit(optimizer.step)
    for i in track(range(num_steps), "training"):
        model, state, _ = step(model, state, data, key=jax.random.key(i))
    return model


@eqx.filter_jit
def measure(model, data, sizes, key):
    """Trace and squared norm with their standard errors, and for each probe the nodes and weights of its quadrature."""
    num_samples, num_probes, num_steps = sizes
    exact, parameters = kfax.ImplicitExactCurvature(kfax.ExactGGN()), kfax.parameters_of(model)
    operator = exact.as_operator(exact.update(exact.init(model), loss_fn, model, data), parameters)
    vector, unravel = ravel_pytree(parameters)
    trace_key, norm_key, key = jax.random.split(key, 3)

    def multiply(v):
        return ravel_pytree(operator.mv(unravel(v)))[0]

    def squared_norm(multiply, samples):
        return jnp.sum(stochtrace.leave_one_out_xsymrownorms_squared()(multiply, samples), axis=-1)

    def quadrature(probe):
        """Of `vᵀ f(C) v` for any f: the eigenvalues of the tridiagonal matrix, and what each counts for."""
        nodes, vectors = jnp.linalg.eigh(decomp.tridiag_sym(num_steps)(multiply, probe).J_small)
        return nodes, vector.size * vectors[0] ** 2

    estimator = stochtrace.estimator_leave_one_out_mean_and_sem
    samples = stochtrace.sampler_normal(vector, num=num_samples)
    trace = estimator(stochtrace.leave_one_out_xtrace(), samples)(multiply, trace_key)
    square = estimator(squared_norm, samples)(multiply, norm_key)
    return trace, square, *jax.vmap(quadrature)(stochtrace.sampler_signs(vector, num=num_probes)(key))


@eqx.filter_jit
def decompose(estimator, model, data):
    """The same of all the eigenvalues: no errors, and a quadrature in which each of them counts for one."""
    state = estimator.update(estimator.init(model), loss_fn, model, data)
    s = estimator.decompose(state, kfax.parameters_of(model)).eigenvalues()
    return (jnp.sum(s), jnp.zeros(())), (jnp.sum(s**2), jnp.zeros(())), s[None], jnp.ones_like(s)[None]


def cells(trace, square, nodes, weights):
    s, norm = np.maximum(nodes, 0), np.sqrt(square[0])
    sums = [np.sum(weights * values, axis=1) for values in (np.log(s + DAMPING), s / (s + DAMPING))]
    means = [(x.mean(), x.std() / np.sqrt(max(len(x) - 1, 1))) for x in sums]
    for (mean, error), digits in zip((trace, (norm, square[1] / (2 * norm)), *means), (2, 4, 0, 0), strict=True):
        digits = min(max(-int(np.floor(np.log10(error))), 0), 4) if error else digits
        yield f"{mean:.{digits}f} ± {error:.{digits}f}" if error else f"{mean:.{digits}f}"


def density(nodes, weights, decades):
    """Eigenvalues per decade: the mean of the probes, each node a Gaussian on the logarithmic axis."""
    x = (decades - np.log10(np.maximum(nodes, 1e-12)).reshape(-1, 1)) / SMOOTHING
    bumps = np.exp(-(x**2) / 2) / (SMOOTHING * np.sqrt(2 * np.pi))
    return weights.reshape(-1) @ bumps / len(weights)


def plot(found, path):
    figure = Figure(figsize=(10, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    decades = np.linspace(-4, 1, 500)
    for ax, (name, rows) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for matrix, (_, _, nodes, weights) in rows.items():
            ax.plot(10**decades, density(nodes, weights, decades), color=COLORS[matrix], linewidth=2, label=matrix)
        title = f"{name}, {rows['K-FAC'][2].size} parameters"
        ax.set(xscale="log", yscale="log", xlabel="eigenvalue", ylim=(1, 2000), title=title)
        ax.grid(alpha=0.3)
    figure.axes[0].set(ylabel="eigenvalues per decade")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of training")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/spectral_density.png")
    parser.add_argument("--smoke", action="store_true", help="only few steps, units and products, to see that it runs")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)  # for eigenvalues over many orders of magnitude
    num_steps, widths, sizes = (3, (4, 4), (5, 3, 10)) if options.smoke else (options.steps, (16, 96), (50, 10, 100))

    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16), jnp.asarray(labels)
    small, large = (kfax.tag(eqx.nn.MLP(64, 10, width, 2, jnp.tanh, key=jax.random.key(0))) for width in widths)
    models = {"small": train(small, data, num_steps), "before": large, "after": train(large, data, num_steps)}
    found = {name: {} for name in models}
    for name, model in track(models.items(), "estimating"):
        if name == "small":
            found[name]["exact"] = decompose(kfax.ExplicitExactCurvature(kfax.ExactGGN()), model, data)
        found[name]["matfree"] = measure(model, data, sizes, jax.random.key(1))
        found[name]["K-FAC"] = decompose(kfax.BlockDiagonalCurvature(kfax.ExactGGN()), model, data)
    plot(found, options.output)
    small, large = (sum(x.size for x in jax.tree.leaves(kfax.parameters_of(model))) for model in (small, large))
    columns = [Column(name, justify="right") for name in ("trace", "‖C‖", "log det", "Σ s/(s+λ)")]
    title = f"{small} parameters, trained; {large}, before and after training; λ = {DAMPING:g}"
    table = Table("model", "C", *columns, title=title)
    for name, rows in found.items():
        for matrix, row in rows.items():
            table.add_row(name, matrix, *cells(*row))
        table.add_section()
    rich.print(table)


if __name__ == "__main__":
    main()
