"""Models around one observed layer, and what its slot collects from one example and one use at a time."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from reference import explicit_rows

from kfax._example_axis import ExampleAxis
from kfax._math.tree import tie
from kfax._slot import observe, Slot


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
    return Slot(value, weights, kind, ExampleAxis(name, (range(N),), is_sum, ".layer"))


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
