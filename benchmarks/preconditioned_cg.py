"""Iterations of conjugate gradients for the damped exact GGN, `(C + λI) x = ∇h`: plain, and preconditioned by kfax.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/preconditioned_cg.py [repetitions]`. It takes half an hour on two busy
cores, nearly all of it for the statistics of the full blocks. Autoencoders of all 1,797 digits, full batch, λ = 1e-3,
float64, before and after training. Prints two tables in Markdown: iterations until the residual is at most 1e-1, 1e-3
and 1e-6 times the right-hand side (two-norms), and, for the trained networks, seconds of making a preconditioner
(update and refresh) and of a solve to 1e-3: medians of alternating runs, without compilation. What has taken ten
seconds in all is not run again.
"""

import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import lineax as lx  # noqa: E402
from lineax.internal import two_norm  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


DAMPING, TOLERANCES, MAX_STEPS, NUM_STEPS, SLOW = 1e-3, (1e-1, 1e-3, 1e-6), 20_000, 100, 10.0
NETWORKS = ((64, 64), (64, 16, 64), (64, 32, 12, 32, 64), (64, 48, 24, 12, 24, 48, 64))
BLOCKS = {
    "K-FAC, factored damping": kfax.KroneckerFactored(inversion=kfax.Cholesky()),
    "K-FAC, exact damping": kfax.KroneckerFactored(inversion=kfax.Eigh()),
    "full blocks": kfax.Full(),
}
EXACT, BY_BLOCKS = kfax.ImplicitExactCurvature(), kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
# CG does the same for s(C + λI) with a preconditioner divided by s, but x becomes x/s. A power of two rounds nothing.
SCALE = 2.0**60


def make_model(sizes):
    layers = []
    for i, (num_inputs, num_outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers += [eqx.nn.Linear(num_inputs, num_outputs, key=jax.random.key(i)), eqx.nn.Lambda(jnp.tanh)]
    return kfax.tag(eqx.nn.Sequential(layers[:-1]))


def loss_fn(model, images):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(images), images)


def train(model, images):
    auto = kfax.QuadraticModel()
    optimizer = kfax.Optimizer(loss_fn, learning_rate=auto, momentum=auto, damping=kfax.LevenbergMarquardt(initial=0.1))
    state, step = optimizer.init(model, images), eqx.filter_jit(optimizer.step)
    for i in range(NUM_STEPS):
        model, state, _ = step(model, state, images, key=jax.random.key(i))
    return model


@eqx.filter_jit
def differentiate(model, images):
    return eqx.filter_grad(lambda model: loss_fn(model, images).value())(model)


@eqx.filter_jit
def prepare(model, images):
    """The state of the preconditioner."""
    state = BY_BLOCKS.update(BY_BLOCKS.init(model), loss_fn, model, images)
    return BY_BLOCKS.refresh(state, kfax.parameters_of(model), DAMPING)


@eqx.filter_jit
def solve(state, model, images, gradient, tolerance):
    """Iterations, and the relative residual, computed anew."""
    operator = EXACT.as_operator(EXACT.update(EXACT.init(model), loss_fn, model, images), gradient, DAMPING)
    options = {}
    if state is not None:
        inverse = BY_BLOCKS.as_preconditioner(state, gradient)
        options["preconditioner"] = lx.TaggedLinearOperator(inverse / SCALE, lx.positive_semidefinite_tag)
    # lineax also tests the change of x, in the same units. Scaled down it is always small: the residual decides.
    solver = lx.CG(0.0, tolerance * two_norm(gradient), two_norm, max_steps=MAX_STEPS)
    scaled = lx.TaggedLinearOperator(operator * SCALE, lx.positive_semidefinite_tag)
    solution = lx.linear_solve(scaled, gradient, solver, options=options, throw=False)
    product = operator.mv(jax.tree.map(lambda x: SCALE * x, solution.value))
    residual = two_norm(jax.tree.map(jnp.subtract, product, gradient)) / two_norm(gradient)
    return solution.stats["num_steps"], residual


def count(*arguments, tolerance):
    number, residual = solve(*arguments, jnp.asarray(tolerance))
    if number >= MAX_STEPS:
        return f"> {MAX_STEPS}"
    assert residual <= 1.0001 * tolerance, (residual, tolerance)
    return str(number)


def measure(functions, repetitions):
    """By name, what the functions return, and the medians of their seconds."""
    results, seconds = {}, {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            if sum(seconds[name]) < SLOW:
                start = time.perf_counter()
                results[name] = jax.block_until_ready(function())
                seconds[name].append(time.perf_counter() - start)
    return results, {name: f"{statistics.median(times):.3g}" for name, times in seconds.items()}


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def main(repetitions=9):
    jax.config.update("jax_enable_x64", True)
    images = jnp.asarray(load_digits().data / 16)
    counts = [row("network", "", "plain CG", *BLOCKS), row("---", "---", *["---:"] * (1 + len(BLOCKS)))]
    names = [*(f"make: {name}" for name in BLOCKS), "solve: plain CG", *(f"solve: {name}" for name in BLOCKS)]
    clock = [row("trained network, seconds to", *names), row("---", *["---:"] * len(names))]
    for sizes in NETWORKS:
        model, network = make_model(sizes), "-".join(map(str, sizes))
        for when in ("initial", "trained"):
            if when == "trained":
                model = train(model, images)
            models = {name: kfax.set_block(model, lambda model: model, block) for name, block in BLOCKS.items()}
            making = {name: functools.partial(prepare, model, images) for name, model in models.items()}
            # In the first round, before training, everything is compiled.
            states, made = measure(making, 1 if when == "initial" else repetitions)
            models, states = {"plain": model} | models, {"plain": None} | states
            problems = {name: (states[name], m, images, differentiate(m, images)) for name, m in models.items()}
            cells = [" / ".join(count(*problem, tolerance=t) for t in TOLERANCES) for problem in problems.values()]
            counts.append(row(network, when, *cells))
            print(counts[-1], file=sys.stderr, flush=True)
        solving = {name: functools.partial(solve, *problem, jnp.asarray(1e-3)) for name, problem in problems.items()}
        clock.append(row(network, *made.values(), *measure(solving, repetitions)[1].values()))
        print(clock[-1], file=sys.stderr, flush=True)
    print(*counts, "", *clock, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
