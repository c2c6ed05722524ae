"""The preset for mini-batches on ten seeds, K-FAC, and Adam with three learning rates: digits, a small transformer.

    python benchmarks/stochastic.py digits
    python benchmarks/stochastic.py transformer

Networks, data and schedules are those of the examples. Each seed is another initial model and other batches, the same
for all methods. A run has diverged if its last loss is above its first one, or not finite.
"""

import argparse
import os
import pathlib
import pydoc_data.topics
import sys
import time


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import transformer  # noqa: E402


class Digits:
    """A classifier, 128 examples at a time."""

    rate, adam_rates, steps, quality = 0.1, (1e-1, 3e-2, 1e-2), 400, "test accuracy"

    def __init__(self):
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
        self.train_set, self.test_set = (images[360:], labels[360:]), (images[:360], labels[:360])

    def model(self, key):
        return kfax.tag(eqx.nn.MLP(64, 10, 128, 2, key=key))

    def loss_fn(self, model, batch):
        images, labels = batch
        return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)

    def schedule(self, rate, is_adam):
        return optax.cosine_decay_schedule(rate, self.steps)

    def batch(self, rng):
        chosen = rng.choice(len(self.train_set[0]), 128, replace=False)
        return jax.tree.map(lambda x: x[chosen], self.train_set)

    def measure(self, model):
        right = jnp.argmax(jax.vmap(model)(self.test_set[0]), axis=1) == self.test_set[1]
        return self.loss_fn(model, self.train_set).value(), jnp.mean(right)


class Text:
    """A transformer with a tied head, on characters."""

    rate, adam_rates, steps, quality = 0.1, transformer.RATES, 200, "held-out loss"

    def __init__(self):
        paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
        characters, codes = np.unique(list("\n\n".join(dict.fromkeys(paragraphs))), return_inverse=True)
        texts = np.lib.stride_tricks.sliding_window_view(codes.astype(np.int32), transformer.LENGTH + 1)
        self.num_characters, end = len(characters), int(0.9 * len(texts))
        self.texts, held_out = texts[: end - transformer.LENGTH], texts[end:]
        self.measured = [jnp.asarray(x[np.linspace(0, len(x) - 1, 128, dtype=int)]) for x in (self.texts, held_out)]

    def model(self, key):
        return kfax.tag(transformer.Transformer(self.num_characters, key))

    def loss_fn(self, model, batch):
        return transformer.loss_fn(model, batch)

    def schedule(self, rate, is_adam):
        warmup = rate / 10 if is_adam else 0.0
        return optax.warmup_cosine_decay_schedule(warmup, rate, self.steps // 5, self.steps)

    def batch(self, rng):
        return jnp.asarray(self.texts[rng.integers(len(self.texts), size=transformer.BATCH_SIZE)])

    def measure(self, model):
        return tuple(self.loss_fn(model, texts).value() for texts in self.measured)


def preset(task, rate):
    return _by(kfax.stochastic(task.loss_fn, learning_rate=task.schedule(rate, True)))


def kfac(task, rate):
    """K-FAC itself, with the settings of the documentation."""
    optimizer = kfax.Optimizer(
        task.loss_fn,
        learning_rate=kfax.NormConstraint(task.schedule(rate, False), 1e-3),
        momentum=0.9,
        damping=1e-2,
        preconditioner=kfax.Preconditioner(inverse_update_period=kfax.Staggered(10)),
    )
    return _by(optimizer)


def _by(optimizer):
    def step(model, state, batch, key):
        model, state, info = optimizer.step(model, state, batch, key=key)
        return model, state, info.result != kfax.StepResult.successful

    return optimizer.init, step


def adam(task, rate):
    transform = optax.adam(task.schedule(rate, True))

    def step(model, state, batch, key):
        gradient = eqx.filter_grad(lambda model: task.loss_fn(model, batch).value())(model)
        updates, state = transform.update(gradient, state)
        return eqx.apply_updates(model, updates), state, jnp.zeros((), bool)

    return lambda model, batch: transform.init(eqx.filter(model, eqx.is_inexact_array)), step


def run(task, make, rate, seeds):
    """Rows of (first loss, last loss, quality, steps that were not plainly taken, seconds of stepping)."""
    init, step = map(eqx.filter_jit, make(task, rate))
    measure, rows = eqx.filter_jit(task.measure), []
    for seed in range(seeds):
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        model = task.model(jax.random.fold_in(key, 0))
        state, first, odd, seconds = init(model, task.batch(rng)), measure(model)[0], 0, 0.0
        for i in range(task.steps):
            batch, step_key = jax.block_until_ready((task.batch(rng), jax.random.fold_in(key, i + 1)))
            started = time.perf_counter()
            model, state, is_odd = jax.block_until_ready(step(model, state, batch, step_key))
            seconds += time.perf_counter() - started
            odd += int(is_odd)
        rows.append((first, *measure(model), odd, seconds))
    return np.array(rows, dtype=float)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("digits", "transformer"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=("preset", "kfac", "adam"))
    parser.add_argument("--rate", type=float, help="of K-FAC")
    options = parser.parse_args()
    task = {"digits": Digits, "transformer": Text}[options.task]()
    print(f"| {options.task}, {task.steps} steps, {options.seeds} seeds | last training loss: mean (worst) | "
          f"{task.quality}: mean | diverged | steps skipped | s (median) |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|")
    methods = [
        *((f"kfax.stochastic {r:g}", preset, r) for r in task.adam_rates),
        ("K-FAC, by hand", kfac, options.rate or task.rate),
        *((f"Adam {r:g}", adam, r) for r in task.adam_rates),
    ]
    for name, make, rate in methods:
        if options.only not in (None, make.__name__):
            continue
        rows = run(task, make, rate, options.seeds)
        diverged = np.sum(~(rows[:, 1] <= rows[:, 0]))
        last = f"{rows[:, 1].mean():.3g} ({rows[:, 1].max():.3g})"
        print(f"| {name} | {last} | {rows[:, 2].mean():.4g} | {diverged} | {rows[:, 3].sum():.0f} "
              f"| {np.median(rows[1:, 4]):.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
