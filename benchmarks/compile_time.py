"""Seconds to compile curvature for 10 and for 1,000 classes: their number must not unroll anything.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/compile_time.py [repetitions]`. Of an update of K-FAC with the exact GGN,
and of a product with the exact GGN: tracing, lowering and compiling together, with all caches cleared before. The
network is an MLP 64-128-C, the batch has 128 examples. Medians of alternating runs, and the ratio of these, which has
to be at most 1.5. In brackets the same of processor time, which depends less on what else the machine does.
"""

import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import kfax  # noqa: E402


SMALL, LARGE, BATCH_SIZE = 10, 1000, 128


def loss_fn(model, batch):
    inputs, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels)


def update(model, batch):
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    return estimator.update(estimator.init(model), loss_fn, model, batch)


def product(model, batch):
    estimator = kfax.ImplicitExactCurvature(kfax.ExactGGN())
    state = estimator.update(estimator.init(model), loss_fn, model, batch)
    return estimator.multiply(state, kfax.parameters_of(model))


def compile_seconds(function, num_classes):
    model = kfax.tag(eqx.nn.MLP(64, num_classes, 128, 1, key=jax.random.key(0)))
    inputs = jax.random.normal(jax.random.key(1), (BATCH_SIZE, 64))
    batch = jax.block_until_ready((inputs, jnp.arange(BATCH_SIZE) % num_classes))
    jax.clear_caches()
    clocks = time.perf_counter, time.process_time
    starts = [clock() for clock in clocks]
    eqx.filter_jit(function).lower(model, batch).compile()
    return [clock() - start for clock, start in zip(clocks, starts, strict=True)]


def main(repetitions=5):
    for function in (update, product):  # what is imported on first use
        compile_seconds(function, SMALL)
    print("|  | 10 classes | 1,000 classes | ratio |\n| --- | ---: | ---: | ---: |")
    for name, function in {"an update of `BlockDiagonalCurvature`": update, "an exact product": product}.items():
        seconds = {SMALL: [], LARGE: []}
        for _ in range(repetitions):
            for num_classes, times in seconds.items():
                times.append(compile_seconds(function, num_classes))
        (small, small_cpu), (large, large_cpu) = [
            map(statistics.median, zip(*x, strict=True)) for x in seconds.values()
        ]
        cells = f"{small:.2f} s ({small_cpu:.2f} s)", f"{large:.2f} s ({large_cpu:.2f} s)"
        print(f"| {name} | {' | '.join(cells)} | {large / small:.2f} ({large_cpu / small_cpu:.2f}) |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
