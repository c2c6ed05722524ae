"""How many of 96 plausible settings by hand diverge on the digits, with and without a norm constraint.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/divergence.py [mlp|convnet] [bound ...]`, which takes a minute or more for
each bound. Learning rates of 0.02 to 0.2, momenta of 0 and 0.9, dampings of 3e-3 to 0.1, and inverses renewed every 1,
5 and 20 steps of the bare `kfax.Optimizer`, 200 steps on batches of 200, one seed. A run has diverged if a loss is not
finite or if the mean of the last ten is above the first one. Settings of one momentum and period are trained at once.
Without a bound the learning rate is as it is given; `kfax.NormConstraint` lowers it where a step would be too long.
"""

import itertools
import os
import sys


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


LEARNING_RATES, MOMENTA = (0.02, 0.05, 0.1, 0.2), (0.0, 0.9)
DAMPINGS, PERIODS = (3e-3, 1e-2, 3e-2, 1e-1), (1, 5, 20)
NUM_STEPS, BATCH_SIZE, NUM_TRAINING = 200, 200, 1400


class Convnet(eqx.Module):
    """Two convolutions, the second with a stride, and a head."""

    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 8, 3, padding=1, key=k1),
            eqx.nn.Conv2d(8, 16, 3, stride=2, padding=1, key=k2),
        ]
        self.head = eqx.nn.Linear(256, 10, key=k3)

    def __call__(self, image):
        x = image.reshape(1, 8, 8)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x.reshape(-1))


def make_model(network, key):
    return Convnet(key) if network == "convnet" else eqx.nn.MLP(64, 10, 64, 2, activation=jax.nn.relu, key=key)


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def draw_batches():
    digits, rng = load_digits(), np.random.default_rng(0)
    chosen = rng.permutation(len(digits.data))[:NUM_TRAINING]
    rows = np.stack([rng.choice(chosen, BATCH_SIZE, replace=False) for _ in range(NUM_STEPS)])
    return jnp.asarray(digits.data / 16, jnp.float32)[rows], jnp.asarray(digits.target)[rows]


def train(model, batches, momentum, period, bound):
    """The losses of all steps, for each pair of a learning rate and a damping."""

    @eqx.filter_vmap(in_axes=(0, 0, None, None))
    def one(learning_rate, damping, model, batches):
        optimizer = kfax.Optimizer(
            loss_fn,
            learning_rate=learning_rate if bound is None else kfax.NormConstraint(learning_rate, bound),
            momentum=momentum,
            damping=damping,
            preconditioner=kfax.Preconditioner(inverse_update_period=period),
        )
        arrays, rest = eqx.partition(model, eqx.is_array)

        def body(carry, batch_and_key):
            batch, key = batch_and_key
            model, state, info = optimizer.step(eqx.combine(carry[0], rest), carry[1], batch, key=key)
            return (eqx.filter(model, eqx.is_array), state), info.loss

        state = optimizer.init(model, jax.tree.map(lambda x: x[0], batches))
        keys = jax.random.split(jax.random.key(0), NUM_STEPS)
        return jax.lax.scan(body, (arrays, state), (batches, keys))[1]

    pairs = np.array(list(itertools.product(LEARNING_RATES, DAMPINGS)), np.float32).T
    return np.array(eqx.filter_jit(one)(*map(jnp.asarray, pairs), model, batches))


def main(network="mlp", *bounds):
    model, batches = kfax.tag(make_model(network, jax.random.key(0))), draw_batches()
    print("| network | bound | momentum | diverged, inverses every 1 | 5 | 20 steps | median last loss of the others |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for bound in [None, *map(float, bounds or ("1e-3", "1e-2", "1e-1"))]:
        for momentum in MOMENTA:
            counts, last = [], []
            for period in PERIODS:
                losses = train(model, batches, momentum, period, bound)
                ends = losses[:, -10:].mean(axis=1)
                diverged = ~np.isfinite(losses).all(axis=1) | ~(ends <= losses[:, 0])
                counts.append(f"{diverged.sum()} of {len(ends)}")
                last.extend(ends[~diverged])
            label = "none" if bound is None else f"{bound:g}"
            print(f"| {network} | {label} | {momentum} | {' | '.join(counts)} | {np.median(last):.2g} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
