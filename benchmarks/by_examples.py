"""The exact matrix of a physics-informed network: `ExplicitExactCurvature.update` against plain JAX.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/by_examples.py [width] [depth]`. Poisson's equation in two dimensions, 900
points inside and 120 at the boundary, float64. Plain JAX is `vmap(grad)` of each kind of point by itself, written out
by hand, and one product of matrices. Medians of alternating runs.
"""

import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

import kfax  # noqa: E402


jax.config.update("jax_enable_x64", True)
REPETITIONS = 25


def inside(model, x):
    return jnp.trace(jax.hessian(model)(x)) + 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))


def loss_fn(model, batch):
    interior, boundary = batch
    residuals = [jax.vmap(lambda x: inside(model, x))(interior), jax.vmap(model)(boundary)]
    residuals = jnp.concatenate(residuals)
    return 0.5 * kfax.squared_error(residuals, jnp.zeros_like(residuals))


def main():
    width, depth = (int(x) for x in (*sys.argv[1:], "64", "1")[:2])
    model = eqx.nn.MLP(2, "scalar", width, depth, jnp.tanh, key=jax.random.key(0))
    batch = jax.random.uniform(jax.random.key(1), (900, 2)), jax.random.uniform(jax.random.key(2), (120, 2))
    estimator = kfax.ExplicitExactCurvature()
    state = estimator.init(model)
    parameters, rest = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(parameters)

    def by_hand(vector, batch):
        model = lambda v: eqx.combine(unravel(v), rest)  # noqa: E731
        gradients = jax.vmap(jax.grad(lambda v, x: inside(model(v), x)), (None, 0))(vector, batch[0])
        values = jax.vmap(jax.grad(lambda v, x: model(v)(x)), (None, 0))(vector, batch[1])
        jacobian = jnp.concatenate([gradients, values])
        return jacobian.T @ jacobian / len(jacobian)

    def update(vector, batch):
        return estimator.update(state, loss_fn, eqx.combine(unravel(vector), rest), batch).average.value

    programs = {"plain JAX": jax.jit(by_hand), "kfax": jax.jit(update)}
    found = {name: program(vector, batch) for name, program in programs.items()}
    error = jnp.max(jnp.abs(found["kfax"] - found["plain JAX"])) / jnp.max(jnp.abs(found["plain JAX"]))
    seconds = {name: [] for name in programs}
    for _ in range(REPETITIONS):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(vector, batch))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    ratio = statistics.median(x / y for x, y in zip(seconds["kfax"], seconds["plain JAX"], strict=True))
    print(f"{vector.size:,} parameters: {', '.join(f'{name} {ms:.1f} ms' for name, ms in medians.items())}")
    print(f"{ratio:.2f} times as long, largest difference {error:.1e}")


if __name__ == "__main__":
    main()
