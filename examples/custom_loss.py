"""Regression with outliers: a loss of one's own, the negative log-likelihood of Student's t, against squared error.

Needs `pip install -e '.[examples]'`, and half a minute on two cores. Prints a table, and saves a plot. A loss is a
class with a few methods, which `kfax.check_loss` compares with automatic differentiation. That of Student's t is not
convex, so its Hessian is no curvature to divide by; its Fisher information is, and the optimizer is told to use it.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table

import kfax


FREEDOM, WIDTH, SCALE = 2.0, 0.1, 0.1  # ν of the distribution and its width; the noise of the data


class StudentT(kfax.Loss):
    """`(ν + 1)/2 log(1 + z²/ν)`, with `z = (f - y)/width`: that of an outlier hardly depends on f."""

    outputs: jax.Array
    targets: jax.Array
    weighting: kfax.Weighting

    def losses(self):
        z = (self.outputs - self.targets) / WIDTH
        return (FREEDOM + 1) / 2 * jnp.log1p(z**2 / FREEDOM)

    def ggn_factor(self, vector):
        raise ValueError("The negative log-likelihood of Student's t is not convex: use `kfax.ExactFisher()`.")

    def ggn_factor_transpose(self, vector):
        return self.ggn_factor(vector)

    def ggn_product(self, vector):
        return self.ggn_factor(vector)

    def fisher_factor(self, vector):
        """The Fisher information is (ν + 1)/(ν + 3)/width², whatever the outputs; this is its root."""
        return jnp.sqrt((FREEDOM + 1) / (FREEDOM + 3)) / WIDTH * vector

    def fisher_factor_transpose(self, vector):
        return self.fisher_factor(vector)

    def sampled_gradient(self, key):
        z = -jax.random.t(key, FREEDOM, self.outputs.shape, self.outputs.dtype)
        return (FREEDOM + 1) * z / (FREEDOM + z**2) / WIDTH


def robust(model, batch):
    inputs, targets = batch
    return StudentT(outputs=jax.vmap(model)(inputs), targets=targets, weighting=kfax.Weighting())


def squared(model, batch):
    inputs, targets = batch
    return kfax.squared_error(jax.vmap(model)(inputs), targets)


def truth(x):
    return jnp.sin(3 * x) + 0.5 * x


def draw_data(rng, number):
    """A curve with noise, and one target in five that has nothing to do with it."""
    x = rng.uniform(-2, 2, size=(number, 1))
    y = truth(x) + SCALE * rng.normal(size=x.shape)
    strays = rng.uniform(size=x.shape) < 0.2
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.where(strays, rng.uniform(1, 5, size=x.shape), y), jnp.float32)


def train(loss_fn, model, data, num_steps, advance):
    # The Fisher information, in the preconditioner as in the quadratic model.
    estimator, auto = kfax.BlockDiagonalCurvature(kfax.ExactFisher()), kfax.QuadraticModel(kfax.ExactFisher())
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=auto,
        momentum=auto,
        damping=kfax.RelativeDamping(kfax.LevenbergMarquardt(1.0, decay=0.8)),
        preconditioner=kfax.Preconditioner(estimator),
        rejection=kfax.Rejection(),
    )
    state, step, losses = optimizer.init(model, data), eqx.filter_jit(optimizer.step), []
    for i in range(num_steps):
        model, state, info = step(model, state, data, key=jax.random.key(i))
        losses.append(float(info.loss))
        advance()
    return model, losses


def plot(data, models, path):
    figure = Figure(figsize=(8, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax, grid = figure.subplots(), jnp.linspace(-2, 2, 200)[:, None]
    ax.plot(*data, ".", color="0.7", markersize=3)
    ax.plot(grid, truth(grid), "k--", linewidth=1, label="truth")
    for (name, model), color in zip(models.items(), ("#0072B2", "#D55E00"), strict=True):
        ax.plot(grid, jax.vmap(model)(grid), color=color, linewidth=2, label=name)
    ax.set(xlabel="x", ylabel="y")
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/custom_loss.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps

    inputs, targets = data = draw_data(np.random.default_rng(0), 400)
    kfax.check_loss(StudentT(outputs=inputs, targets=targets, weighting=kfax.Weighting()), key=jax.random.key(0))
    model, grid = kfax.tag(eqx.nn.MLP(1, 1, 32, 2, jnp.tanh, key=jax.random.key(1))), jnp.linspace(-2, 2, 200)[:, None]
    table = Table("loss", *(Column(name, justify="right") for name in ("before", "after", "distance from the truth")))
    models = {}
    with Progress() as progress:
        bar = progress.add_task("training", total=2 * num_steps)
        for name, loss_fn in (("Student's t", robust), ("squared error", squared)):
            models[name], losses = train(loss_fn, model, data, num_steps, lambda: progress.advance(bar))
            distance = jnp.sqrt(jnp.mean((jax.vmap(models[name])(grid) - truth(grid)) ** 2))
            table.add_row(name, f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{distance:.3f}")
    plot(data, models, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()
