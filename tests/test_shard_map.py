"""Steps inside `jax.shard_map`, where each device has its own part of the batch: as on one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, mlp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


KEYS = jax.random.split(jax.random.key(0), 3)
MODEL = kfax.tag(mlp(KEYS[0], (6, 8, 4)))
INPUTS, LABELS = jax.random.normal(KEYS[1], (16, 6)), jnp.arange(16) % 4
WEIGHTS = jnp.linspace(0, 2, 16)  # of the examples: devices count differently
ARRAYS, REST = eqx.partition(MODEL, eqx.is_array)


def loss_fn(model, batch):
    inputs, labels, weights = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels, weights=weights)


def adaptive(loss_fn, **options):
    preconditioner = kfax.Preconditioner(kfax.BlockDiagonalCurvature(kfax.ExactGGN()), inverse_update_period=2)
    return kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.QuadraticModel(),
        momentum=kfax.QuadraticModel(),
        damping=kfax.LevenbergMarquardt(1.0, period=1),
        preconditioner=preconditioner,
        rejection=kfax.Rejection(),
        l2=1e-3,
        **options,
    )


def exact(loss_fn):
    preconditioner = kfax.Preconditioner(kfax.ExplicitExactCurvature(), curvature_update_period=2)
    return kfax.Optimizer(loss_fn, learning_rate=0.5, momentum=0.5, damping=0.1, preconditioner=preconditioner)


class Chain:
    """A link of a chain of Optax, behind the methods of an optimizer."""

    def __init__(self, loss_fn, axis_name=None):
        estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
        link = kfax.scale_by_curvature(loss_fn, damping=0.1, preconditioner=kfax.Preconditioner(estimator))
        self.transform, self.loss_fn, self.axis_name = optax.chain(link, optax.sgd(0.5)), loss_fn, axis_name

    def init(self, model, batch):
        return self.transform.init(model)

    def step(self, model, state, batch, *, key):
        def value(model):
            loss = self.loss_fn(model, batch).value()
            if self.axis_name is None:
                return loss
            share = jnp.sum(batch[2]) / jax.lax.psum(jnp.sum(batch[2]), self.axis_name)
            return jax.lax.psum(share * loss, self.axis_name)

        loss, gradients = eqx.filter_value_and_grad(value)(model)
        updates, state = self.transform.update(gradients, state, model, model=model, batch=batch, key=key)
        return eqx.apply_updates(model, updates), state, {"loss": loss}


OPTIMIZERS = {
    "adaptive": adaptive,
    "micro-batches": lambda loss_fn: adaptive(loss_fn, micro_batches=2),
    "exact": exact,
    "chain": lambda loss_fn: Chain(loss_fn, getattr(loss_fn, "axis_name", None)),
}


def trained(optimizer, put, wrap):
    """Losses and parameters of six steps."""
    everywhere, split = PartitionSpec(), PartitionSpec("data")
    batch = put((INPUTS, LABELS, WEIGHTS), split)

    def one(arrays, state, batch, key):
        model, state, info = optimizer.step(eqx.combine(arrays, REST), state, batch, key=key)
        loss = info["loss"] if isinstance(info, dict) else info.loss
        return eqx.filter(model, eqx.is_array), state, loss

    init = wrap(lambda arrays, batch: optimizer.init(eqx.combine(arrays, REST), batch), (everywhere, split))
    step, losses = wrap(one, (everywhere, everywhere, split, everywhere)), []
    arrays = put(ARRAYS, everywhere)
    state = init(arrays, batch)
    for i in range(6):
        arrays, state, loss = step(arrays, state, batch, put(jax.random.key(i), everywhere))
        losses.append(loss)
    return [np.asarray(x) for x in (*losses, *jax.tree.leaves(arrays))]


# The chain's own gradient is JAX's, through a `psum`: right where JAX checks what differs between devices.
KINDS = [(AxisType.Explicit, True), (AxisType.Auto, False)]
CASES = [(name, *kind) for name in OPTIMIZERS for kind in KINDS if (name, kind[1]) != ("chain", False)]


@pytest.mark.parametrize(("name", "kind", "check_vma"), CASES)
def test_training_is_that_of_one_device(name, kind, check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))

    def shard(function, specs):
        whole = PartitionSpec()
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=check_vma))

    def put(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    found = trained(OPTIMIZERS[name](kfax.across(loss_fn, "data")), put, shard)
    expected = trained(OPTIMIZERS[name](loss_fn), lambda tree, spec: tree, lambda function, specs: jax.jit(function))
    assert_close(found, expected, tolerance=1e-10)


def test_statistics_and_random_numbers():
    """An estimator by itself; the signs of two devices with equal examples are not the same."""
    mesh = jax.make_mesh((2,), ("data",))
    alike = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:2]]), (INPUTS, LABELS, jnp.ones(16)))

    def updated(estimator, loss_fn, arrays, batch):
        model = eqx.combine(arrays, REST)
        return estimator.update(estimator.init(model), loss_fn, model, batch, key=KEYS[2]).average

    def both(estimator):
        arguments = (jax.device_put(ARRAYS, NamedSharding(mesh, PartitionSpec())), alike)
        specs = (PartitionSpec(), PartitionSpec("data"))
        batch = jax.device_put(alike, NamedSharding(mesh, specs[1]))
        across = kfax.across(loss_fn, "data")
        shard = jax.shard_map(
            lambda *args: updated(estimator, across, *args), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
        )
        half = jax.tree.map(lambda x: x[:2], alike)
        return jax.jit(shard)(arguments[0], batch), updated(estimator, loss_fn, ARRAYS, half)

    found, half = both(kfax.BlockDiagonalCurvature(kfax.ExactGGN()))
    assert_close(found.value, half.value, tolerance=1e-12)
    assert float(found.weight) == 4 and float(half.weight) == 2
    found, half = both(kfax.BlockDiagonalCurvature(kfax.SampledFisher()))
    key = next(iter(half.value))
    assert float(jnp.max(jnp.abs(found.value[key].g - half.value[key].g))) > 1e-3


def test_mistakes():
    batch = (INPUTS, LABELS, WEIGHTS)
    with pytest.raises(ValueError, match="there is no axis `data`: call `init`"):
        kfax.stochastic(kfax.across(loss_fn, "data"), learning_rate=0.1).init(MODEL, batch)
    implicit = kfax.ImplicitExactCurvature()
    mesh = jax.make_mesh((2,), ("data",))
    function = jax.shard_map(
        lambda batch: implicit.update(implicit.init(MODEL), kfax.across(loss_fn, "data"), MODEL, batch),
        mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be one of running averages"):
        function(jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))))
