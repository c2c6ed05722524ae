"""Models, and losses that differentiate them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import mlp

import kfax


N = 5


class Image(eqx.Module):
    """Of an image: convolutions, a normalization, a head."""

    convolution: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.convolution = eqx.nn.Conv2d(2, 4, 2, padding=1, groups=2, key=k1)
        self.norm = eqx.nn.LayerNorm((4, 4, 4))
        self.head = eqx.nn.Linear(64, 2, key=k2)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.convolution(x))).reshape(-1))


class Coordinates(eqx.Module):
    """Of a point and the number of a medium, which is embedded."""

    medium: eqx.nn.Embedding
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.medium = eqx.nn.Embedding(3, 4, key=k1)
        self.first = eqx.nn.Linear(2, 4, key=k2)
        self.second = eqx.nn.Linear(4, 2, key=k3)

    def __call__(self, x):
        number = jnp.asarray(jax.lax.stop_gradient(jnp.abs(10 * x[0])), int) % 3
        return self.second(jnp.tanh(self.first(x) + self.medium(number) * jnp.sum(x)))


class Tied(eqx.Module):
    """A recurrent cell and a layer that is called twice, also in a jitted function, and rematerialized."""

    cell: eqx.nn.GRUCell
    layer: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(1, 2, key=k1)
        self.layer = eqx.nn.Linear(2, 2, key=k2)

    def __call__(self, x):
        state, _ = jax.lax.scan(lambda h, z: (self.cell(z[None], h), None), jnp.ones(2), x)
        state = eqx.filter_checkpoint(self.layer)(jnp.tanh(state))
        return jnp.sin(eqx.filter_jit(lambda layer, z: layer(z))(self.layer, state))


def scanned(key):
    return eqx.nn.MLP(2, 2, 3, 3, activation=jnp.tanh, scan=True, key=key)


def points(*shape):
    return jax.random.normal(jax.random.key(7), (N, *shape))


def hessian(function):
    return jax.jacfwd(jax.jacfwd(function))


def value_gradient_laplacian(model, x):
    value, slope = jax.jvp(model, (x,), (jnp.cos(jnp.arange(x.size)).reshape(x.shape),))
    jacobian = jax.jacfwd(lambda z: model(z) ** 2)(x)
    trace = jnp.trace(hessian(model)(x).reshape(2, x.size, x.size), axis1=1, axis2=2)
    return jnp.concatenate([value * trace, slope, jnp.sin(trace) + jacobian.reshape(2, -1).sum(1)])


def mixed(model, x):
    """A mixed second derivative by nested directions, one of which depends on the model."""
    v, w = jnp.ones_like(x), jnp.linspace(-1, 1, x.size).reshape(x.shape)
    first = lambda z: jax.jvp(model, (z,), (v,))[1]  # noqa: E731
    value, second = jax.jvp(first, (x,), (w * jnp.sum(model(x)),))
    return jnp.concatenate([second, value * x.reshape(-1)[:1]])


def third(model, x):
    def along(function):
        return lambda t: jax.jvp(function, (t,), (jnp.ones(()),))[1]

    return along(along(along(lambda t: model(x + t * jnp.ones_like(x)))))(jnp.zeros(()))


def laplacian(model, x):
    """Value, Jacobian and Laplacian at once, of which the model is a part."""
    value, jacobian, second = kfax.forward_laplacian(lambda z: jnp.sin(model(z)) * jnp.sum(z))(x)
    return jnp.concatenate([value * second, jacobian.reshape(2, -1).sum(1)])


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable
    x: Any
    residual: Callable

    def model(self, block=None):
        return kfax.tag(self.make(jax.random.key(3)), block=block)

    def outputs(self, model, x, name=None):
        return jax.vmap(lambda z: self.residual(model, z), axis_name=name)(x)

    def loss_of(self, name=None):
        return lambda model, x: kfax.squared_error(y := self.outputs(model, x, name), jnp.zeros_like(y))


def small_mlp(key):
    return mlp(key, [2, 4, 3, 2])


CASES = {
    "mlp": Case(small_mlp, points(2), value_gradient_laplacian),
    "mlp-mixed": Case(small_mlp, points(2), mixed),
    "mlp-third": Case(small_mlp, points(2), third),
    "image": Case(Image, points(2, 3, 3), mixed),
    "coordinates": Case(Coordinates, points(2), value_gradient_laplacian),
    "scanned": Case(scanned, points(2), value_gradient_laplacian),
    "tied": Case(Tied, points(3), mixed),
    "mlp-laplacian": Case(small_mlp, points(2), laplacian),
    "image-laplacian": Case(Image, points(2, 3, 3), laplacian),
    "scanned-laplacian": Case(scanned, points(2), laplacian),
}
