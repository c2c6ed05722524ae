"""A physics-informed network for the Poisson equation: exact Gauss-Newton steps and K-FAC, L-BFGS and Adam.

Needs `pip install -e '.[examples]'`, and 20 minutes on two cores. -Δu = f is solved with u given on the boundary, on
the unit square, or (`--dimension 5`) in a cube, there with new points at each step for all methods but L-BFGS.
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
from scipy.stats import qmc

import kfax


jax.config.update("jax_enable_x64", True)
NUM_INSIDE, NUM_BOUNDARY, BOUNDARY_WEIGHT = 1024, 128, 100
WIDTHS, ADAM_RATES = {2: 24, 5: 64}, {2: 3e-3, 5: 1e-2}  # the rates to start from: of 1e-2, 3e-3 and 1e-3 the best


def solution(x):
    """An eigenfunction of -Δ; zero on the boundary of the square."""
    return jnp.prod(jnp.sin(jnp.pi * x)) if x.size == 2 else jnp.sum(jnp.cos(jnp.pi * x))


def residual(model, x):
    """Δu + f."""
    _, _, laplacian = kfax.forward_laplacian(model)(x)
    return laplacian + {2: 2, 5: 1}[x.size] * jnp.pi**2 * solution(x)


def loss_fn(model, points):
    """Two means, each over points of its own."""
    inside = jax.vmap(lambda x: residual(model, x), axis_name="batch")(points[0])
    boundary = jax.vmap(model, axis_name="batch")(points[1])
    wanted = jax.vmap(solution)(points[1])
    return [kfax.squared_error(inside, jnp.zeros_like(inside)), BOUNDARY_WEIGHT * kfax.squared_error(boundary, wanted)]


def by_curvature(estimator, rules, model, points):
    """A damping that is a number is multiplied by the loss: then Gauss-Newton steps converge quadratically."""
    inverse = kfax.Preconditioner(estimator, inverse_update_period=1)
    optimizer, factor = kfax.Optimizer(loss_fn, **rules, preconditioner=inverse), rules["damping"]

    def step(model, state, points):
        is_fixed, loss = isinstance(factor, float), kfax.value(loss_fn(model, points))
        return optimizer.step(model, state, points, damping=jnp.clip(factor * loss, 1e-12, 100) if is_fixed else None)

    return optimizer.init(model, points), step


def by_optax(optim, value_and_grad, model, points):
    def step(model, state, points):
        params, static = eqx.partition(model, eqx.is_array)
        loss = lambda params, **_: kfax.value(loss_fn(eqx.combine(params, static), points))  # noqa: E731
        value, gradients = value_and_grad(loss)(params, state=state)
        updates, state = optim.update(gradients, state, params, value=value, grad=gradients, value_fn=loss)
        return eqx.apply_updates(model, updates), state, value

    return optim.init(eqx.filter(model, eqx.is_array)), step


def methods(dimension):
    auto, adam = kfax.QuadraticModel(), optax.adam(optax.exponential_decay(ADAM_RATES[dimension], 1000, 0.9))
    damping = kfax.RelativeDamping(kfax.LevenbergMarquardt(1.0, decay=0.8, minimum=1e-12))
    rules = {"learning_rate": auto, "momentum": auto, "damping": damping, "rejection": kfax.Rejection()}
    fixed = {"learning_rate": 1.0, "momentum": 0.0, "damping": 0.1}
    blocks = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=0.5, example_axis="batch")
    return {
        "Gauss-Newton": lambda *start: by_curvature(kfax.ExplicitExactCurvature(decay=1e-9), fixed, *start),
        "sample space": lambda *start: by_curvature(kfax.SampleSpaceCurvature(), fixed, *start),
        "K-FAC": lambda *start: by_curvature(blocks, rules, *start),
        "L-BFGS": lambda *start: by_optax(optax.lbfgs(50), optax.value_and_grad_from_state, *start),
        "Adam": lambda *start: by_optax(optax.with_extra_args_support(adam), jax.value_and_grad, *start),
    }


def train(make, dimension, seed, seconds, is_fixed):
    """The model, seconds to compile, the number of steps, and seconds of steps with relative errors along the way."""

    def draw(seed):  # points inside and on the boundary, evenly spread
        sobol, side = qmc.Sobol(dimension, rng=seed), np.arange(NUM_BOUNDARY) * 2 * dimension // NUM_BOUNDARY
        inside, boundary = sobol.random(NUM_INSIDE), sobol.random(NUM_BOUNDARY)
        boundary[np.arange(NUM_BOUNDARY), side // 2] = side % 2
        return inside, boundary

    model = kfax.tag(eqx.nn.MLP(dimension, "scalar", WIDTHS[dimension], 2, jnp.tanh, key=jax.random.key(seed)))
    points, test_points, start = draw(seed), np.random.default_rng(0).random((4096, dimension)), time.perf_counter()
    wanted, spent, steps, history = jax.vmap(solution)(test_points), 0.0, 0, []
    state, step = make(model, points)
    step = eqx.filter_jit(step)  # it may be compiled twice: the first one changes the structure of a state with a batch
    jax.block_until_ready(step(*step(model, state, points)[:2], points))
    compilation = time.perf_counter() - start
    while spent < seconds:
        points, start = points if is_fixed else draw(10_000 * seed + steps), time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, points))
        spent, steps = spent + time.perf_counter() - start, steps + 1
        if not history or spent > min(history[-1][0] + seconds / 100, seconds):
            history.append((spent, np.linalg.norm(jax.vmap(model)(test_points) - wanted) / np.linalg.norm(wanted)))
    return model, compilation, steps, np.array(history)


def plot(runs, dimension, path):
    """Errors against seconds; and what the first run found, with its error, on a plane through the middle."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    curves, *planes = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    for name, seed, history, _ in runs:
        curves.plot(*history.T, color=f"C{list(methods(dimension)).index(name)}", label=None if seed else name)
    curves.set(yscale="log", xlabel="seconds of steps", ylabel="relative L2 error")
    curves.legend(fontsize="small")
    x = np.insert(np.stack(np.meshgrid(*[np.linspace(0, 1, 100)] * 2), axis=-1), [2] * (dimension - 2), 0.5, axis=-1)
    found, wanted = (jax.vmap(jax.vmap(u))(x) for u in (runs[0][3], solution))
    for ax, values, label in zip(planes, (found, found - wanted), ("solution", "error"), strict=True):
        figure.colorbar(ax.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r"), ax=ax, label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=2, choices=(2, 5))
    parser.add_argument("--seconds", type=float, default=60, help="for the steps of each method")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/poisson.png")
    parser.add_argument("--smoke", action="store_true", help="only a step or two, to see that it runs")
    options = parser.parse_args(arguments)
    dimension, seconds = options.dimension, 0.01 if options.smoke else options.seconds
    seeds = range(1 if options.smoke or dimension == 5 else 3)
    table, runs = Table("method", "seed", "error after a sixth", "at the end", "steps", "compile s"), []
    for name, make, seed in track([(*method, seed) for method in methods(dimension).items() for seed in seeds]):
        model, compilation, steps, history = train(make, dimension, seed, seconds, dimension == 2 or name == "L-BFGS")
        sixth = history[np.searchsorted(history[:, 0], seconds / 6, "right") - 1, 1]
        table.add_row(name, f"{seed}", f"{sixth:.1e}", f"{history[-1, 1]:.1e}", f"{steps}", f"{compilation:.1f}")
        runs.append((name, seed, history, model))
    plot(runs, dimension, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
