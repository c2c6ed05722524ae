"""Slots of stacked layers and of ensembles: one statistic for each."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from reference import explicit_rows
from slot_cases import (
    collect,
    COTANGENT,
    D,
    expected,
    GRADIENTS,
    gradients,
    KINDS,
    make_slot,
    MOMENTS,
    moments,
    N,
    NAME,
    NAMED,
    NOISE,
    SCENARIOS,
    SEQUENCES,
    T,
    VECTORS,
)

from kfax._slot import observe, Slot


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
