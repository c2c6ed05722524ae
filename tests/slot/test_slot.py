"""The slot under every transformation, against explicit computation of one example and one use at a time."""

import dataclasses
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from jax.sharding import NamedSharding, PartitionSpec
from reference import explicit_rows

from kfax._math.tree import tie
from kfax._slot import ExampleAxis, observe, Slot


N, T, D = 8, 5, 6
NAME = "batch"
WEIGHT = jax.random.normal(jax.random.key(7), (D, D)) / 2
VECTORS = jax.random.normal(jax.random.key(8), (N, D))
SEQUENCES = jax.random.normal(jax.random.key(9), (N, T, D))
QUERY = jnp.linspace(-1, 1, D)
NOISE = jax.random.normal(jax.random.key(10), (3, D)) / 3
COTANGENT = jax.random.normal(jax.random.key(11), (N, D))


def moments(use):
    """Sums over all rows: the second moments of inputs and cotangents, and the number of rows."""
    x, dy, weights = use.x, use.dy, use.weights
    rows = x.reshape(-1, D)
    scaled = rows if weights is None else rows * jnp.repeat(weights, x.shape[1])[:, None]
    cotangents = dy.reshape(-1, D)
    return scaled.T @ rows, cotangents.T @ cotangents, jnp.asarray(float(len(rows)))


def gradients(use):
    """One gradient for each example: linear in each use, with a leading axis of examples."""
    return jnp.einsum("npo,npi->noi", use.dy, use.x)


MOMENTS = (jnp.zeros((D, D)), jnp.zeros((D, D)), jnp.zeros(()))
GRADIENTS = jnp.zeros((N, D, D))


def make_slot(kind, name, value=None, weights=None):
    is_sum = kind is moments and weights is None
    value = (MOMENTS if kind is moments else GRADIENTS) if value is None else value
    return Slot(value, weights, kind, ExampleAxis(name, N, is_sum, ".layer"))


def collect(batched, kind, name, x, cotangent=COTANGENT, weights=None):
    """What comes back in the slot of the layer `WEIGHT` when `batched(layer, x, name)` is pulled back."""
    value = tie(MOMENTS if kind is moments else GRADIENTS, (x, cotangent))

    def run(value):
        slot = make_slot(kind, name, value, weights)
        return batched(lambda z: observe(WEIGHT @ z, z, slot), x, name)

    outputs, pullback = jax.vjp(run, value)
    assert outputs.shape == cotangent.shape
    return pullback(cotangent)[0]


def expected(explicit, kind, x, cotangent=COTANGENT, weights=None):
    """The same from one example and one use at a time."""
    rows = [explicit_rows(explicit, lambda z: WEIGHT @ z, x[n], cotangent[n]) for n in range(len(x))]
    if kind is gradients:
        return jnp.stack([g.T @ a for a, g in rows])
    w = jnp.ones(len(rows)) if weights is None else weights
    return (
        sum(w[n] * a.T @ a for n, (a, _) in enumerate(rows)),
        sum(g.T @ g for _, g in rows),
        jnp.asarray(float(sum(len(a) for a, _ in rows))),
    )


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model as a user writes it, and the same for one example with every loop unrolled."""

    name: str
    batched: Callable
    explicit: Callable
    x: jax.Array
    needs_name: bool = False


def over_examples(model):
    return lambda layer, x, name: jax.vmap(lambda z: model(layer, z), axis_name=name)(x)


def recurrent(layer, x):
    return jax.lax.scan(lambda h, z: (jnp.tanh(layer(h) + z), None), jnp.ones(D), x)[0]


def recurrent_unrolled(layer, x):
    h = jnp.ones(D)
    for z in x:
        h = jnp.tanh(layer(h) + z)
    return h


def positions(layer, x):
    return jnp.tanh(jax.vmap(layer)(x)).mean(0)


def positions_unrolled(layer, x):
    return jnp.stack([jnp.tanh(layer(z)) for z in x]).mean(0)


def twice(layer, x):
    return jnp.tanh(layer(x)) + jnp.tanh(layer(0.5 * layer(x) + 1))


def sequence_first(layer, x, name):
    return jnp.tanh(jax.vmap(jax.vmap(layer, axis_name=name))(x.swapaxes(0, 1))).mean(0)


def noise_outside(layer, x, name):
    return jax.vmap(lambda e: jax.vmap(lambda z: jnp.tanh(layer(z + e)), axis_name=name)(x))(NOISE).mean(0)


def noise_outside_unrolled(layer, x):
    return jnp.stack([jnp.tanh(layer(x + e)) for e in NOISE]).mean(0)


def positions_of_positions(layer, x):
    grid = x[:, None, :] + QUERY * jnp.arange(2.0)[:, None]
    return jnp.tanh(jax.vmap(jax.vmap(layer))(grid)).mean((0, 1))


def positions_of_positions_unrolled(layer, x):
    return jnp.stack([jnp.tanh(layer(z + QUERY * k)) for z in x for k in (0.0, 1.0)]).mean(0)


def branch(layer, x):
    return jax.lax.cond(jnp.sum(QUERY) > -1e9, layer, lambda h: h, jnp.tanh(x))


def jitted(layer, x):
    inner = jax.jit(lambda z: jax.nn.relu(jax.jit(layer)(z)))  # relu is a custom_jvp function
    return jax.jit(inner)(x)


SCENARIOS = [
    Scenario("vmap", over_examples(lambda f, x: jnp.tanh(f(x))), lambda f, x: jnp.tanh(f(x)), VECTORS),
    Scenario("nested-vmap", over_examples(positions), positions_unrolled, SEQUENCES),
    Scenario(
        "three-vmaps", over_examples(positions_of_positions), positions_of_positions_unrolled, SEQUENCES
    ),
    Scenario("scan-over-time", over_examples(recurrent), recurrent_unrolled, SEQUENCES),
    Scenario("checkpoint", over_examples(jax.checkpoint(recurrent, static_argnums=0)), recurrent_unrolled, SEQUENCES),
    Scenario("twice", over_examples(twice), twice, VECTORS),
    Scenario("cond", over_examples(branch), lambda f, x: f(jnp.tanh(x)), VECTORS),
    Scenario("nested-jit", over_examples(jitted), lambda f, x: jax.nn.relu(f(x)), VECTORS),
    Scenario("jit-outside", lambda f, x, n: jax.jit(lambda z: over_examples(positions)(f, z, n))(x),
             positions_unrolled, SEQUENCES),
    Scenario("sequence-first", sequence_first, positions_unrolled, SEQUENCES, needs_name=True),
    Scenario("noise-outside", noise_outside, noise_outside_unrolled, VECTORS, needs_name=True),
    Scenario(
        "constant-input",
        over_examples(lambda f, x: jnp.tanh(f(QUERY)) * x),
        lambda f, x: jnp.tanh(f(QUERY)) * x,
        VECTORS,
        needs_name=True,
    ),
    Scenario(
        "constant-input-and-scan",
        over_examples(lambda f, x: recurrent(f, jnp.broadcast_to(f(QUERY), (T, D))) * x),
        lambda f, x: recurrent_unrolled(f, [f(QUERY)] * T) * x,
        VECTORS,
        needs_name=True,
    ),
]  # fmt: skip
KINDS = [pytest.param(moments, id="sum"), pytest.param(gradients, id="linear")]


# Of what has no name, one kind is slow.
NAMED = [
    pytest.param(name, *kind.values, id=f"{name}-{kind.id}", marks=[pytest.mark.slow] if name is None and i else [])
    for name in (None, NAME)
    for i, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind"), NAMED)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_equals_explicit_rows(scenario, name, kind):
    if scenario.needs_name and name is None:
        with pytest.raises(Exception, match=r"`\.layer` .*Name the axis of the examples"):
            jax.block_until_ready(collect(scenario.batched, kind, name, scenario.x))
        return
    if scenario.name == "constant-input-and-scan":
        # One row of the first call of f feeds all T steps, so the unrolled model must call it once too.
        explicit = lambda f, x: (lambda z: recurrent_unrolled(f, [z] * T) * x)(f(QUERY))  # noqa: E731
    else:
        explicit = scenario.explicit
    assert_close(collect(scenario.batched, kind, name, scenario.x), expected(explicit, kind, scenario.x))


@pytest.mark.parametrize("kind", KINDS)
def test_example_weights_follow_the_example_axis(kind):
    weights = jnp.arange(1.0, N + 1)
    for name, scenario in [(None, SCENARIOS[1]), (NAME, SCENARIOS[1]), (NAME, SCENARIOS[9]), (None, SCENARIOS[3])]:
        actual = collect(scenario.batched, kind, name, scenario.x, weights=weights)
        assert_close(actual, expected(scenario.explicit, kind, scenario.x, weights=weights))


def lax_map(batch_size):
    return lambda layer, x, name: jax.lax.map(lambda z: jnp.tanh(layer(z)), x, batch_size=batch_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_lax_map_over_examples_is_refused(batch_size, kind):
    with pytest.raises(Exception, match=r"`\.layer` .* but the Loss has 8 examples.*Name the axis"):
        jax.block_until_ready(collect(lax_map(batch_size), kind, None, VECTORS))
    with pytest.raises(ValueError, match=r"no axis is named 'batch'.*jax\.vmap\(model, axis_name='batch'\)"):
        collect(lax_map(batch_size), kind, NAME, VECTORS)


def chunked(layer, x, name):
    chunks = x.reshape(2, N // 2, D)
    run = jax.vmap(lambda z: jnp.tanh(layer(z)), axis_name=name)
    return jax.lax.scan(lambda _, chunk: (None, run(chunk)), None, chunks)[1].reshape(N, D)


def test_named_chunks_give_sums_but_not_what_needs_all_examples_together():
    plain = SCENARIOS[0].explicit
    assert_close(collect(chunked, moments, NAME, VECTORS), expected(plain, moments, VECTORS))
    for kind, weights in [(gradients, None), (moments, jnp.ones(N))]:
        with pytest.raises(Exception, match="sees 4 examples at a time.*but the Loss has 8"):
            jax.block_until_ready(collect(chunked, kind, NAME, VECTORS, weights=weights))


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


# -- stacked layers: one statistic for each --

WEIGHTS = jax.random.normal(jax.random.key(12), (3, D, D)) / 2


class Layer(eqx.Module):
    weight: jax.Array
    slot: Slot

    def __call__(self, x):
        return observe(self.weight @ x, x, self.slot)


def stack(kind, name):
    zeros = MOMENTS if kind is moments else GRADIENTS
    value = jax.tree.map(lambda z: jnp.zeros((3, *z.shape)), zeros)
    return Layer(WEIGHTS, make_slot(kind, name, value))


def scan_over_layers(layers, x):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(layer(h)), None), x, layers)[0]


def vmap_over_layers(layers, x):
    return jnp.tanh(eqx.filter_vmap(lambda layer: layer(x))(layers)).sum(0)


def vmap_over_layers_and_positions(layers, x):
    return jnp.tanh(eqx.filter_vmap(lambda layer: jax.vmap(layer)(x * jnp.ones((T, D))))(layers)).sum((0, 1))


def positions_of_layers(layers, x):
    return jax.vmap(lambda e: vmap_over_layers(layers, x + e))(NOISE).sum(0)


STACKED = {
    "scan": (scan_over_layers, lambda f, x: jnp.tanh(f[2](jnp.tanh(f[1](jnp.tanh(f[0](x))))))),
    "vmap": (vmap_over_layers, lambda f, x: sum(jnp.tanh(layer(x)) for layer in f)),
    "vmap-and-positions": (
        vmap_over_layers_and_positions,
        lambda f, x: sum(jnp.tanh(layer(x)) for layer in f for _ in range(T)),
    ),
    "positions-and-vmap": (
        positions_of_layers,
        lambda f, x: sum(jnp.tanh(layer(x + e)) for layer in f for e in NOISE),
    ),
}


@pytest.mark.parametrize(("name", "kind"), NAMED)
@pytest.mark.parametrize("case", STACKED)
def test_stacked_layers(case, name, kind):
    model, explicit = STACKED[case]
    layers = stack(kind, name)

    def run(value):
        filled = eqx.tree_at(lambda layer: layer.slot.value, layers, value)
        return jax.vmap(lambda x: model(filled, x), axis_name=name)(VECTORS)

    actual = jax.vjp(run, layers.slot.value)[1](COTANGENT)[0]

    def one(i):
        """The i-th layer observed, the others not."""

        def call(layer, x):
            return explicit([layer if k == i else (lambda z, k=k: WEIGHTS[k] @ z) for k in range(3)], x)

        rows = [explicit_rows(call, lambda z: WEIGHTS[i] @ z, VECTORS[n], COTANGENT[n]) for n in range(N)]
        if kind is gradients:
            return jnp.stack([g.T @ a for a, g in rows])
        count = jnp.asarray(float(sum(len(a) for a, _ in rows)))
        return sum(a.T @ a for a, _ in rows), sum(g.T @ g for _, g in rows), count

    assert_close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one(i) for i in range(3)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, NAME])
def test_ensemble_of_models(name, kind):
    scenario = SCENARIOS[3]
    members = jnp.stack([SEQUENCES, SEQUENCES**2, jnp.sin(SEQUENCES)])
    actual = jax.vmap(lambda x: collect(scenario.batched, kind, name, x))(members)
    separate = [expected(scenario.explicit, kind, x) for x in members]
    assert_close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *separate))


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
            slot = Slot(value, None, moments, ExampleAxis(None, N // 4, True, ".layer"))
            return over_examples(positions)(lambda z: observe(WEIGHT @ z, z, slot), x, None)

        value = jax.tree.map(lambda v: jax.lax.pcast(v, "data", to="varying"), MOMENTS)
        return jax.tree.map(lambda v: jax.lax.psum(v, "data"), jax.vjp(run, value)[1](cotangent)[0])

    spec = PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    assert_close(jax.jit(mapped)(SEQUENCES, COTANGENT), expected(positions_unrolled, moments, SEQUENCES))


def test_bfloat16_rows_give_statistics_in_the_dtype_of_the_slot():
    low = VECTORS.astype(jnp.bfloat16)

    def statistic(use):
        x, dy = use.x, use.dy
        rows = x.reshape(-1, D)
        return jnp.matmul(rows.T, rows, preferred_element_type=jnp.float32), jnp.sum(dy, dtype=jnp.float32)

    zeros = (jnp.zeros((D, D), jnp.float32), jnp.zeros((), jnp.float32))

    def run(value):
        slot = Slot(value, None, statistic, ExampleAxis(None, N, True, ".layer"))
        return jax.vmap(lambda z: observe(WEIGHT.astype(jnp.bfloat16) @ z, z, slot))(low)

    a, _ = jax.vjp(run, zeros)[1](COTANGENT.astype(jnp.bfloat16))[0]
    exact = low.astype(jnp.float32)
    assert_close(a, exact.T @ exact)


@pytest.mark.parametrize("observed", [False, True])
def test_integer_inputs(observed):
    table, ids = jax.random.normal(jax.random.key(1), (11, D)), jnp.array([3, 1, 3, 7, 0, 1, 3, 10])

    def counts(use):
        return jnp.zeros(11).at[use.x.reshape(-1)].add(1.0)

    def run(table, value):
        slot = Slot(value, None, counts, ExampleAxis(None, N, True, ".layer")) if observed else None
        return jax.vmap(lambda i: observe(table[i], i, slot))(ids)

    outputs, pullback = jax.vjp(run, table, jnp.zeros(11))
    gradient, found = pullback(COTANGENT)
    assert_close(outputs, table[ids])
    assert_close(gradient, jnp.zeros((11, D)).at[ids].add(COTANGENT))
    assert_close(found, jnp.bincount(ids, length=11).astype(float) if observed else jnp.zeros(11))


def test_without_a_slot_observe_is_the_identity():
    y = jnp.arange(3.0)
    assert observe(y, y, None) is y


def test_pullback_can_be_taken_into_a_branch():
    def run(weight, value):
        slot = make_slot(moments, None, value)
        return jax.vmap(lambda z: observe(weight @ z, z, slot))(VECTORS)

    @jax.jit
    def maybe(predicate):
        _, pullback = jax.vjp(run, WEIGHT, MOMENTS)
        return pullback(COTANGENT)[0], jax.lax.cond(predicate, lambda: pullback(COTANGENT)[1], lambda: MOMENTS)

    gradient, taken = maybe(True)
    assert_close(gradient, COTANGENT.T @ VECTORS)
    assert_close(taken, expected(lambda f, x: f(x), moments, VECTORS))
    assert_close(maybe(False)[1], MOMENTS)


def test_no_array_of_one_matrix_for_each_example():
    """Sum slots fold a batch in one product, also where layers are vmapped inside the examples' vmap."""
    layers = stack(moments, None)

    def run(value):
        filled = eqx.tree_at(lambda layer: layer.slot.value, layers, value)
        return jax.vmap(lambda x: positions_of_layers(filled, x))(VECTORS)

    def compiled(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().as_text() or ""

    stacked = compiled(lambda c: jax.vjp(run, layers.slot.value)[1](c)[0], COTANGENT)
    plain = compiled(lambda c, x: collect(SCENARIOS[3].batched, moments, None, x, c), COTANGENT, SEQUENCES)
    linear = compiled(lambda c, x: collect(SCENARIOS[3].batched, gradients, None, x, c), COTANGENT, SEQUENCES)
    matrix_each = re.compile(rf"f64\[(?:\d+,)*{N},(?:\d+,)*{D},{D}\]")
    assert matrix_each.search(linear)  # the expression finds what it looks for
    assert not matrix_each.search(plain)
    assert not matrix_each.search(stacked)
