"""How many of 96 plausible settings by hand diverge on the digits, with and without constraints.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/divergence.py [mlp|convnet] [bound ...]`, which takes half a minute or
more for each row. Learning rates of 0.02 to 0.2, momenta of 0 and 0.9, dampings of 3e-3 to 0.1, and inverses renewed
every 1, 5 and 20 steps of the bare `kfax.Optimizer`, 200 steps on batches of 200, one seed. A run has diverged if a
loss is not finite or if the mean of the last ten is above the first one. Learning rates are taken as they are, lowered
by `kfax.LossConstraint`, as plain numbers are, or by `kfax.NormConstraint` with the bounds that are given.
"""

import functools
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


@eqx.filter_jit
def advance(optimizer, model, state, batch, key):
    return optimizer.step(model, state, batch, key=key)


def train(model, batches, learning_rate, momentum, damping, period):
    """The losses of all steps. Programs are shared by settings that differ in numbers only."""
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=learning_rate,
        momentum=momentum,
        damping=damping,
        preconditioner=kfax.Preconditioner(inverse_update_period=period),
    )
    losses, state = [], eqx.filter_jit(optimizer.init)(model, batches[0])
    for i, batch in enumerate(batches):
        model, state, info = advance(optimizer, model, state, batch, jax.random.key(i))
        losses.append(info.loss)
    return np.array(losses)


def main(network="mlp", *bounds):
    model, (images, labels) = kfax.tag(make_model(network, jax.random.key(0))), draw_batches()
    batches = list(zip(images, labels, strict=True))
    rows = {"as it is": lambda rate: kfax.LossConstraint(rate, jnp.inf), "a plain number": lambda rate: rate}
    for bound in map(float, bounds):
        rows[f"`NormConstraint` of {bound:g}"] = functools.partial(kfax.NormConstraint, bound=bound)
    print("| network | learning rate | momentum | diverged, inverses every 1 | 5 | 20 | median loss of the others |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (label, constrain), momentum in itertools.product(rows.items(), MOMENTA):
        counts, last = [], []
        for period in PERIODS:
            pairs = list(itertools.product(LEARNING_RATES, DAMPINGS))
            losses = [train(model, batches, constrain(rate), momentum, damping, period) for rate, damping in pairs]
            ends = [np.mean(each[-10:]) for each in losses]
            fine = [bool(np.isfinite(x).all() and end <= x[0]) for x, end in zip(losses, ends, strict=True)]
            counts.append(f"{len(fine) - sum(fine)} of {len(fine)}")
            last.extend(end for end, is_fine in zip(ends, fine, strict=True) if is_fine)
        print(f"| {network} | {label} | {momentum} | {' | '.join(counts)} | {np.median(last):.2g} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
