"""Kronecker blocks against K-FAC: the time of an update, and steps to a loss if what a refresh makes is old.

    python benchmarks/kronecker_blocks.py updates
    python benchmarks/kronecker_blocks.py steps

Prints tables. The updates (the model forward, its gradient, and the statistics of one sample, taken into the running
average) alternate in one process, and what is shown are medians. Steps are counted until the loss on the training set
of the digits is below a target, as means over seeds.
"""

import argparse
import os
import statistics
import time


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


EIGH = kfax.Eigh()
BLOCKS = {
    "K-FAC": kfax.KroneckerFactored(inversion=EIGH),
    "corrected": kfax.EigenvalueCorrected(),
    "TNT": kfax.TensorNormal(inversion=EIGH),
    "Frobenius": kfax.FrobeniusOptimal(inversion=EIGH),
    "KL": kfax.KLOptimal(inversion=EIGH),
}


def loss_fn(model, batch):
    return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])


def reconstruct(model, batch):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)


def dense(key, sizes):
    layers = []
    for k, d_in, d_out in zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False):
        layers += [eqx.nn.Linear(d_in, d_out, key=k), eqx.nn.Lambda(jnp.tanh)]
    return eqx.nn.Sequential(layers[:-1])


def convnet(key):
    keys, layers = jax.random.split(key, 4), []
    for k, (d_in, d_out, stride) in zip(keys, [(3, 32, 1), (32, 64, 2), (64, 64, 2)], strict=False):
        layers += [eqx.nn.Conv2d(d_in, d_out, 3, stride, 1, key=k), eqx.nn.Lambda(jax.nn.relu)]
    layers += [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64 * 8 * 8, 10, key=keys[3])]
    return eqx.nn.Sequential(layers)


def workloads():
    key = jax.random.key(0)
    pixels, labels = jax.random.uniform(key, (500, 784)), jax.random.randint(key, (128,), 0, 10)
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    yield "autoencoder, batch of 500", dense(key, sizes), reconstruct, pixels
    yield "classifier of digits, batch of 128", dense(key, [64, 128, 128, 10]), loss_fn, (pixels[:128, :64], labels)
    yield "convnet, batch of 64", convnet(key), loss_fn, (jax.random.normal(key, (64, 3, 32, 32)), labels[:64])


def updates(options):
    """Milliseconds of an update with K-FAC, and how many times as long it takes with the others."""
    others = [name for name in BLOCKS if name != "K-FAC"]
    print(f"| workload | K-FAC, ms | {' | '.join(others)} |\n|---|---:|{'---:|' * len(others)}")
    estimator = kfax.BlockDiagonalCurvature()
    for name, model, loss, batch in workloads():
        if options.only not in name:
            continue
        runs = {}
        for block_name, block in BLOCKS.items():
            tagged = kfax.set_block(kfax.tag(model), lambda m: m, block)

            @eqx.filter_jit
            def run(model, state, batch, key, loss=loss):
                gradient = eqx.filter_grad(lambda m: loss(m, batch).value())(model)
                return gradient, estimator.update(state, loss, model, batch, key=key)

            # Not before a refresh: no basis is the identity then, and no weight.
            state = run(tagged, estimator.init(tagged), batch, jax.random.key(1))[1]
            state = eqx.filter_jit(estimator.refresh)(state, kfax.parameters_of(tagged), 0.1)
            runs[block_name] = (run, tagged, state)
        seconds = {block_name: [] for block_name in runs}
        for i in range(options.repeat):
            for block_name, (run, tagged, state) in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(tagged, state, batch, jax.random.key(i)))
                seconds[block_name].append(time.perf_counter() - start)
        medians = {block_name: 1000 * statistics.median(seconds[block_name]) for block_name in runs}
        ratios = " | ".join(f"{medians[other] / medians['K-FAC']:.2f}" for other in others)
        print(f"| {name} | {medians['K-FAC']:.1f} | {ratios} |", flush=True)


def steps(options):
    """Steps to each target, with a refresh at each step and every 50."""
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    heads = [f"{target:g}" for target in TARGETS]
    print(f"| learning rate, λ | block | period | {' | '.join(heads)} |\n|---|---|---:|{'---:|' * len(heads)}")
    for rate, damping in ((0.03, 0.1), (0.01, 0.01)):
        for name, block in BLOCKS.items():
            if options.only not in name:
                continue
            for period in (1, 50):
                run = runner(block, period, rate, damping, data)
                curves = np.array([run(seed) for seed in range(options.seeds)])
                counts = [
                    [1 + np.argmax(c < target) if min(c) < target else np.nan for c in curves] for target in TARGETS
                ]
                cells = " | ".join(f"{np.mean(c):.1f}" if np.isfinite(c).all() else "not all" for c in counts)
                print(f"| {rate}, {damping} | {name} | {period} | {cells} |", flush=True)


TARGETS = (0.2, 0.1, 0.05, 0.02, 0.01)


def runner(block, period, rate, damping, data, number=300):
    """A function of a seed, to the losses after each step."""
    preconditioner = kfax.Preconditioner(inverse_update_period=period)
    settings = {
        "learning_rate": kfax.LossConstraint(rate, jnp.inf),
        "momentum": 0.9,
        "damping": damping,
        "preconditioner": preconditioner,
    }
    optimizer = kfax.Optimizer(loss_fn, **settings)

    @eqx.filter_jit
    def train(model, indices, keys):
        arrays, rest = eqx.partition(model, eqx.is_array)

        def body(carry, xs):
            (arrays, state), (indices, key) = carry, xs
            batch = jax.tree.map(lambda x: x[indices], data)
            model, state, _ = optimizer.step(eqx.combine(arrays, rest), state, batch, key=key)
            return (eqx.filter(model, eqx.is_array), state), loss_fn(model, data).value()

        state = optimizer.init(model, jax.tree.map(lambda x: x[:128], data))
        return jax.lax.scan(body, (arrays, state), (indices, keys))[1]

    def run(seed):
        model = kfax.set_block(kfax.tag(dense(jax.random.key(seed), [64, 128, 128, 10])), lambda m: m, block)
        shuffle = np.random.default_rng(seed)
        indices = np.stack([shuffle.choice(len(data[1]), 128, replace=False) for _ in range(number)])
        return np.asarray(train(model, jnp.asarray(indices), jax.random.split(jax.random.key(seed), number)))

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["updates", "steps"])
    parser.add_argument(
        "--only", default="", help="workloads of updates, blocks of steps: those with this in their name"
    )
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    {"updates": updates, "steps": steps}[options.what](options)


if __name__ == "__main__":
    main()
