"""Layers that are used in other ways than once for each example, with models and data around them."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import random

import kfax


class Twice(eqx.Module):
    """A layer that is called twice, at two positions each, in a loop, and a stack that is scanned."""

    layer: eqx.nn.Linear
    stack: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.layer = eqx.nn.Linear(3, 3, key=keys[0])
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(jax.random.split(keys[1], 2))
        self.head = eqx.nn.Linear(3, 2, key=keys[2])

    def __call__(self, x, weigh=lambda layer, x: layer(x)):
        x = jnp.tanh(self.layer(x)) + jnp.stack([jnp.tanh(self.layer(y)) for y in (x, x[::-1])])
        x, _ = jax.lax.scan(lambda x, _: (jax.vmap(lambda y: jnp.tanh(self.layer(y)))(x), None), x, None, length=2)
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(
            lambda x, layer: (jax.vmap(lambda y: jnp.tanh(eqx.combine(layer, rest)(y)))(x), None), x, arrays
        )
        return self.head(jnp.sum(x, axis=0))


class Once(eqx.Module):
    """Layers that are called once, two of them as a stack, the last one for examples that a condition holds for."""

    layer: eqx.nn.Linear
    stack: eqx.nn.Linear
    head: eqx.nn.Linear

    __init__ = Twice.__init__

    def __call__(self, x):
        x = jax.checkpoint(jax.jit(lambda x: jnp.tanh(self.layer(x))))(x)
        x = eqx.filter_vmap(lambda layer: jnp.tanh(layer(x)))(self.stack)
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: self.head(x), lambda x: x[:2], jnp.sum(x, axis=0))


class Padded(eqx.Module):
    """A layer at three positions, of which those with a negative sum do not count."""

    layer: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.layer, self.head = Once().layer, Once().head

    def __call__(self, x):
        xs = jnp.stack([x, x[::-1], 1 - x])
        present = jnp.sum(xs, axis=1) > 0
        hidden = jax.vmap(lambda x, m: jnp.tanh(kfax.masked(self.layer, m)(x)))(xs, present)
        return self.head(jnp.sum(jnp.where(present[:, None], hidden, 0), axis=0))


class Sharing(eqx.Module):
    """Two layers with the same weight, each at one of two positions, the other one in a derivative as well."""

    pair: eqx.nn.Shared
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(1), 3)
        layers = tuple(eqx.nn.Linear(3, 3, key=key) for key in keys[:2])
        self.pair = eqx.nn.Shared(layers, where=lambda p: p[1].weight, get=lambda p: p[0].weight)
        self.head = eqx.nn.Linear(3, 2, key=keys[2])

    def __call__(self, x):
        first, second = self.pair()
        values, changes = jax.jvp(lambda x: self.head(jnp.tanh(second(jnp.tanh(first(x))))), (x,), (jnp.ones(3),))
        return values + 0.5 * changes


@dataclasses.dataclass(frozen=True)
class Scenario:
    model: Any
    x: jax.Array
    weights: jax.Array | None = None
    block: kfax.Block = kfax.EigenvalueCorrected()

    def outputs(self, model, x):
        return jax.vmap(model, axis_name="batch")(x)

    def loss_fn(self, model, batch):
        return kfax.squared_error(self.outputs(model, batch[0]), batch[1], weights=self.weights)


WEIGHTS = jnp.array([1.0, 0.0, 2.5, 0.5])
X = random(3, 4, 3)
