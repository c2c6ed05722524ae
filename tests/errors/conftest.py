"""A case that is right, and a module with a parameter that belongs to no layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case


class Scaled(eqx.Module):
    """A user's module with a parameter of its own."""

    scale: jax.Array
    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(self.scale * x)


@pytest.fixture
def scaled(key):
    return Scaled(jnp.ones(8), eqx.nn.Linear(8, 3, key=key))


@pytest.fixture
def case():
    return make_case("mlp", "softmax")
