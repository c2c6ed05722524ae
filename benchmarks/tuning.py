"""What changes when one setting of a preset is changed: the tables of the documentation's page on tuning.

    python benchmarks/tuning.py digits
    python benchmarks/tuning.py autoencoder

`digits` is the classifier of `stochastic.py` on mini-batches: learning rates and dampings, then single changes, and
Adam. `autoencoder` is that of the digits in the examples, on full batches. Data, seeds and initial weights are the same
in all rows of a table.
"""

import argparse
import functools
import pathlib
import sys
import time

import stochastic  # first: it sets OPENBLAS_NUM_THREADS


sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import autoencoder  # noqa: E402
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


RATES, DAMPINGS, ADAM_RATES = (1.0, 0.3, 0.1, 0.03, 0.01), (1.0, 1e-1, 1e-2, 1e-3), (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
AUTO, RULE, BLOCKS = kfax.QuadraticModel(), kfax.LevenbergMarquardt, kfax.BlockDiagonalCurvature
MINI_BATCHES = {
    "the preset": {},
    "norm constraint of 1e-2": {"bound": 1e-2},
    "norm constraint of 1e-4": {"bound": 1e-4},
    "no norm constraint": {"bound": None},
    "`momentum=0.0`": {"momentum": 0.0},
    "inverses at every step": {"inverse_update_period": 1},
    "inverses over 50 steps": {"inverse_update_period": kfax.Staggered(50)},
    "statistics every 5 steps": {"curvature_update_period": 5},
    "statistics of 1/8 of the batch": {"batch": kfax.Fraction(1 / 8)},
    "`decay=0.5`": {"estimator": BLOCKS(decay=0.5)},
    "`decay=0.99`": {"estimator": BLOCKS(decay=0.99)},
    "exact damping, `kfax.Eigh()`": {"block": kfax.KroneckerFactored(inversion=kfax.Eigh())},
    "`kfax.SampledFisher()`": {"estimator": BLOCKS(kfax.SampledFisher())},
    "`kfax.ExactGGN()`": {"estimator": BLOCKS(kfax.ExactGGN())},
    "`kfax.EmpiricalFisher()`": {"estimator": BLOCKS(kfax.EmpiricalFisher())},
}
FULL_BATCHES = {
    "the preset": {},
    "λ from 100 (relative)": {"damping": kfax.RelativeDamping(RULE(100.0, decay=0.8, minimum=1e-4))},
    "λ from 0.01 (relative)": {"damping": kfax.RelativeDamping(RULE(0.01, decay=0.8, minimum=1e-4))},
    "its decay 0.95": {"damping": kfax.RelativeDamping(RULE(1.0, decay=0.95, minimum=1e-4))},
    "its decay 0.5": {"damping": kfax.RelativeDamping(RULE(1.0, decay=0.5, minimum=1e-4))},
    "λ from 150 (absolute), decay 0.95": {"damping": RULE(150.0, decay=0.95)},
    "λ of 0.1 (absolute), fixed": {"damping": 0.1},
    "no momentum": {"momentum": 0.0},
    "statistics at every step, `decay=0.95`": {"estimator": BLOCKS(), "curvature_update_period": 1},
    "inverses at every step": {"inverse_update_period": 1, "curvature_update_period": 1},
    "inverses every 20 steps": {"inverse_update_period": 20, "curvature_update_period": 20},
    "no rejection": {"rejection": None},
    "quadratic model on 1/4 of the batch": {"learning_rate": kfax.QuadraticModel(batch=kfax.Fraction(1 / 4))},
}


class OtherBlocks(stochastic.Digits):
    """The same, with another block for all layers."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def model(self, key):
        return kfax.set_block(super().model(key), lambda model: model, self.block)


def mini_batches(task, rate, *, bound=1e-3, momentum=0.9, damping=1e-2, block=None, **settings):
    """The preset `kfax.stochastic`, taken apart."""
    schedule = task.schedule(rate, False)
    optimizer = kfax.Optimizer(
        task.loss_fn,
        learning_rate=kfax.LossConstraint(schedule, jnp.inf) if bound is None else kfax.NormConstraint(schedule, bound),
        momentum=momentum,
        damping=damping,
        preconditioner=kfax.Preconditioner(**({"inverse_update_period": kfax.Staggered(10)} | settings)),
    )

    def step(model, state, batch, key):
        model, state, info = optimizer.step(model, state, batch, key=key)
        return model, state, info.result != kfax.StepResult.successful

    return optimizer.init, step


def tune_digits(seeds):
    task = stochastic.Digits()

    def row(name, task, make, rate):
        rows = stochastic.run(task, make, rate, seeds)
        losses, accuracies, seconds = rows[:, 1], rows[:, 2], rows[:, 4]
        diverged, cost = np.sum(~(losses <= rows[:, 0])), 1e3 * np.median(seconds) / task.steps
        loss = f"{losses.mean():.2g} ({losses.max():.2g})"
        return loss, f"| {name} | {loss} | {accuracies.mean():.1%} | {diverged} | {cost:.1f} |"

    print("| learning rate from | " + " | ".join(f"λ = {x:g}" for x in DAMPINGS) + " |")
    print("|---" + "|---:" * len(DAMPINGS) + "|")
    for rate in RATES:
        losses = [row("", task, functools.partial(mini_batches, damping=x), rate)[0] for x in DAMPINGS]
        print(f"| {rate:g} | " + " | ".join(losses) + " |", flush=True)
    columns = "training loss: mean (worst) | test accuracy | diverged | ms a step"
    print(f"\n| {task.steps} steps, {seeds} seeds | {columns} |")
    print("|---|---:|---:|---:|---:|")
    for name, change in MINI_BATCHES.items():
        make = functools.partial(mini_batches, **change)
        print(row(name, OtherBlocks(change["block"]) if "block" in change else task, make, task.rate)[1], flush=True)
    for rate in ADAM_RATES:
        print(row(f"Adam {rate:g}", task, stochastic.adam, rate)[1], flush=True)


def full_batches(*, estimator=None, inverse_update_period=5, curvature_update_period=5, **settings):
    """The preset `kfax.full_batch`, taken apart."""
    rate = settings.get("learning_rate", AUTO)
    defaults = {
        "learning_rate": rate,
        "momentum": rate,
        "damping": kfax.RelativeDamping(RULE(1.0, decay=0.8, minimum=1e-4)),
        "rejection": kfax.Rejection(),
        "preconditioner": kfax.Preconditioner(
            BLOCKS(decay=0.5) if estimator is None else estimator,
            inverse_update_period=inverse_update_period,
            curvature_update_period=curvature_update_period,
        ),
    }
    optimizer = kfax.Optimizer(autoencoder.loss_fn, l2=autoencoder.L2, **(defaults | settings))
    return optimizer.init, optimizer.step


def tune_autoencoder(seeds, num_steps, adam_steps):
    images = np.random.default_rng(0).permutation(load_digits(return_X_y=True)[0] / 16).astype(np.float32)
    test_set, train_set = map(jnp.asarray, (images[:360], images[360:]))
    entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(train_set) + jax.scipy.special.entr(1 - train_set), axis=1))

    @eqx.filter_jit
    def measure(model):
        reconstructed = jax.nn.sigmoid(jax.vmap(model)(test_set))
        error = jnp.mean(jnp.sum(jnp.square(reconstructed - test_set), axis=1))
        return autoencoder.objective(model, train_set) - entropy, error

    def run(init, step, steps, seed):
        model = autoencoder.make_model(autoencoder.SIZES["digits"], jax.random.key(seed))
        state, seconds, results = init(model, train_set), 0.0, []
        for i in range(steps):
            key = jax.block_until_ready(jax.random.key(i))
            started = time.perf_counter()
            model, state, _ = jax.block_until_ready(step(model, state, train_set, key=key))
            seconds += 0.0 if i == 0 else time.perf_counter() - started  # the first one may be compiled
            if i + 1 in (steps // 3, steps):
                results.append(measure(model))
        return [float(results[0][0]), *map(float, results[1]), 1e3 * seconds / (steps - 1)]

    print(f"| {seeds} seeds | steps | nats above the floor after a third: mean | at the end: mean (worst) | "
          "test error | ms a step |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|")
    rows = {name: (num_steps, full_batches(**change)) for name, change in FULL_BATCHES.items()}
    rows |= {f"Adam {rate:g}": (adam_steps, autoencoder.make_adam(rate)) for rate in autoencoder.RATES}
    for name, (steps, (init, step)) in rows.items():
        init, step = eqx.filter_jit(init), eqx.filter_jit(step)
        early, last, error, cost = np.array([run(init, step, steps, seed) for seed in range(seeds)]).T
        print(f"| {name} | {steps} | {early.mean():.3g} | {last.mean():.3g} ({last.max():.3g}) | {error.mean():.2f} | "
              f"{np.median(cost):.0f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("digits", "autoencoder"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150, help="of K-FAC on the autoencoder")
    parser.add_argument("--adam-steps", type=int, default=600, help="about as many seconds")
    options = parser.parse_args()
    if options.task == "digits":
        tune_digits(options.seeds)
    else:
        tune_autoencoder(options.seeds, options.steps, options.adam_steps)


if __name__ == "__main__":
    main()
