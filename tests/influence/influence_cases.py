"""Gradients of one example at a time, without kfax, and several vectors in one PyTree."""

import jax
import jax.numpy as jnp
from helpers import parameters, random
from jax.flatten_util import ravel_pytree

import kfax


BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
WEIGHTS = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0])


def is_kept(model, frozen):
    """For each number of the raveled parameters, whether it is trained."""
    p = parameters(model)
    where = {id(leaf) for leaf in jax.tree.leaves(frozen(p))}
    return jnp.concatenate([jnp.full(leaf.size, id(leaf) not in where) for leaf in jax.tree.leaves(p)])


def gradients_of(case):
    """Of one example after another, `(n, p)`."""
    v, unravel = ravel_pytree(parameters(case.model))

    def loss(v, n):
        return case.one(case.outputs(unravel(v))[n], case.y[n])

    return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(v, jnp.arange(len(case.x)))


def stacked(like, seed, number):
    """Random vectors."""
    v, unravel = ravel_pytree(like)
    return jax.vmap(unravel)(random(seed, number, v.size))


def matrix(tree):
    """Several vectors as the rows of a matrix."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(tree)
