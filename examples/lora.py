"""Fine-tunes a classifier of digits on rotated digits by low-rank corrections (LoRA), a layer that kfax does not know.

Needs `pip install -e '.[examples]'`, and half a minute on two cores. Prints a table, and saves a plot. What is there to
see: a tagged layer of one's own in ten lines, frozen parameters, and K-FAC against Adam on what is left.
"""

import argparse
import functools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


RANK, WIDTH, RATES = 4, 64, (1e-1, 3e-2, 1e-2)


class LoRA(eqx.Module):
    """A dense layer with a low-rank correction, `(W + B A) x + b` (Hu et al. 2021, arXiv:2106.09685)."""

    base: eqx.nn.Linear
    down: jax.Array  # A
    up: jax.Array  # B

    def __init__(self, base, key):
        self.base = base
        self.down = jax.random.normal(key, (RANK, base.in_features)) / base.in_features**0.5
        self.up = jnp.zeros((base.out_features, RANK))

    def __call__(self, x, *, key=None):
        return self.base(x) + self.up @ (self.down @ x)


class TaggedLoRA(kfax.TaggedLayer):
    """What a `LoRA` does with its parameters: three multiplications by a matrix, each of which is observed."""

    layer: LoRA
    block: kfax.Blocks = kfax.KroneckerFactored()
    slots: kfax.Slots = None

    def operations(self):
        base, down, up = self.layer.base, self.layer.down, self.layer.up
        return {"base": kfax.Dense(base.weight, base.bias), "down": kfax.Dense(down), "up": kfax.Dense(up)}

    def __call__(self, x, *, key=None):
        low = self.observe(self.layer.down @ x, x, "down")
        return self.observe(self.layer.base(x), x, "base") + self.observe(self.layer.up @ low, low, "up")


REGISTRY = kfax.default_registry.register(LoRA, TaggedLoRA)


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def bases(model):
    """What is frozen: all but the corrections."""
    is_lora = lambda node: isinstance(node, LoRA)  # noqa: E731
    return [node.base for node in jax.tree.leaves(model, is_leaf=is_lora) if is_lora(node)]


def train_kfac(model, data, num_steps, frozen, advance):
    """The model, and its loss before every step. Full batches: everything is chosen by the optimizer."""
    optimizer = kfax.full_batch(loss_fn, frozen=frozen)
    state, step, losses = optimizer.init(model, data), eqx.filter_jit(optimizer.step), []
    for i in range(num_steps):
        model, state, info = step(model, state, data, key=jax.random.key(i))
        losses.append(float(info.loss))
        advance()
    return model, losses


def train_adam(model, data, num_steps, frozen, advance, rate):
    spec = jax.tree.map(eqx.is_inexact_array, model)
    spec = eqx.tree_at(frozen, spec, replace_fn=lambda node: jax.tree.map(lambda _: False, node))
    trained, rest = eqx.partition(model, spec)
    transform = optax.adam(rate)

    @eqx.filter_jit
    def step(trained, state):
        loss, gradient = eqx.filter_value_and_grad(lambda t: loss_fn(eqx.combine(t, rest), data).value())(trained)
        updates, state = transform.update(gradient, state)
        return eqx.apply_updates(trained, updates), state, loss

    state, losses = transform.init(trained), []
    for _ in range(num_steps):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
        advance()
    return eqx.combine(trained, rest), losses


def plot(curves, path):
    figure = Figure(figsize=(6, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    for name, losses in curves.items():
        ax.plot(losses, label=name, linewidth=2.5 if name == "K-FAC" else 1.5)
    ax.set(yscale="log", xlabel="steps", ylabel="cross entropy on rotated digits")
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/lora.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps

    images, labels = load_digits(return_X_y=True)
    upright, rotated = (x.reshape(-1, 64) / 16 for x in (images, np.rot90(images.reshape(-1, 8, 8), axes=(1, 2))))
    upright, rotated = ((jnp.asarray(x, jnp.float32), jnp.asarray(labels)) for x in (upright, rotated))
    train_set, test_set = (jax.tree.map(lambda x, s=s: x[s], rotated) for s in (slice(360, None), slice(360)))
    keys = jax.random.split(jax.random.key(0), 4)
    network = eqx.nn.MLP(64, 10, WIDTH, 2, jnp.tanh, key=keys[0])
    runs = {"K-FAC": train_kfac} | {f"Adam {r:g}": functools.partial(train_adam, rate=r) for r in RATES}
    with Progress() as progress:
        bar = progress.add_task("training", total=(len(runs) + 1) * num_steps)
        pretrained, _ = train_kfac(kfax.tag(network), upright, num_steps, None, lambda: progress.advance(bar))
        layers = [LoRA(layer, key) for layer, key in zip(kfax.untag(pretrained).layers, keys[1:], strict=True)]
        model = kfax.tag(eqx.tree_at(lambda m: m.layers, network, tuple(layers)), registry=REGISTRY, frozen=bases)
        advance = lambda: progress.advance(bar)  # noqa: E731
        results = {name: run(model, train_set, num_steps, bases, advance) for name, run in runs.items()}
    print(kfax.coverage(model, frozen=bases))
    plot({name: losses for name, (_, losses) in results.items()}, options.output)
    table = Table("optimizer", *(Column(name, justify="right") for name in ("train loss", "test accuracy")))
    for name, (tuned, losses) in ({"before": (model, results["K-FAC"][1][:1])} | results).items():
        right = jnp.argmax(jax.vmap(tuned)(test_set[0]), axis=1) == test_set[1]
        table.add_row(name, f"{losses[-1]:.2e}", f"{right.mean():.1%}")
    rich.print(table)


if __name__ == "__main__":
    main()
