"""Parameters that are split over a mesh: each keeps its sharding, and all is as on one device."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mlp, parameters, split
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


KEYS = jax.random.split(jax.random.key(0), 4)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def copied(tree, mesh):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), rest)


def on_devices(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def are_sharded_alike(tree, like):
    pairs = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (tree, like)), strict=True)
    return all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)


def loss_fn(model, batch):
    inputs, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels)


BATCH = jax.random.normal(KEYS[0], (16, 8)), jnp.arange(16) % 4
# Fully sharded: parameters and velocity over the devices that the examples are on, factors each on one of them.
SETTINGS = {
    "not at all": ((4,), ("data",), None),
    "fully": ((4,), ("data",), "data"),
    "model": ((2, 2), ("data", "model"), "model"),
}


CASES = [(setting, kind) for setting in SETTINGS for kind in KINDS if (setting, kind) != ("not at all", "explicit")]


@pytest.mark.parametrize(("setting", "kind"), CASES)
def test_training_is_that_of_one_device(setting, kind):
    shape, names, axis = SETTINGS[setting]
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))

    def run(start, batch, estimator):
        optimizer = kfax.full_batch(loss_fn, estimator=estimator)
        step, model = eqx.filter_jit(optimizer.step), start
        first = state = optimizer.init(model, batch)
        history = []
        for i in range(8):
            model, state, info = step(model, state, batch, key=jax.random.key(i))
            history.append((info.loss, info.damping))
            assert are_sharded_alike(model, start) and are_sharded_alike(state.velocity, parameters(start))
            # What `init` made is where a step leaves it, so that the step is compiled once; but with automatic axes the
            # compiler may split the factors of split weights.
            assert are_sharded_alike(state, first) or (setting, kind) == ("model", "automatic")
        return [np.asarray(leaf) for leaf in jax.tree.leaves((history, parameters(model)))]

    estimator = kfax.BlockDiagonalCurvature()
    if setting == "fully":
        estimator = kfax.PlacedCurvature(estimator, kfax.Placement(mesh))
    model = kfax.tag(mlp(KEYS[1], (8, 16, 16, 4)))
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        found = run(split(model, mesh, axis), on_devices(BATCH, mesh), estimator)
    assert_close(found, run(model, BATCH, kfax.BlockDiagonalCurvature()), tolerance=1e-10)


class Block(eqx.Module):
    """Of a transformer, pre-norm."""

    norms: list
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[0])
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(lambda h: self.down(jnp.tanh(self.up(h))))(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, depth):
        self.embedding = eqx.nn.Embedding(8, WIDTH, key=KEYS[1])
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(KEYS[2], depth))
        self.head = eqx.nn.Linear(WIDTH, 8, key=KEYS[3])

    def __call__(self, ids):
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)
        run = lambda x, block: (eqx.combine(block, rest)(x), None)  # noqa: E731
        x, _ = jax.lax.scan(run, jax.vmap(self.embedding)(ids), arrays)
        return jax.vmap(self.head)(x)


WIDTH = 16


def bytes_on_each_device(tree):
    """The most of any device."""
    found = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    return max(found.values())


def test_memory_is_shared_out():
    """12 blocks on 4 devices: what the optimizer keeps where factors are in parts, and everything where all is."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model = kfax.tag(Transformer(12))
    ids = jax.random.randint(KEYS[0], (8, 5), 0, 8)
    placed = kfax.PlacedCurvature(kfax.BlockDiagonalCurvature(), kfax.Placement(mesh))

    batch = on_devices((ids, ids), mesh)

    def start(model, estimator):
        preconditioner = kfax.Preconditioner(estimator, inverse_update_period=kfax.Staggered(10))
        optimizer = kfax.Optimizer(
            loss_fn, learning_rate=0.1, momentum=0.9, damping=1e-2, preconditioner=preconditioner
        )
        return optimizer, optimizer.init(model, batch)

    on_all, fully = copied(model, mesh), split(model, mesh, "data")
    _, everywhere = start(on_all, kfax.BlockDiagonalCurvature())
    _, in_parts = start(on_all, placed)
    assert bytes_on_each_device(in_parts) <= 0.35 * bytes_on_each_device(everywhere)
    optimizer, state = start(fully, placed)
    after = eqx.filter_jit(optimizer.step)(fully, state, batch, key=jax.random.key(0))[:2]
    assert bytes_on_each_device(after) <= 0.3 * bytes_on_each_device((on_all, everywhere))
