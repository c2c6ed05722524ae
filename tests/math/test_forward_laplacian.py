"""The forward Laplacian against nested derivatives."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random

import kfax


def smooth(x):
    y = jnp.sin(x) @ jnp.arange(6.0).reshape(3, 2) + jnp.linalg.norm(x)
    return {"powers": jax.nn.softmax(y**3), "sum": jnp.sum(jnp.log(2 + y**2) * y), "constant": jnp.ones(2)}


def with_kinks(x):
    y = jax.nn.relu(jnp.tanh(3 * x)) + jnp.where(x > 0, x**3, jnp.exp(x))
    return jnp.sort(y) * jax.nn.gelu(jnp.max(x)), x[jnp.argmax(x)] * x


def with_loops(x):
    y, many = jax.lax.scan(lambda c, t: (jnp.tanh(c * t + x), c), x, jnp.arange(3.0))
    z = jax.lax.fori_loop(0, 2, lambda _, z: jnp.cos(z) * y, y)
    return jax.lax.cond(x[0] > 0, lambda: y * z, lambda: z), many


def with_calls(x):
    @jax.custom_jvp
    def cube(x):
        return x**3

    cube.defjvp(lambda primals, tangents: (cube(primals[0]), 3 * primals[0] ** 2 * tangents[0]))
    inner = jax.checkpoint(lambda z: jnp.sin(z) * z)
    return jax.jit(lambda z: jnp.outer(inner(z), cube(z)))(x)


@pytest.mark.parametrize("function", [smooth, with_kinks, with_loops, with_calls])
def test_functions(function):
    for x in random(0, 1, 3):
        value, jacobian, laplacian = jax.jit(kfax.forward_laplacian(function))(x)
        hessian = jax.jacfwd(jax.jacfwd(function))(x)
        assert_close(value, function(x))
        assert_close(jacobian, jax.jacfwd(function)(x))
        assert_close(laplacian, jax.tree.map(lambda h: jnp.trace(h, axis1=-2, axis2=-1), hessian))


def test_under_transformations():
    """Mapped, differentiated, and of an array with several axes."""

    def function(w, x):
        return jnp.tanh(w @ x).sum(0)

    def laplacian(w, x):
        return kfax.forward_laplacian(lambda x: function(w, x))(x)[2]

    def expected(w, x):
        return jnp.trace(jax.hessian(lambda flat: function(w, flat.reshape(x.shape)))(x.ravel()), axis1=1, axis2=2)

    w, x = random(0, 4, 2), random(1, 5, 2, 3)
    over = (None, 0)
    assert_close(jax.vmap(laplacian, over)(w, x), jax.vmap(expected, over)(w, x))
    assert_close(jax.jacrev(jax.vmap(laplacian, over))(w, x), jax.jacrev(jax.vmap(expected, over))(w, x))
    jacobian = kfax.forward_laplacian(lambda x: function(w, x))(x[0])[1]
    assert jacobian.shape == (3, 2, 3)


def test_integers_have_no_derivatives():
    value, jacobian, laplacian = kfax.forward_laplacian(lambda x: jnp.argmax(x))(jnp.array([1.0, 2.0]))
    assert (value, jacobian.tolist(), laplacian) == (1, [0, 0], 0)
    with pytest.raises(TypeError, match="real floating-point numbers, got int"):
        kfax.forward_laplacian(lambda x: x)(jnp.arange(3))
