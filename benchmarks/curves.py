"""The deep autoencoder of CURVES, full batch: seconds and steps of kfax, kfac-jax, Adam and Muon to a training loss.

Every method has the same network, data, initial weights and L2, and runs in a process of its own:

    python benchmarks/curves.py kfax --seconds 120
    python benchmarks/curves.py --report

kfac-jax 0.0.8 needs an environment with `jax==0.9.0`. Compilation is timed apart, by a run of some steps that is thrown
away. The loss is measured off the clock. Results are files in `benchmarks/results`.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time


# LAPACK's own threads wait for XLA's: for all methods alike.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402


sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from autoencoder import draw_curves  # noqa: E402


RESULTS = pathlib.Path(__file__).parent / "results"
SIZES, L2, CODE = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), 1e-5, 6
TARGETS = (10.0, 1.0, 0.1)  # nats above the entropy of the data


def initial(seed):
    """Weights `(inputs, outputs)` of variance 1/inputs, biases of zero."""
    rng, pairs = np.random.default_rng(seed), zip(SIZES[:-1], SIZES[1:], strict=True)
    drawn = [(rng.normal(size=(i, o)) / np.sqrt(i), np.zeros(o)) for i, o in pairs]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


def logits_of(params, x):
    for i, (w, b) in enumerate(params, start=1):
        x = x @ w + b
        x = x if i in (CODE, len(params)) else jnp.tanh(x)
    return x


def cross_entropy(params, x):
    logits = logits_of(params, x)
    return jnp.mean(jnp.sum(jnp.logaddexp(0, logits) - x * logits, axis=1))


def regularized(params, x):
    return cross_entropy(params, x) + L2 / 2 * sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))


class Kfax:
    """The preset for full batches."""

    def __init__(self, data):
        import equinox as eqx

        import kfax

        def loss_fn(model, batch):
            return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)

        self.eqx, self.kfax, self.data = eqx, kfax, data
        self.optimizer = kfax.full_batch(loss_fn, l2=L2)
        self.step_fn = eqx.filter_jit(self.optimizer.step)

    def begin(self, seed):
        eqx = self.eqx
        layers = []
        for i, (w, b) in enumerate(initial(seed), start=1):
            layer = eqx.filter_eval_shape(eqx.nn.Linear, *w.shape, key=jax.random.key(0))
            layers.append(eqx.tree_at(lambda m: (m.weight, m.bias), layer, (w.T, b)))
            layers.append(eqx.nn.Identity() if i in (CODE, len(SIZES) - 1) else eqx.nn.Lambda(jnp.tanh))
        self.model = self.kfax.tag(eqx.nn.Sequential(layers))
        self.state = eqx.filter_jit(self.optimizer.init)(self.model, self.data)

    def step(self, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        self.model, self.state, info = self.step_fn(self.model, self.state, self.data, key=key)
        self.damping = info.damping
        jax.block_until_ready(info.loss)

    def params(self):
        return [(m.weight.T, m.bias) for m in self.model.layers if hasattr(m, "weight")]


class KfacJax:
    """With the settings of its own example of an autoencoder, or others."""

    def __init__(self, data, **settings):
        import kfac_jax

        def value(params, x):
            logits = logits_of(params, x)
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, x)
            return regularized(params, x)

        example = {
            "initial_damping": 150.0,
            "min_damping": 1e-5,
            "max_damping": 1000.0,
            "damping_adaptation_decay": 0.95,
            "damping_adaptation_interval": 5,
            "num_burnin_steps": 5,
            "inverse_update_period": 5,
            "curvature_ema": 0.95,
        }
        adaptive = {f"use_adaptive_{name}": True for name in ("learning_rate", "momentum", "damping")}
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(value), l2_reg=L2, multi_device=False, **adaptive, **(example | settings)
        )
        self.data = data

    def begin(self, seed):
        self.key, self.weights = jax.random.key_data(jax.random.key(1)), initial(seed)
        self.state = self.optimizer.init(self.weights, self.key, self.data)

    def step(self, i):
        self.key, key = jax.random.split(self.key)
        batches = iter(lambda: self.data, None)
        self.weights, self.state, stats = self.optimizer.step(
            self.weights, self.state, key, data_iterator=batches, global_step_int=i
        )
        self.damping = stats["damping"]
        jax.block_until_ready(stats["loss"])

    def params(self):
        return self.weights


class Optax:
    """A first-order method on mini-batches of 500, each step one of them."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

        def step(params, state, x):
            gradient = jax.grad(regularized)(params, x)
            updates, state = transform.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.step_fn = jax.jit(step, donate_argnums=(0, 1))

    def begin(self, seed):
        self.weights, self.order = initial(seed), np.random.default_rng(seed)
        self.state, self.batches, self.damping = self.transform.init(self.weights), [], np.nan

    def step(self, i):
        if not self.batches:
            self.batches = list(self.order.permutation(len(self.data)).reshape(-1, 500))
        self.weights, self.state = self.step_fn(self.weights, self.state, self.data[self.batches.pop()])
        jax.block_until_ready(self.weights)

    def params(self):
        return self.weights


METHODS = {
    "kfax": Kfax,
    "kfac-jax": KfacJax,
    "kfac-jax, kfax's damping": lambda data: KfacJax(data, **json.loads((RESULTS / "damping.json").read_text())),
    "Adam 1e-3": lambda data: Optax(data, optax.adam(1e-3)),
    "Muon 1e-2": lambda data: Optax(data, optax.contrib.muon(1e-2)),
}


def run(name, seconds, seed):
    data = jnp.asarray(draw_curves(2000, seed=0))
    floor = float(jnp.mean(jnp.sum(jax.scipy.special.entr(data) + jax.scipy.special.entr(1 - data), axis=1)))
    method, loss = METHODS[name](data), jax.jit(cross_entropy)
    started = time.perf_counter()
    method.begin(seed)
    warm = []
    for i in range(12):  # every branch of a step is run: refreshes, and adjustments of the damping
        before = time.perf_counter()
        method.step(i)
        warm.append(time.perf_counter() - before)
    compiling = time.perf_counter() - started - 12 * float(np.median(warm))
    method.begin(seed)
    clock, curve, step = 0.0, [(0, 0.0, float(loss(method.params(), data)) - floor)], 0
    while clock < seconds and curve[-1][2] > TARGETS[-1] * 0.9:
        before = time.perf_counter()
        method.step(step)
        clock += time.perf_counter() - before
        step += 1
        if step == 1 and name == "kfax":
            damping = {"initial_damping": float(method.damping), "damping_adaptation_decay": 0.8}
        if step % (5 if "kfa" in name else 25) == 0:
            curve.append((step, clock, float(loss(method.params(), data)) - floor))
    RESULTS.mkdir(exist_ok=True)
    if name == "kfax":
        (RESULTS / "damping.json").write_text(json.dumps(damping | {"min_damping": 1e-8}))
    result = {"name": name, "compile_seconds": compiling, "curve": curve, "seed": seed, "jax": jax.__version__,
              "machine": f"{os.cpu_count()} cores, {platform.machine()}"}  # fmt: skip
    (RESULTS / f"curves-{name.replace(' ', '-')}-{seed}.json").write_text(json.dumps(result))
    print(row(result))


def row(result):
    curve = np.array(result["curve"])
    cells = [f"{result['compile_seconds']:.1f}", f"{1000 * curve[-1, 1] / curve[-1, 0]:.0f}"]
    for target in TARGETS:
        reached = np.flatnonzero(curve[:, 2] <= target)
        cells.append(f"{curve[reached[0], 1]:.1f} ({curve[reached[0], 0]:.0f})" if len(reached) else "not reached")
    return f"| {result['name']} | {' | '.join(cells)} | {curve[-1, 2]:.2f} in {curve[-1, 1]:.0f} s |"


def report():
    from matplotlib.figure import Figure

    print(f"| method | compile s | ms a step | {' | '.join(f's (steps) to {t:g}' for t in TARGETS)} | last |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("curves-*.json"))]
    for result in sorted(results, key=lambda r: list(METHODS).index(r["name"])):
        print(row(result))
        curve = np.array(result["curve"])
        for column, ax in enumerate(axes):
            ax.plot(curve[:, column], curve[:, 2], label=result["name"], linewidth=2 if column else 1.5)
    for ax, label in zip(axes, ("steps", "seconds of stepping"), strict=True):
        ax.set(xlabel=label, yscale="log", xscale="log" if label == "steps" else "linear")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("nats above the entropy of the data")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(pathlib.Path(__file__).parent.parent / "docs" / "images" / "curves.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    report() if options.report else run(options.method, options.seconds, options.seed)
