"""One row for each layer of `equinox.nn` that has parameters: how to make it, and a model around it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from reference import squared_loss

import kfax


nn = eqx.nn


class Headed(eqx.Module):
    """A layer, a nonlinearity, and a dense head on everything that comes out."""

    layer: Any
    head: nn.Linear

    def __init__(self, layer, call, x):
        self.layer = layer
        shape = jax.eval_shape(jax.vmap(lambda x: call(layer, x), axis_name="batch"), x[None])
        size = math.prod(shape.shape[1:])
        self.head = nn.Linear(size, 3, key=jax.random.key(5))


def call_plainly(layer, x):
    return layer(x)


def call_cell(cell, xs):
    """Over time, by a scan."""
    zeros = jnp.zeros(cell.hidden_size)
    is_lstm = isinstance(kfax.untag(cell), nn.LSTMCell)
    state = (zeros, zeros) if is_lstm else zeros
    state, _ = jax.lax.scan(lambda state, x: (cell(x, state), None), state, xs)
    return state[0] if is_lstm else state


def call_over_positions(layer, xs):
    return jax.vmap(layer)(xs)


BATCH_NORM, STATE = nn.make_with_state(nn.BatchNorm)(3, "batch", mode="batch")


def call_batch_norm(layer, x):
    """Under `vmap(..., axis_name="batch")`, with its initial state."""
    leaves, structure = jax.tree.flatten(STATE)
    return layer(x, jax.tree.unflatten(structure, leaves))[0]


def normal(*shape):
    return lambda key, n: jax.random.normal(key, (n, *shape))


def tokens(*shape):
    return lambda key, n: jax.random.randint(key, (n, *shape), 0, 7)


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer in a model from inputs to three outputs, trained with squared errors."""

    module: type
    make: Callable  # key -> layer
    inputs: Callable  # (key, n) -> x
    call: Callable = call_plainly
    tagged: type = kfax.TaggedLinear

    def build(self, block=None, num_examples=5, freeze=None):
        keys = jax.random.split(jax.random.key(3), 4)
        x = self.inputs(keys[1], num_examples)
        layer = self.make(keys[0])
        # Away from the initial values, at which a scale is 1 and a shift is 0.
        layer = jax.tree.map(
            lambda p: p + 0.3 * jnp.cos(jnp.arange(p.size)).reshape(p.shape) if _is_real(p) else p, layer
        )
        plain = Headed(layer, self.call, x[0])
        model = kfax.tag(plain)
        if block is not None:
            model = kfax.set_block(model, lambda m: m.layer, block)
        y = jax.random.normal(keys[2], (num_examples, 3))
        return BuiltCase(self, plain, model, x, y)


@dataclasses.dataclass(frozen=True)
class BuiltCase:
    row: LayerCase
    plain: Any
    model: Any
    x: jax.Array
    y: jax.Array

    def outputs(self, model, x):
        def one(x):
            return model.head(jnp.tanh(self.row.call(model.layer, x)).reshape(-1))

        return jax.vmap(one, axis_name="batch")(x)

    def loss_fn(self, model, batch):
        return kfax.squared_error(self.outputs(model, batch[0]), batch[1])

    @property
    def batch(self):
        return self.x, self.y

    @property
    def one(self):
        return squared_loss


def _is_real(leaf):
    return eqx.is_inexact_array(leaf)


def _conv(cls, *args, **options):
    return functools.partial(lambda key: cls(*args, key=key, **options))


NORM, CONV, CONV_T = kfax.TaggedNorm, kfax.TaggedConv, kfax.TaggedConvTranspose

LAYERS = {
    "linear": LayerCase(nn.Linear, _conv(nn.Linear, 3, 4), normal(3)),
    "linear-no-bias": LayerCase(nn.Linear, _conv(nn.Linear, 3, 4, use_bias=False), normal(3)),
    "linear-scalar": LayerCase(nn.Linear, _conv(nn.Linear, "scalar", "scalar"), normal()),
    "linear-positions": LayerCase(nn.Linear, _conv(nn.Linear, 3, 4), normal(2, 3), call_over_positions),
    "conv": LayerCase(nn.Conv, _conv(nn.Conv, 1, 2, 3, 2), normal(2, 4), tagged=CONV),
    "conv1d": LayerCase(
        nn.Conv1d, _conv(nn.Conv1d, 2, 4, 3, stride=2, padding=1, dilation=2, groups=2), normal(2, 9), tagged=CONV
    ),
    "conv2d": LayerCase(
        nn.Conv2d, _conv(nn.Conv2d, 2, 3, (3, 2), stride=(2, 1), padding="SAME"), normal(2, 4, 3), tagged=CONV
    ),
    "conv2d-reflect": LayerCase(
        nn.Conv2d, _conv(nn.Conv2d, 1, 2, 3, padding=1, padding_mode="reflect"), normal(1, 3, 3), tagged=CONV
    ),
    "conv2d-depthwise": LayerCase(nn.Conv2d, _conv(nn.Conv2d, 3, 3, 2, groups=3), normal(3, 3, 3), tagged=CONV),
    "conv3d": LayerCase(nn.Conv3d, _conv(nn.Conv3d, 2, 2, 2), normal(2, 3, 3, 2), tagged=CONV),
    "conv-transpose": LayerCase(nn.ConvTranspose, _conv(nn.ConvTranspose, 1, 2, 3, 2), normal(2, 4), tagged=CONV_T),
    "conv-transpose1d": LayerCase(
        nn.ConvTranspose1d,
        _conv(nn.ConvTranspose1d, 2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        normal(2, 4),
        tagged=CONV_T,
    ),
    "conv-transpose2d": LayerCase(
        nn.ConvTranspose2d, _conv(nn.ConvTranspose2d, 2, 2, 2, stride=2), normal(2, 2, 2), tagged=CONV_T
    ),
    "conv-transpose3d": LayerCase(
        nn.ConvTranspose3d, _conv(nn.ConvTranspose3d, 1, 2, 2, dilation=2), normal(1, 2, 1, 2), tagged=CONV_T
    ),
    "layer-norm": LayerCase(nn.LayerNorm, lambda key: nn.LayerNorm((3, 2)), normal(3, 2), tagged=NORM),
    "layer-norm-positions": LayerCase(
        nn.LayerNorm, lambda key: nn.LayerNorm(4), normal(3, 4), call_over_positions, tagged=NORM
    ),
    "rms-norm": LayerCase(nn.RMSNorm, lambda key: nn.RMSNorm(4), normal(4), tagged=NORM),
    "group-norm": LayerCase(nn.GroupNorm, lambda key: nn.GroupNorm(2, 4), normal(4, 3), tagged=NORM),
    "batch-norm": LayerCase(
        nn.BatchNorm,
        lambda key: BATCH_NORM,
        normal(3, 2),
        call_batch_norm,
        tagged=kfax.TaggedBatchNorm,
    ),
    "prelu": LayerCase(nn.PReLU, lambda key: nn.PReLU(), normal(2, 3), tagged=kfax.TaggedPReLU),
    "prelu-features": LayerCase(
        nn.PReLU, lambda key: nn.PReLU(jnp.full(3, 0.2)), normal(2, 3), tagged=kfax.TaggedPReLU
    ),
    "prelu-channels": LayerCase(
        nn.PReLU, lambda key: nn.PReLU(jnp.full((2, 1), 0.2)), normal(2, 3), tagged=kfax.TaggedPReLU
    ),
    "embedding": LayerCase(nn.Embedding, _conv(nn.Embedding, 7, 3), tokens(), tagged=kfax.TaggedEmbedding),
    "embedding-positions": LayerCase(
        nn.Embedding, _conv(nn.Embedding, 7, 3), tokens(4), call_over_positions, tagged=kfax.TaggedEmbedding
    ),
    "gru": LayerCase(nn.GRUCell, _conv(nn.GRUCell, 2, 3), normal(4, 2), call_cell, tagged=kfax.TaggedGRUCell),
    "gru-no-bias": LayerCase(
        nn.GRUCell, _conv(nn.GRUCell, 2, 3, use_bias=False), normal(4, 2), call_cell, tagged=kfax.TaggedGRUCell
    ),
    "lstm": LayerCase(nn.LSTMCell, _conv(nn.LSTMCell, 2, 3), normal(4, 2), call_cell, tagged=kfax.TaggedLSTMCell),
}

# What has no parameters of its own, but layers inside.
CONTAINERS = {nn.MLP, nn.MultiheadAttention, nn.Sequential, nn.Shared}
# What uses the parameters of the layer inside it in a way of its own.
REPARAMETRIZATIONS = {
    nn.WeightNorm: lambda key: nn.WeightNorm(nn.Linear(3, 4, key=key)),
    nn.SpectralNorm: lambda key: nn.SpectralNorm(nn.Linear(3, 4, key=key), "weight", key=key),
}
POOLS = ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
WITHOUT_PARAMETERS = {
    *(nn.Dropout, nn.Identity, nn.Lambda, nn.Pool, nn.AdaptivePool, nn.RotaryPositionalEmbedding),
    *(getattr(nn, f"{pool}{dims}d") for pool in POOLS for dims in (1, 2, 3)),
}
