"""Modules of any kind, by their gradients: `kfax.TaggedModule`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, parameters
from layer_updates import squared, update
from reference import block_diagonal, ggn, squared_loss

import kfax


KEYS = jax.random.split(jax.random.key(0), 8)


class Query(eqx.Module):
    """A learned vector: called without inputs."""

    value: jax.Array

    def __call__(self):
        return self.value


def test_a_module_without_inputs():
    class Attending(eqx.Module):
        query: Any
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(jnp.tanh(self.query() * x))

    query = kfax.TaggedModule(Query(jnp.linspace(0.5, 1.5, 3)), block=kfax.Full())
    model = kfax.tag(Attending(query, eqx.nn.Linear(3, 2, key=KEYS[0])))
    x, y = jax.random.normal(KEYS[1], (5, 3)), jax.random.normal(KEYS[2], (5, 2))

    def loss_fn(model, batch):
        # The query is under no mapped axis unless it is named.
        return kfax.squared_error(jax.vmap(model, axis_name="batch")(batch[0]), batch[1])

    kfax.check(loss_fn, model, (x, y), example_axis="batch")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_fn, model, (x, y))
    jacobians = jax.vmap(lambda x: jax.jacrev(lambda q: model.head.layer(jnp.tanh(q * x)))(query.layer.value))(x)
    expected = 2 * jnp.einsum("nki,nkj->ij", jacobians, jacobians) / 5
    assert_close(estimator.to_dense(state, kfax.parameters_of(model))[:3, :3], expected)


class Quirk(eqx.Module):
    """Fits no pattern: two arrays, arguments by name, an integer input, two outputs."""

    scale: jax.Array
    table: jax.Array

    def __call__(self, x, index, *, power=2):
        return {"y": jnp.sin(self.scale * x) ** power + self.table[index], "index": index + 1}


class WithQuirk(eqx.Module):
    quirk: Quirk
    head: eqx.nn.Linear

    def __call__(self, x):
        first = self.quirk(x, 1)
        second = self.quirk(first["y"], index=first["index"], power=3)
        return self.head(second["y"])


@grid(thin=2, block=["Full", "Diagonal"], axis=[None, "batch"])
def test_any_module_by_its_gradients(block, axis):
    quirk = Quirk(jnp.linspace(0.5, 1.5, 3), jax.random.normal(KEYS[0], (4, 3)))
    plain = WithQuirk(quirk, eqx.nn.Linear(3, 2, key=KEYS[1]))
    tagged = kfax.TaggedModule(quirk, block=getattr(kfax, block)())
    model = kfax.tag(eqx.tree_at(lambda m: m.quirk, plain, tagged))
    x, y = jax.random.normal(KEYS[2], (5, 3)), jax.random.normal(KEYS[3], (5, 2))
    kfax.check(squared, model, (x, y), example_axis=axis)
    estimator, state = update(model, squared, (x, y), example_axis=axis)
    params, static = eqx.partition(plain, eqx.is_inexact_array)
    exact = ggn(lambda p: jax.vmap(eqx.combine(p, static))(x), params, squared_loss, y)
    found = estimator.to_dense(state, parameters(model))[:15, :15]
    assert_close(found, exact[:15, :15] if block == "Full" else jnp.diag(jnp.diag(exact[:15, :15])))


def test_any_module_in_a_stack_and_partly_frozen():
    def make(scale):
        return kfax.TaggedModule(Quirk(scale, jnp.ones((4, 3))), block=kfax.Full())

    stacked = eqx.filter_vmap(make)(jax.random.uniform(KEYS[0], (3, 3)) + 0.5)
    model = kfax.tag({"quirks": stacked})
    frozen = lambda m: m["quirks"].layer.table  # noqa: E731

    def run(model, x):
        arrays, static = eqx.partition(model["quirks"], eqx.is_array)
        return jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x, 0)["y"], None), x, arrays)[0]

    def loss_fn(model, batch):
        outputs = jax.vmap(lambda x: run(model, x))(batch)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    x = jax.random.normal(KEYS[1], (5, 3))
    estimator, state = update(model, loss_fn, x, frozen=frozen)
    trained = eqx.tree_at(frozen, parameters(model), None)
    found = estimator.to_dense(state, trained)

    def outputs(scale):
        changed = eqx.tree_at(lambda m: m["quirks"].layer.scale, model, scale)
        return jax.vmap(lambda x: run(changed, x))(x)

    exact = ggn(outputs, stacked.layer.scale, squared_loss, jnp.zeros((5, 3)))
    assert_close(found, block_diagonal(exact, jnp.repeat(jnp.arange(3), 3)))


def test_a_tagged_module_must_be_a_module():
    for wrong in (lambda x: x, 3, eqx.nn.Identity()):
        with pytest.raises(ValueError, match="wraps a module with parameters that can be called"):
            kfax.TaggedModule(wrong, block=kfax.Full())
