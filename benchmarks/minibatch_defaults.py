"""How the settings of `kfax.EigenbasisAdam` were chosen: on three tasks that `minibatch.py` does not report.

    python benchmarks/minibatch_defaults.py

A row is one setting changed. Held-out losses at the end are means over seeds, each at the best of three learning rates
(the same for all settings), divided by those of the first row; and the geometric mean of the three ratios.
"""

import argparse
import os
import pathlib
import sys


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import autoencoder  # noqa: E402
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from minibatch import Program  # noqa: E402
from minibatch_methods import from_kfax, Method  # noqa: E402
from minibatch_tasks import Task, TEST_SIZE  # noqa: E402

import kfax


RATES, SETTINGS = (0.003, 0.01, 0.03), {"warmup": 0.1, "weight_decay": 0.03}


class Curves(Task):
    """An autoencoder of curves drawn at random."""

    name, steps, period, batch_size, size = "curves", 300, 300, 128, 2**14

    def __init__(self):
        draw = autoencoder.draw_curves
        self.train_set, self.test_set = (jnp.asarray(draw(self.size, 0)),), (jnp.asarray(draw(TEST_SIZE, 1)),)

    def model(self, key):
        return autoencoder.make_model((784, 200, 100, 25, 6), key)

    def loss_fn(self, model, batch, model_state):
        return autoencoder.loss_fn(model, batch[0]), model_state


class Votes(Task):
    """A classifier learns what a random one says, from examples of which each is seen about once."""

    name, steps, period, batch_size, size = "votes", 400, 400, 128, 2**16
    num_inputs, num_outputs = 32, 10

    def __init__(self):
        keys = jax.random.split(jax.random.key(7))
        teacher = eqx.nn.MLP(self.num_inputs, self.num_outputs, 48, 1, jnp.tanh, key=keys[0])
        teacher = jax.tree.map(lambda x: 3 * x if eqx.is_inexact_array(x) else x, teacher)
        inputs = jax.random.normal(keys[1], (self.size + TEST_SIZE, self.num_inputs))
        labels = jnp.argmax(jax.vmap(teacher)(inputs), axis=1)
        self.train_set = inputs[TEST_SIZE:], labels[TEST_SIZE:]
        self.test_set = inputs[:TEST_SIZE], labels[:TEST_SIZE]

    def model(self, key):
        return eqx.nn.MLP(self.num_inputs, self.num_outputs, 128, 3, key=key)

    def loss_fn(self, model, batch, model_state):
        inputs, labels = batch
        return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels), model_state


class Reader(eqx.Module):
    """Predicts the next of each symbol."""

    embedding: eqx.nn.Embedding
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, num_symbols, key, width=48):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(num_symbols, width, key=keys[0])
        self.cell = eqx.nn.LSTMCell(width, width, key=keys[1])
        self.head = eqx.nn.Linear(width, num_symbols, key=keys[2])

    def __call__(self, symbols):
        arrays, rest = eqx.partition(self.cell, eqx.is_array)

        def step(state, x):
            state = eqx.combine(arrays, rest)(x, state)
            return state, state[0]

        start = jnp.zeros(self.cell.hidden_size), jnp.zeros(self.cell.hidden_size)
        _, hidden = jax.lax.scan(step, start, jax.vmap(self.embedding)(symbols))
        return jax.vmap(self.head)(hidden)


class Chains(Task):
    """A recurrent network learns a random Markov chain of second order."""

    name, steps, period, batch_size, size = "chains", 300, 300, 32, 2**13
    num_symbols, length = 12, 32

    def __init__(self):
        rng = np.random.default_rng(0)
        logits = 2.5 * rng.normal(size=(self.num_symbols, self.num_symbols, self.num_symbols))
        shares = np.cumsum(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), axis=-1)
        words = rng.integers(self.num_symbols, size=(self.size + TEST_SIZE, self.length + 1))
        for i in range(2, self.length + 1):
            found = shares[words[:, i - 2], words[:, i - 1]] < rng.random(len(words))[:, None]
            words[:, i] = np.minimum(found.sum(axis=1), self.num_symbols - 1)
        self.train_set, self.test_set = (jnp.asarray(words[TEST_SIZE:]),), (jnp.asarray(words[:TEST_SIZE]),)

    def model(self, key):
        return Reader(self.num_symbols, key)

    def loss_fn(self, model, batch, model_state):
        logits = jax.vmap(model)(batch[0][:, :-1])
        return kfax.softmax_cross_entropy(logits, batch[0][:, 1:], mean_over_positions=True), model_state


CHANGES = {
    "period 10, decay 0.6, b1 0.9, b2 0.95, limit 2": {},
    "decay 0.3": {"decay": 0.3},
    "period 5": {"period": 5},
    "period 5, decay 0.3": {"period": 5, "decay": 0.3},
    "decay 0.01": {"decay": 0.01},
    "decay 0.9": {"decay": 0.9},
    "b1 0.8": {"b1": 0.8},
    "b1 0.95": {"b1": 0.95},
    "b2 0.9": {"b2": 0.9},
    "b2 0.99": {"b2": 0.99},
    "limit 1": {"limit": 1.0},
    "limit 4": {"limit": 4.0},
    "empirical Fisher": {"source": kfax.EmpiricalFisher()},
}


def method(period=10, decay=0.6, source=kfax.CurvaturePropagation(), **settings):
    def make(task, numbers, rate):
        estimator = kfax.BlockDiagonalCurvature(source, decay=decay)
        return kfax.Optimizer(
            task.loss_fn,
            learning_rate=rate,
            momentum=0.0,
            damping=1e-16,
            weight_decay=numbers["weight_decay"],
            preconditioner=kfax.EigenbasisAdam(estimator, period=period, **settings),
        )

    return Method(from_kfax(make), {})


def losses(task, change, seeds):
    """Held-out losses at the end, by learning rate and seed."""
    program = Program(task, method(**change))
    run = lambda rate, seed: program.run(SETTINGS | {"rate": rate}, seed, task.steps)["held_out"][-1]  # noqa: E731
    return np.array([[run(rate, seed) for seed in range(seeds)] for rate in RATES])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tasks, first = [Curves(), Votes(), Chains()], None
    print("| | " + " | ".join(task.name for task in tasks) + " | all |\n|---" + "|---:" * 4 + "|")
    for name, change in CHANGES.items():
        found = np.array([np.nanmin(np.mean(losses(task, change, options.seeds), axis=1)) for task in tasks])
        if first is None:
            first = found
            print("| " + " | ".join([name, *(f"{x:.4f}" for x in found), "1"]) + " |", flush=True)
            continue
        ratios = found / first
        cells = [f"{x:.3f}" for x in (*ratios, np.exp(np.mean(np.log(ratios))))]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
