"""Trains a transformer, whose output head is its embedding, on the text of Python's `help()`: K-FAC against Adam.

Needs `pip install -e '.[examples]'`, and two minutes on two cores. Prints a table, and saves a plot of held-out losses.
"""

import argparse
import pathlib
import pydoc_data.topics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table

import kfax


WIDTH, HEADS, LENGTH, BATCH_SIZE, RATES = 64, 4, 64, 32, (3e-2, 1e-2, 3e-3)  # the rates are those of Adam


class Block(eqx.Module):
    """Attention to the characters so far, then an MLP, each of its normalized input and added to that input."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: list[eqx.nn.LayerNorm]
    rotation: eqx.nn.RotaryPositionalEmbedding

    def __init__(self, key, width=WIDTH, heads=HEADS):
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=jax.random.fold_in(key, 0))
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=jax.random.fold_in(key, 1))
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
        self.rotation = eqx.nn.RotaryPositionalEmbedding(width // heads)  # without parameters

    def __call__(self, x, *, key=None):
        y, rotate = jax.vmap(self.norms[0])(x), jax.vmap(self.rotation, in_axes=1, out_axes=1)
        causal = jnp.tri(len(x), dtype=bool)
        x = x + self.attention(y, y, y, causal, process_heads=lambda q, k, v: (rotate(q), rotate(k), v))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    """From a text to logits of the next character at every position."""

    tied: eqx.nn.Shared
    blocks: eqx.nn.Sequential
    norm: eqx.nn.LayerNorm

    def __init__(self, num_characters, key):
        keys = jax.random.split(key, 4)
        embedding = eqx.nn.Embedding(weight=jax.random.normal(keys[0], (num_characters, WIDTH)) / WIDTH**0.5)
        pair = embedding, eqx.nn.Linear(WIDTH, num_characters, use_bias=False, key=keys[1])
        self.tied = eqx.nn.Shared(pair, where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)
        self.blocks, self.norm = eqx.nn.Sequential([Block(keys[2]), Block(keys[3])]), eqx.nn.LayerNorm(WIDTH)

    def __call__(self, text):
        embedding, head = self.tied()
        x = self.blocks(jax.vmap(embedding)(text))
        return jax.vmap(head)(jax.vmap(self.norm)(x))


def loss_fn(model, texts):
    return kfax.softmax_cross_entropy(jax.vmap(model)(texts[:, :-1]), texts[:, 1:], mean_over_positions=True)


def make_kfac(num_steps):
    damping = optax.exponential_decay(0.3, num_steps, 0.03)  # more of it while the curvature changes quickly
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, num_steps // 5, num_steps)
    optimizer = kfax.Optimizer(loss_fn, learning_rate=schedule, momentum=0.9, damping=damping)
    return optimizer.init, optimizer.step


def make_adam(num_steps, rate):
    adam = optax.adam(optax.warmup_cosine_decay_schedule(rate / 10, rate, num_steps // 5, num_steps))  # from 0 is worse

    def step(model, state, batch, key):
        loss, gradient = eqx.filter_value_and_grad(lambda model: loss_fn(model, batch).value())(model)
        updates, state = adam.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    return lambda model, _: adam.init(eqx.filter(model, eqx.is_inexact_array)), step


def train(name, init, step, model, batches, measured, key):
    """Returns a curve of (steps, seconds, training loss, held-out loss), and seconds of compilation."""
    started, step, state = time.perf_counter(), eqx.filter_jit(step), init(model, batches[0])
    # Steps are pure functions: the result of this one is dropped, only its compilation stays.
    jax.block_until_ready(step(model, state, batches[0], key=key))
    compile_seconds, seconds, curve = time.perf_counter() - started, 0.0, []
    measure = eqx.filter_jit(lambda model: [loss_fn(model, texts).value() for texts in measured])
    for i, batch in enumerate(track(batches, name), start=1):
        step_key, started = jax.block_until_ready(jax.random.fold_in(key, i)), time.perf_counter()
        model, state, _ = jax.block_until_ready(step(model, state, batch, key=step_key))
        seconds += time.perf_counter() - started
        if i % max(len(batches) // 25, 1) == 0 or i == len(batches):  # off the clock
            curve.append((i, seconds, *measure(model)))
    return np.array(curve, dtype=float), compile_seconds


def plot(runs, best, path):
    figure = Figure(figsize=(10, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    for column, ax in enumerate(figure.subplots(1, 2, sharey=True)):
        for (name, (curve, _)), style in zip(runs.items(), ("-", "-", "--", ":"), strict=True):
            look = {"color": {"K-FAC": "#0072B2", best: "#D55E00"}.get(name, "0.5"), "linewidth": 2, "label": name}
            ax.plot(curve[:, column], curve[:, 3], style, **look)
        ax.set(xlabel=("steps", "seconds of stepping")[column], ylabel="held-out loss, nats per character")
        ax.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the initial model and the choice of the batches")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/transformer.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
    characters, codes = np.unique(list("\n\n".join(dict.fromkeys(paragraphs))), return_inverse=True)  # each one once
    texts = np.lib.stride_tricks.sliding_window_view(codes.astype(np.int32), LENGTH + 1)
    train_set, test_set = texts[: int(0.9 * len(texts)) - LENGTH], texts[int(0.9 * len(texts)) :]
    num_steps = 3 if options.smoke else options.steps
    chosen = np.random.default_rng(options.seed).integers(len(train_set), size=(num_steps, BATCH_SIZE))
    measured = [jnp.asarray(x[np.linspace(0, len(x) - 1, 128, dtype=int)]) for x in (train_set, test_set)]
    model_key, key = jax.random.split(jax.random.key(options.seed))
    model, batches = kfax.tag(Transformer(len(characters), model_key)), list(jnp.asarray(train_set[chosen]))
    print(kfax.coverage(model))

    optimizers = {"K-FAC": make_kfac(num_steps)} | {f"Adam {r:g}": make_adam(num_steps, r) for r in RATES}
    runs = {name: train(name, *pair, model, batches, measured, key) for name, pair in optimizers.items()}
    best = min((name for name in runs if name != "K-FAC"), key=lambda name: runs[name][0][-1, 2])
    plot(runs, best, options.output)
    columns = [Column(name, justify="right") for name in ("train loss", "held-out loss", "seconds", "compile s")]
    table = Table("optimizer", *columns, title=f"{num_steps} steps on {BATCH_SIZE} texts of {LENGTH} characters")
    for name, (curve, compile_seconds) in runs.items():
        table.add_row(name, *(f"{x:.3f}" for x in curve[-1, 2:]), f"{curve[-1, 1]:.1f}", f"{compile_seconds:.1f}")
    rich.print(table)


if __name__ == "__main__":
    main()
