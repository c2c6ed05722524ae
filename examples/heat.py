"""A physics-informed network for the heat equation in space and time: Gauss-Newton and K-FAC against Adam.

Needs `pip install -e '.[examples]'`, and 2 minutes on two cores. A rod cools down, with both ends kept at zero. The
network is put into an expression that has the initial and the boundary values by itself, so that the loss is one mean.
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
from rich.table import Column, Table
from scipy.stats import qmc

import kfax


jax.config.update("jax_enable_x64", True)
DIFFUSIVITY, NUM_POINTS, ADAM_RATE = 0.1, 1024, 3e-3  # of 1e-2, 3e-3 and 1e-3 the best
TEST_POINTS = np.stack(np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101)), axis=-1)


def solution(point):
    """Two waves that fade, the shorter one faster; of points (t, x) along the last axis."""
    wave = lambda k, t, x: jnp.exp(-DIFFUSIVITY * (k * jnp.pi) ** 2 * t) * jnp.sin(k * jnp.pi * x)  # noqa: E731
    return wave(1, point[..., 0], point[..., 1]) + wave(3, point[..., 0], point[..., 1]) / 2


class Temperature(eqx.Module):
    """u at a point (t, x)."""

    network: eqx.nn.MLP

    def __call__(self, point):
        t, x = point
        return solution(point.at[0].set(0)) + t * x * (1 - x) * self.network(point)


def residual(model, point):
    """∂u/∂t - D ∂²u/∂x², by derivatives in forward mode along the axes of time and space."""
    along = lambda direction: lambda point: jax.jvp(model, (point,), (direction,))[1]  # noqa: E731
    in_time, in_space = jnp.eye(2)
    return along(in_time)(point) - DIFFUSIVITY * jax.jvp(along(in_space), (point,), (in_space,))[1]


def loss_fn(model, points):
    residuals = jax.vmap(lambda point: residual(model, point), axis_name="batch")(points)
    return kfax.squared_error(residuals, jnp.zeros_like(residuals))


def gauss_newton(model, points):
    """With the exact matrix, and a damping in proportion to the loss, with which it converges quadratically."""
    inverse = kfax.Preconditioner(kfax.ExplicitExactCurvature(decay=1e-9), inverse_update_period=1)
    optimizer = kfax.Optimizer(loss_fn, learning_rate=1.0, momentum=0.0, damping=1.0, preconditioner=inverse)

    def step(model, state, points, key):
        damping = jnp.clip(0.1 * kfax.value(loss_fn(model, points)), 1e-12, 100)
        return optimizer.step(model, state, points, damping=damping)

    return optimizer.init(model, points), step


def kfac(model, points):
    """As `kfax.full_batch`, but with new inverses at each step, and a damping that may fall further."""
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=0.5, example_axis="batch")
    inverse, auto = kfax.Preconditioner(estimator, inverse_update_period=1), kfax.QuadraticModel()
    damping = kfax.RelativeDamping(kfax.LevenbergMarquardt(1.0, decay=0.8, minimum=1e-12))
    rules = {"learning_rate": auto, "momentum": auto, "damping": damping, "rejection": kfax.Rejection()}
    optimizer = kfax.Optimizer(loss_fn, **rules, preconditioner=inverse)
    return optimizer.init(model, points), optimizer.step


def adam(model, points):
    optim = optax.adam(optax.exponential_decay(ADAM_RATE, 1000, 0.9))

    def step(model, state, points, key):
        loss, gradients = eqx.filter_value_and_grad(lambda model: kfax.value(loss_fn(model, points)))(model)
        updates, state = optim.update(gradients, state)
        return eqx.apply_updates(model, updates), state, loss

    return optim.init(eqx.filter(model, eqx.is_array)), step


METHODS = {"Gauss-Newton": gauss_newton, "K-FAC": kfac, "Adam": adam}


def train(make, seconds):
    """The model, seconds to compile, the number of steps, and seconds of steps with relative errors along the way."""
    network = eqx.nn.MLP(2, "scalar", 24, 2, jnp.tanh, key=jax.random.key(0))
    model, points, start = kfax.tag(Temperature(network)), qmc.Sobol(2, rng=0).random(NUM_POINTS), time.perf_counter()
    state, step = make(model, points)
    step = eqx.filter_jit(step)
    jax.block_until_ready(step(model, state, points, key=jax.random.key(0))[:2])
    compilation, spent, steps, history = time.perf_counter() - start, 0.0, 0, []
    while spent < seconds:
        start = time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, points, key=jax.random.key(steps)))
        spent, steps = spent + time.perf_counter() - start, steps + 1
        if not history or spent > min(history[-1][0] + seconds / 100, seconds):
            error = jnp.linalg.norm(jax.vmap(jax.vmap(model))(TEST_POINTS) - solution(TEST_POINTS))
            history.append((spent, float(error / jnp.linalg.norm(solution(TEST_POINTS)))))
    return model, compilation, steps, np.array(history)


def plot(histories, model, path):
    """Errors against seconds; and what the first method found, with its error."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    curves, *maps = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    for name, history in histories.items():
        curves.plot(*history.T, label=name)
    curves.set(yscale="log", xlabel="seconds of steps", ylabel="relative L2 error")
    curves.legend()
    found = jax.vmap(jax.vmap(model))(TEST_POINTS)
    for ax, values, title in zip(maps, (found, found - solution(TEST_POINTS)), ("temperature", "error"), strict=True):
        figure.colorbar(ax.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r"), ax=ax)
        ax.set(title=f"{title}, {next(iter(histories))}", xlabel="time", ylabel="place")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="for the steps of each method")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/heat.png")
    parser.add_argument("--smoke", action="store_true", help="only a step or two, to see that it runs")
    options = parser.parse_args(arguments)

    columns = ("error after a sixth", "at the end", "steps", "compile s")
    table, histories, models = Table("method", *(Column(name, justify="right") for name in columns)), {}, []
    for name, make in track(METHODS.items(), total=len(METHODS)):
        seconds = 0.01 if options.smoke else options.seconds
        model, compilation, steps, history = train(make, seconds)
        models, histories[name] = [*models, model], history
        sixth = history[np.searchsorted(history[:, 0], seconds / 6, "right") - 1, 1]
        table.add_row(name, f"{sixth:.1e}", f"{history[-1, 1]:.1e}", f"{steps}", f"{compilation:.1f}")
    plot(histories, models[0], options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
