"""The slot where the examples are split over several devices."""

import jax
import pytest
from helpers import assert_close
from jax.sharding import NamedSharding, PartitionSpec
from slot_cases import (
    collect,
    COTANGENT,
    expected,
    gradients,
    make_slot,
    MOMENTS,
    moments,
    N,
    NAME,
    over_examples,
    positions,
    positions_unrolled,
    SCENARIOS,
    SEQUENCES,
    VECTORS,
    WEIGHT,
)

from kfax._example_axis import ExampleAxis
from kfax._slot import observe, Slot


def test_named_axis_of_another_transformation_is_refused():
    mesh = jax.make_mesh((4,), (NAME,), axis_types=(jax.sharding.AxisType.Auto,))

    def run(value, x):
        slot = make_slot(moments, NAME, value)
        return jax.vmap(lambda z: observe(WEIGHT @ z, z, slot))(x)

    def local(x, cotangent):
        value = jax.tree.map(lambda v: jax.lax.pcast(v, NAME, to="varying"), MOMENTS)
        statistic = jax.vjp(lambda v: run(v, x), value)[1](cotangent)[0]
        return jax.tree.map(lambda v: jax.lax.psum(v, NAME), statistic)

    spec = PartitionSpec(NAME)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    with pytest.raises(Exception, match="sees no examples at a time on the axis named 'batch'"):
        jax.block_until_ready(jax.jit(mapped)(VECTORS, COTANGENT))


def test_batch_sharded_over_four_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x, cotangent = jax.device_put((SEQUENCES, COTANGENT), sharding)
    assert len(x.sharding.device_set) == 4
    scenario = SCENARIOS[1]
    for kind in (moments, gradients):
        run = jax.jit(lambda x, c, kind=kind: collect(scenario.batched, kind, None, x, c))
        assert_close(run(x, cotangent), expected(scenario.explicit, kind, SEQUENCES))


def test_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, cotangent):
        def run(value):
            slot = Slot(value, None, moments, ExampleAxis(None, (range(N // 4),), True, ".layer"))
            return over_examples(positions)(lambda z: observe(WEIGHT @ z, z, slot), x, None)

        value = jax.tree.map(lambda v: jax.lax.pcast(v, "data", to="varying"), MOMENTS)
        return jax.tree.map(lambda v: jax.lax.psum(v, "data"), jax.vjp(run, value)[1](cotangent)[0])

    spec = PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    assert_close(jax.jit(mapped)(SEQUENCES, COTANGENT), expected(positions_unrolled, moments, SEQUENCES))
