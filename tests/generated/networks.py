"""The models that structures stand for, and how they are called on a batch; with tags or without."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import kfax


nn = eqx.nn
D = 3  # features of each position, entries of the tables
NUM_OUTPUTS = 3
NUM_NOISE = 2


class Context(NamedTuple):
    """What pieces may depend on besides their input: a flag of the batch, one of the example, one for each position."""

    flag: jax.Array
    keep: jax.Array
    present: jax.Array


class Own(eqx.Module):
    """A module that kfax knows nothing of."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, x):
        return self.scale * jnp.sin(x) + self.shift


class Piece(eqx.Module):
    """From `(positions, D)` to the same."""

    inner: Any
    kind: str = eqx.field(static=True)

    def __call__(self, xs, context):
        return RUN[self.kind](self.inner, xs, context)


class Stack(eqx.Module):
    """Two pieces of one kind, one after the other or side by side."""

    stacked: Piece
    kind: str = eqx.field(static=True)

    def __call__(self, xs, context):
        if self.kind == "experts":
            return jnp.mean(eqx.filter_vmap(lambda piece: piece(xs, context))(self.stacked), axis=0)
        arrays, rest = eqx.partition(self.stacked, eqx.is_array)
        return jax.lax.scan(lambda xs, a: (eqx.combine(a, rest)(xs, context), None), xs, arrays)[0]


class Network(eqx.Module):
    pieces: tuple
    head: nn.Linear
    per_position: bool = eqx.field(static=True)

    def __call__(self, xs, context):
        for piece in self.pieces:
            xs = piece(xs, context)
        return jax.vmap(self.head)(xs) if self.per_position else self.head(jnp.sum(xs, axis=0))


# -- layers --


def _linears(key):
    return tuple(nn.Linear(D, D, key=k) for k in jax.random.split(key))


def _tied_embedding(key):
    k1, k2 = jax.random.split(key)
    pair = (nn.Embedding(D, D, key=k1), nn.Linear(D, D, key=k2))
    return nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)


MAKE = {
    "linear": lambda key: nn.Linear(D, D, key=key),
    "linear-no-bias": lambda key: nn.Linear(D, D, use_bias=False, key=key),
    "raw": lambda key: nn.Linear(D, D, key=key),
    "conv1d": lambda key: nn.Conv1d(D, D, 2, padding="SAME", key=key),
    "conv1d-groups": lambda key: nn.Conv1d(D, D, 3, padding="SAME", groups=D, use_bias=False, key=key),
    "conv2d": lambda key: nn.Conv2d(1, 1, 2, padding="SAME", key=key),
    "conv-transpose": lambda key: nn.ConvTranspose1d(D, D, 3, padding=1, key=key),
    "embedding": lambda key: nn.Embedding(D, D, key=key),
    "positions": lambda key: nn.Embedding(D, D, key=key),
    "gru": lambda key: nn.GRUCell(D, D, key=key),
    "lstm": lambda key: nn.LSTMCell(D, D, key=key),
    "layer-norm": lambda key: nn.LayerNorm(D),
    "rms-norm": lambda key: nn.RMSNorm(D),
    "group-norm": lambda key: nn.GroupNorm(1, D),
    "prelu": lambda key: nn.PReLU(0.3),
    "attention": lambda key: nn.MultiheadAttention(1, D, use_output_bias=True, key=key),
    "own": lambda key: Own(jnp.ones(D), jnp.zeros(D)),
    "tied": lambda key: nn.Shared(_linears(key), where=lambda p: p[1].weight, get=lambda p: p[0].weight),
    "tied-transposed": lambda key: nn.Shared(_linears(key), where=lambda p: p[1].weight, get=lambda p: p[0].weight.T),
    "tied-embedding": _tied_embedding,
}


def make_piece(node, key):
    if node.inside is None:
        return Piece(MAKE[node.kind](key), node.kind)
    if node.kind in ("stack", "experts"):
        return Stack(eqx.filter_vmap(lambda k: make_piece(node.inside, k))(jax.random.split(key)), node.kind)
    return Piece(make_piece(node.inside, key), node.kind)


def make_network(structure):
    key, head_key = jax.random.split(jax.random.key(0))
    keys = jax.random.split(key, len(structure.nodes))
    pieces = tuple(make_piece(node, k) for node, k in zip(structure.nodes, keys, strict=True))
    outputs = 2 * NUM_OUTPUTS if structure.loss == "gaussian_nll" else NUM_OUTPUTS
    network = Network(pieces, nn.Linear(D, outputs, key=head_key), structure.per_position)
    return jax.tree.map(lambda x: x.astype(structure.dtype) if eqx.is_inexact_array(x) else x, network)


REGISTRY = kfax.default_registry.register(Own, lambda own: kfax.TaggedModule(own, block=kfax.Full()))


# -- what they do --


def _each(function):
    return lambda layer, xs, context: jax.vmap(lambda x: function(layer(x)))(xs)


def _cell(cell, xs, context):
    return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, jnp.zeros_like(xs[0]), xs)[1]


def _lstm(cell, xs, context):
    def advance(state, x):
        state = cell(x, state)
        return state, state[0]

    return jax.lax.scan(advance, (jnp.zeros_like(xs[0]),) * 2, xs)[1]


def _lookup(embedding, xs):
    return jax.vmap(embedding)(jnp.argmax(xs, axis=-1))


def _tied(shared, xs, context):
    first, second = shared()
    return jax.vmap(lambda x: second(jnp.tanh(first(x))))(xs)


def _tied_embedding_run(shared, xs, context):
    embedding, head = shared()
    return jax.vmap(head)(jnp.tanh(xs + _lookup(embedding, xs)))


def _masked(piece, xs, context):
    def one(x, present):
        alone = context._replace(present=present[None])
        return jnp.where(present, kfax.masked(piece, present)(x[None], alone)[0], 0)

    return jax.vmap(one)(xs, context.present)


def _derivative(piece, xs, context):
    value, change = jax.jvp(lambda xs: piece(xs, context), (xs,), (jnp.ones_like(xs),))
    return value + 0.5 * change


def _cond(choose):
    def run(piece, xs, context):
        return jax.lax.cond(choose(context), lambda xs: piece(xs, context), lambda xs: 0.5 * xs, xs)

    return run


RUN = {
    **dict.fromkeys(("linear", "linear-no-bias"), _each(jnp.tanh)),
    **dict.fromkeys(("layer-norm", "rms-norm", "own"), _each(lambda x: x)),
    **dict.fromkeys(("conv1d", "conv1d-groups", "conv-transpose"), lambda m, xs, c: jnp.tanh(m(xs.T).T)),
    "conv2d": lambda conv, xs, c: jnp.tanh(conv(xs[None])[0]),
    "group-norm": lambda norm, xs, c: norm(xs.T).T,
    "prelu": lambda prelu, xs, c: prelu(xs),
    "raw": lambda linear, xs, c: jnp.tanh(jax.vmap(linear)(xs) + 0.5 * xs @ linear.weight.T),
    "embedding": lambda embedding, xs, c: xs + _lookup(embedding, xs),
    "positions": lambda embedding, xs, c: xs + jax.vmap(embedding)(jnp.arange(len(xs))),
    "gru": _cell,
    "lstm": _lstm,
    "attention": lambda attention, xs, c: attention(xs, xs, xs),
    "tied": _tied,
    "tied-transposed": _tied,
    "tied-embedding": _tied_embedding_run,
    "residual": lambda piece, xs, c: xs + piece(xs, c),
    "twice": lambda piece, xs, c: piece(xs, c) + piece(xs[::-1], c),
    "loop": lambda piece, xs, c: jax.lax.scan(lambda xs, _: (piece(xs, c), None), xs, None, length=2)[0],
    "checkpoint": lambda piece, xs, c: jax.checkpoint(lambda xs: piece(xs, c))(xs),
    "jit": lambda piece, xs, c: jax.jit(lambda xs: piece(xs, c))(xs),
    "cond": _cond(lambda context: context.flag),
    "mixed-cond": _cond(lambda context: context.keep),
    "masked": _masked,
    "derivative": _derivative,
}


# -- on a batch --


def outputs_of(structure, model, batch):
    """`(examples, *positions, outputs)`."""
    xs, flag, layout = batch["x"], batch["flag"][0], structure.layout
    rest = (batch["keep"], batch["present"])
    noise = jnp.sin(jnp.arange(NUM_NOISE * D, dtype=xs.dtype)).reshape(NUM_NOISE, 1, D)

    def one(x, keep, present):
        return model(x, Context(flag, keep, present))

    def with_noise(x, *rest):
        return jnp.mean(jax.vmap(lambda e: one(x + e, *rest))(noise), axis=0)

    def of_all(x, name):
        return jax.vmap(one, axis_name=name)(x, *rest)

    def split(x, *rest):
        two = lambda array: array.reshape(-(-len(array) // 2), -1, *array.shape[1:])  # noqa: E731
        found = jax.vmap(jax.vmap(one))(*map(two, (x, *rest)))
        return found.reshape(-1, *found.shape[2:])

    return {
        "plain": lambda: jax.vmap(one)(xs, *rest),
        "named": lambda: of_all(xs, "batch"),
        "second-axis": lambda: jax.vmap(one, in_axes=(1, 0, 0), axis_name="batch")(xs, *rest),
        "noise-inside": lambda: jax.vmap(with_noise, axis_name="batch")(xs, *rest),
        "noise-outside": lambda: jnp.mean(jax.vmap(lambda e: of_all(xs + e, "batch"))(noise), axis=0),
        "noise-outside-unnamed": lambda: jnp.mean(jax.vmap(lambda e: of_all(xs + e, None))(noise), axis=0),
        "loop": lambda: jax.lax.map(lambda each: one(*each), (xs, *rest)),
        "split": lambda: split(xs, *rest) if len(xs) % 2 == 0 else jax.vmap(one)(xs, *rest),
    }[layout]()
