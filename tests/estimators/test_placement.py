"""Inverses computed on several devices: the same as those computed on each."""

import contextlib
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, parameters
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


KEYS = jax.random.split(jax.random.key(0), 6)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


class Net(eqx.Module):
    """Layers of several sizes, a stack of six, a normalization, a convolution."""

    convolution: eqx.nn.Conv1d
    encoder: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.convolution = eqx.nn.Conv1d(2, 3, 3, padding=1, key=KEYS[0])
        self.encoder = eqx.nn.Linear(15, 6, key=KEYS[1])
        self.norm = eqx.nn.LayerNorm(6)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(jax.random.split(KEYS[2], 6))
        self.head = eqx.nn.Linear(6, 4, use_bias=False, key=KEYS[3])

    def __call__(self, x):
        x = self.norm(jnp.tanh(self.encoder(self.convolution(x).reshape(-1))))
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(eqx.combine(layer, rest)(x)), None), x, arrays)
        return self.head(x)


def loss_fn(model, batch):
    inputs, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels)


BATCH = jax.random.normal(KEYS[4], (8, 2, 5)), jnp.arange(8) % 4


def on_mesh(tree, mesh, *spec):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(*spec))), rest)


def refreshed(mesh, placement, block=None):
    """The inverses of the network's curvature, with its batch on a mesh."""
    model = on_mesh(kfax.tag(Net()) if block is None else kfax.tag(Net(), block=block), mesh)
    estimator = kfax.BlockDiagonalCurvature(placement=placement)
    update = lambda *args: estimator.update(*args, key=KEYS[5])  # noqa: E731
    state = eqx.filter_jit(update)(estimator.init(model), loss_fn, model, on_mesh(BATCH, mesh, "data"))
    return estimator, eqx.filter_jit(estimator.refresh)(state, parameters(model), 0.1), parameters(model)


@pytest.mark.parametrize("block", [None, kfax.KroneckerFactored(inversion=kfax.Eigh()), kfax.Full()])
def test_inverses_are_those_of_one_device(block):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    _, alone, _ = refreshed(mesh, None, block)
    estimator, shared, vector = refreshed(mesh, kfax.Placement(mesh), block)
    assert jax.tree.structure(shared) == jax.tree.structure(alone)
    assert_close(estimator.solve(shared, vector), estimator.solve(alone, vector), tolerance=1e-12)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(shared.inverses))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [2, 4])
def test_training_is_that_of_one_device(number, kind):
    """Also over some axes of a mesh only, and with blocks that have their turns."""
    shape, names = ((2,), ("data",)) if number == 2 else ((2, 2), ("data", "more"))
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))

    def run(placement, put):
        estimator = kfax.BlockDiagonalCurvature(placement=placement)
        turns = kfax.Preconditioner(estimator, inverse_update_period=kfax.Staggered(2))
        optimizer = kfax.Optimizer(loss_fn, learning_rate=0.3, momentum=0.5, damping=0.1, preconditioner=turns)
        model, batch = put(kfax.tag(Net())), put(BATCH, "data")
        state, losses = optimizer.init(model, batch), []
        step = eqx.filter_jit(optimizer.step)
        for i in range(30):
            model, state, info = step(model, state, batch, key=jax.random.key(i))
            losses.append(float(info.loss))
            for leaf in jax.tree.leaves(eqx.filter((model, state), eqx.is_array)):
                copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
                assert all(np.array_equal(copies[0], copy) for copy in copies)  # to the last bit
        assert losses[-1] < losses[0] / 2
        return [np.asarray(leaf) for leaf in (losses, *jax.tree.leaves(parameters(model)))]

    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        placed = run(kfax.Placement(mesh, names), functools.partial(_put, mesh))
    assert_close(placed, run(None, lambda tree, *spec: tree), tolerance=1e-10)


def _put(mesh, tree, *spec):
    return on_mesh(tree, mesh, *spec)


def test_each_device_factorizes_its_share():
    """Counted from the operands of the factorizations in the compiled program."""
    sizes = (6, 9, 6, 9, 6, 9, 6, 9, 6)
    keys = jax.random.split(KEYS[0], len(sizes))
    layers = [eqx.nn.Linear(m, n, use_bias=False, key=k) for m, n, k in zip(sizes[:-1], sizes[1:], keys, strict=False)]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model = on_mesh(kfax.tag(eqx.nn.Sequential(layers)), mesh)

    def factorized(placement):
        """The cubes of the sizes of matrices that are decomposed, by the computation that decomposes them."""
        estimator = kfax.BlockDiagonalCurvature(placement=placement)
        state = on_mesh(estimator.init(model), mesh)
        refresh = jax.jit(lambda state, p: estimator.refresh(state, p, 0.1))
        text = refresh.lower(state, parameters(model)).compile().as_text()
        found = {}
        for computation in re.split(r"\n(?=%|ENTRY)", text):
            matrices = re.findall(r"f64\[(?:1,)?(\d+),\1\]\S*(?:, \S+)*\) custom-call\(.*lapack_dpotrf", computation)
            if matrices:
                found[computation.split(" ", 1)[0]] = sum(int(size) ** 3 for size in matrices)
        return sorted(found.values()), text

    [everything], alone = factorized(None)
    shares, shared = factorized(kfax.Placement(mesh))
    assert everything == 8 * (6**3 + 9**3)
    assert shares == [everything // 4] * 4
    # What is sent is sent at once: every inverse, and nothing else.
    assert "all-gather" not in alone
    gathered = re.findall(r"f64\[(\d+),(\d+)\]\S* all-gather\(", shared)
    assert [tuple(map(int, each)) for each in gathered] == [(4, 2 * (6**2 + 9**2))]


def test_an_axis_that_the_mesh_lacks():
    with pytest.raises(ValueError, match=r"among those of the mesh, \('data',\), got 'model'"):
        kfax.Placement(jax.make_mesh((2,), ("data",)), "model")
