"""Dense truths: slow, obvious, and without kfax."""

import itertools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


def softmax_loss(f, y):
    """One example, summed over positions; integer labels."""
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(f), y[..., None], axis=-1))


def sigmoid_loss(f, y):
    return jnp.sum(jnp.logaddexp(0, f) - y * f)


def squared_loss(f, y):
    return jnp.sum((f - y) ** 2)


def poisson_loss(f, y):
    return jnp.sum(jnp.exp(f) - y * f)


def gaussian_nll_loss(f, y):
    mean, log_variance = jnp.split(f, 2, axis=-1)
    return jnp.sum(log_variance + (y - mean) ** 2 / jnp.exp(log_variance)) / 2


def gaussian_nll_fisher(f):
    """Of the raveled outputs at one position."""
    mean, log_variance = jnp.split(f, 2)
    return jnp.diag(jnp.concatenate([jnp.exp(-log_variance), jnp.full_like(mean, 0.5)]))


def quartic_loss(f, y):
    """Convex, and coupled within a position."""
    return jnp.sum((f - y) ** 4) + jnp.sum(jnp.sum(f, axis=-1) ** 2)


def output_hessians(loss, outputs, targets):
    """`(n, c, c)`, with the outputs of one example raveled."""

    def one(f, y):
        return jax.hessian(lambda flat: loss(flat.reshape(f.shape), y))(f.reshape(-1))

    return jax.jit(jax.vmap(one))(outputs, targets)


def jacobians(function, parameters):
    """`(n, c, p)`: the jacobian of a function from parameters to outputs `(n, ...)`, everything else raveled."""
    flat, unravel = ravel_pytree(parameters)
    jacobian = jax.jit(jax.jacrev(lambda v: function(unravel(v))))(flat)
    return jacobian.reshape(jacobian.shape[0], -1, flat.size)


def ggn(function, parameters, loss, targets, weights=None):
    """The generalized Gauss-Newton matrix of the (weighted) mean over examples, `(p, p)`."""
    j = jacobians(function, parameters)
    h = output_hessians(loss, function(parameters), targets)
    w = jnp.ones(len(j)) if weights is None else weights
    return jnp.einsum("n,nci,ncd,ndj->ij", w / w.sum(), j, h, j)


def block_diagonal(matrix, groups):
    """Zero outside the blocks of equal `groups`, `(p,)`."""
    return jnp.where(groups[:, None] == groups[None, :], matrix, 0)


def signs(size):
    return jnp.array(list(itertools.product([-1.0, 1.0], repeat=size)))


def kronecker(a, g):
    """The block of V `(d_g, d_a)` raveled row by row."""
    return jnp.kron(g, a)


def explicit_rows(function, layer, x, cotangent):
    """Runs `function(call, x)` for one example, where each `call(z)` is one use of `layer(z)`.

    Returns the inputs `(uses, d_a)` and output cotangents `(uses, d_g)` of all uses, one row for each.
    """
    inputs = []

    def run(offsets):
        inputs.clear()

        def call(z):
            inputs.append(z)
            return layer(z) + offsets[len(inputs) - 1]

        return function(call, x), list(inputs)

    zeros = []

    def count(z):
        zeros.append(jnp.zeros_like(layer(z)))
        return layer(z)

    function(count, x)
    _, pullback, used = jax.vjp(run, zeros, has_aux=True)
    (cotangents,) = pullback(cotangent)
    return jnp.stack(used), jnp.stack(cotangents)


def recorded(run, x, columns):
    """Runs `run(call, x)` for one example, where each `call(name, function, z)` is one use of an operation.

    Returns for each name the inputs `(uses, ...)` and, for each of the cotangents `columns` of the result, the
    cotangents of the operation's outputs `(columns, uses, ...)`.
    """
    inputs, zeros = {}, {}

    def collect(name, function, z):
        out = function(z)
        zeros.setdefault(name, []).append(jnp.zeros_like(out))
        return out

    run(collect, x)

    def shifted(offsets):
        inputs.clear()

        def call(name, function, z):
            inputs.setdefault(name, []).append(z)
            return function(z) + offsets[name][len(inputs[name]) - 1]

        return run(call, x), {name: jnp.stack(values) for name, values in inputs.items()}

    _, pullback, used = jax.vjp(shifted, {name: tuple(values) for name, values in zeros.items()}, has_aux=True)
    (cotangents,) = jax.vmap(pullback)(columns)
    return {name: (used[name], jnp.stack(cotangents[name], axis=1)) for name in used}
