"""Solves `(C + λI) x = ∇h` for the exact GGN of an autoencoder by conjugate gradients: plain, and preconditioned.

Needs `pip install -e '.[examples]'`, and a minute on two cores. Prints a table, and saves a plot. The matrix is never
formed: it is an operator of lineax, as its preconditioner is, and so is any matrix of `kfax.ImplicitExactCurvature`.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


DAMPING, TOLERANCES = 1e-3, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BLOCKS = {
    "no preconditioner": None,
    "diagonal": kfax.Diagonal(),
    "K-FAC, factored damping": kfax.KroneckerFactored(inversion=kfax.Cholesky()),
    "K-FAC, exact damping": kfax.KroneckerFactored(inversion=kfax.Eigh()),
}


def loss_fn(model, images):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(images), images)


def train(model, data, num_steps):
    optimizer = kfax.full_batch(loss_fn)
    state, step = optimizer.init(model, data), eqx.filter_jit(optimizer.step)
    for i in track(range(num_steps), "training"):
        model, state, _ = step(model, state, data, key=jax.random.key(i))
    return model


@eqx.filter_jit
def solve(model, block, data, tolerance):
    """The number of iterations, and the relative residual after them."""
    model = model if block is None else kfax.set_block(model, lambda model: model, block)
    parameters = kfax.parameters_of(model)
    gradient = kfax.parameters_of(eqx.filter_grad(lambda model: loss_fn(model, data).value())(model))
    exact = kfax.ImplicitExactCurvature()
    operator = exact.as_operator(exact.update(exact.init(model), loss_fn, model, data), parameters, DAMPING)
    options = {}
    if block is not None:
        estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
        state = estimator.update(estimator.init(model), loss_fn, model, data)
        state = estimator.refresh(state, parameters, DAMPING)
        options["preconditioner"] = estimator.as_preconditioner(state, parameters)
    solver = lx.CG(rtol=0.0, atol=tolerance * norm(gradient), norm=norm, max_steps=5000)
    solution = lx.linear_solve(operator, gradient, solver, options=options, throw=False)
    residual = jax.tree.map(jnp.subtract, operator.mv(solution.value), gradient)
    return solution.stats["num_steps"], norm(residual) / norm(gradient)


def norm(x):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)))


def plot(curves, path):
    figure = Figure(figsize=(6, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    for (name, curve), color in zip(curves.items(), ("black", "0.6", "#56B4E9", "#0072B2"), strict=True):
        ax.plot(*curve, ".-", color=color, label=name)
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel="relative residual")
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of training, before the equation is solved")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/preconditioned_cg.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)  # for residuals over many orders of magnitude
    num_steps, tolerances = (3, TOLERANCES[:2]) if options.smoke else (options.steps, TOLERANCES)

    data = jnp.asarray(load_digits(return_X_y=True)[0] / 16)
    model = train(kfax.tag(eqx.nn.MLP(64, 64, 16, 1, jnp.tanh, key=jax.random.key(0))), data, num_steps)
    curves = {}
    for name, block in track(BLOCKS.items(), "solving"):
        curves[name] = np.array([solve(model, block, data, jnp.asarray(tolerance)) for tolerance in tolerances]).T
    plot(curves, options.output)
    title = f"iterations until residual and last change are below a tolerance, λ = {DAMPING:g}"
    table = Table("", *(Column(f"{tolerance:g}", justify="right") for tolerance in tolerances), title=title)
    for name, (numbers, _) in curves.items():
        table.add_row(name, *(f"{number:.0f}" for number in numbers))
    rich.print(table)


if __name__ == "__main__":
    main()
