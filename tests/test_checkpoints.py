"""Training that is saved by Orbax on one mesh, and goes on on another one as if nothing had happened."""

import contextlib
import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_close, mlp, parameters, split
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


KEYS = jax.random.split(jax.random.key(0), 2)
BATCH = jax.random.normal(KEYS[0], (16, 8)), jnp.arange(16) % 4
HALF, WHOLE = 4, 8  # steps


def loss_fn(model, batch):
    inputs, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the axis along which parameters are split, and whether factors and inverses are kept in parts."""

    shape: tuple[int, ...] = (4,)
    axis: str | None = None
    kind: AxisType = AxisType.Auto
    in_parts: bool = False

    @functools.cached_property
    def mesh(self):
        names = ("data", "model")[: len(self.shape)]
        return jax.make_mesh(self.shape, names, axis_types=(self.kind,) * len(names))

    @property
    def in_force(self):
        return jax.set_mesh(self.mesh) if self.kind == AxisType.Explicit else contextlib.nullcontext()

    @functools.cached_property
    def placed(self):
        return kfax.PlacedCurvature(kfax.BlockDiagonalCurvature(), kfax.Placement(self.mesh))

    @functools.cached_property
    def optimizer(self):
        return kfax.full_batch(loss_fn, estimator=self.placed if self.in_parts else kfax.BlockDiagonalCurvature())

    def put(self, tree, *spec):
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def start(self):
        model = split(kfax.tag(mlp(KEYS[1], (8, 8, 4))), self.mesh, self.axis)
        return model, self.optimizer.init(model, self.put(BATCH, "data"))

    def train(self, model, state, stop):
        batch, step, history = self.put(BATCH, "data"), eqx.filter_jit(self.optimizer.step), []
        for i in range(int(state.step), stop):
            model, state, info = step(model, state, batch, key=jax.random.key(i))
            history.append((float(info.loss), float(info.damping)))
        return model, state, history

    def plain(self, state):
        """The state without what depends on the number of devices."""
        return with_curvature(state, self.placed.gathered(state.curvature)) if self.in_parts else state

    def own(self, state, model):
        if not self.in_parts:
            return state
        return with_curvature(state, self.placed.placed(state.curvature, parameters(model)))


def with_curvature(state, curvature):
    return eqx.tree_at(lambda state: state.curvature, state, curvature)


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def restore(path, like):
    arrays, rest = eqx.partition(like, eqx.is_array)
    asked = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in jax.tree.leaves(arrays)]
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(path, asked)
    assert all(x.sharding == y.sharding for x, y in zip(leaves, asked, strict=True))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)


SAVED = {"on all": Layout(), "in parts": Layout(axis="data", in_parts=True)}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    """What was saved halfway on four devices, and how training went on there."""
    layout, path = SAVED[request.param], tmp_path_factory.mktemp("checkpoint") / "state"
    model, state, _ = layout.train(*layout.start(), HALF)
    save(path, (model, layout.plain(state)))
    model, _, history = layout.train(model, state, WHOLE)
    return path, [np.asarray(leaf) for leaf in jax.tree.leaves((history, parameters(model)))]


RESTORED = {
    "two devices, in parts": Layout((2,), "data", in_parts=True),
    "one device": Layout((1,)),
    "explicit axes": Layout(kind=AxisType.Explicit),
    "two axes, rows of weights split": Layout((2, 2), "model"),
}


@pytest.mark.parametrize("layout", RESTORED)
def test_training_goes_on_on_another_mesh(saved, layout):
    path, expected = saved
    layout = RESTORED[layout]
    with layout.in_force:
        model, state = layout.start()
        model, state = restore(path, (model, layout.plain(state)))
        assert int(state.step) == HALF
        model, _, history = layout.train(model, layout.own(state, model), WHOLE)
    found = [np.asarray(leaf) for leaf in jax.tree.leaves((history, parameters(model)))]
    assert_close(found, expected, tolerance=1e-10)  # sums over devices round differently
