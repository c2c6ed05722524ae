"""Vector-space operations on PyTrees of arrays."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool

from .types import ArrayTree, PyTree, Scalar


def dot(x: ArrayTree, y: ArrayTree) -> Scalar:
    """The inner product of two PyTrees of one structure, in the widest dtype among their leaves (at least float32)."""

    def leaf(a, b):
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        return jnp.sum(a.astype(dtype) * b.astype(dtype))

    return jax.tree.reduce(operator.add, jax.tree.map(leaf, x, y), jnp.zeros((), jnp.float32))


def norm(x: ArrayTree) -> Scalar:
    """The Euclidean norm of a PyTree."""
    return jnp.sqrt(dot(x, x))


def mean(x: ArrayTree) -> Scalar:
    """The mean of all numbers in a PyTree."""
    sizes = [leaf.size for leaf in jax.tree.leaves(x)]
    return dot(x, jax.tree.map(jnp.ones_like, x)) / sum(sizes)


def combine(coefficients: tuple[ArrayLike, ...], trees: tuple[ArrayTree, ...]) -> ArrayTree:
    """The linear combination of several PyTrees of one structure; each leaf keeps the first tree's dtype.

    Computed in the leaves' widest dtype, at least float32: not in that of the coefficients, which may be float64.
    """

    def leaf(first, *rest):
        dtype = jnp.promote_types(jnp.result_type(first, *rest), jnp.float32)
        terms = (jnp.asarray(c, dtype) * x for c, x in zip(coefficients, (first, *rest), strict=True))
        return jax.tree.reduce(operator.add, list(terms)).astype(first.dtype)

    return jax.tree.map(leaf, *trees)


def select(predicate: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Chooses the arrays of one of two PyTrees by a scalar predicate; what is not chosen may hold NaNs."""
    arrays, rest = eqx.partition(on_true, eqx.is_array)
    others = eqx.filter(on_false, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda a, b: jnp.where(predicate, a, b), arrays, others), rest)


def distinct(tree: PyTree) -> PyTree:
    """The same PyTree, made anew, in which no two places hold the same object: to tell places apart by identity."""
    seen = set()

    def own(leaf):
        if not eqx.is_inexact_array(leaf) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return jnp.array(leaf)

    return jax.tree.map(own, tree)


def all_finite(x: PyTree) -> Bool[Array, ""]:
    """Whether there is neither NaN nor infinity in any floating-point array of `x`."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array))]
    return functools.reduce(operator.and_, flags, jnp.ones((), bool))


def zeros_like(x: ArrayTree) -> ArrayTree:
    return jax.tree.map(jnp.zeros_like, x)


def is_traced(x: PyTree) -> bool:
    """Whether any array in `x` is being traced, so that its values cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))


def tie(x: ArrayTree, to: Any) -> ArrayTree:
    """Returns `x` unchanged, but mapped over every `jax.vmap` axis that an array in `to` is mapped over.

    An array that does not depend on a mapped input is not mapped itself; here that distinction carries meaning
    (see `_slot`), so it is made explicit. XLA removes the operation.
    """

    def flag_of(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return jnp.any(leaf == leaf)  # a reduction: the array may be sharded

    flags = [flag_of(leaf) for leaf in jax.tree.leaves(eqx.filter(to, eqx.is_array)) if leaf.size > 0]
    if not flags:
        return x
    flag = functools.reduce(operator.or_, flags)
    return jax.tree.map(lambda leaf: jax.lax.select(flag, leaf, leaf), x)


@jax.custom_batching.custom_vmap
def anywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """The flag; under `jax.vmap`, whether it is set for any member, one value for all of them.

    So that a `cond` of it is still one, where a mapped predicate would have JAX run both branches.
    """
    return flag


@anywhere.def_vmap
def _anywhere(axis_size, in_batched, flag):
    del axis_size, in_batched
    return anywhere(jnp.any(flag, axis=0)), False


def keep_finite(new: dict, old: dict, is_known: Bool[Array, ""]) -> tuple[dict, Bool[Array, ""]]:
    """The entries of `new` that are finite, if anything is known, and otherwise those of `old`; whether any is not."""
    finite = {key: all_finite(value) & is_known for key, value in new.items()}
    kept = {key: select(finite[key], value, old[key]) for key, value in new.items()}
    return kept, functools.reduce(operator.or_, [~flag for flag in finite.values()], jnp.zeros((), bool))


def cond(predicate: Any, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond`, or a plain `if` where the predicate's value is known. What is no array must be the same."""
    if not is_traced(predicate):
        return on_true() if predicate else on_false()
    rest = []

    def arrays(branch):
        dynamic, static = eqx.partition(branch(), eqx.is_array)
        rest.append(static)
        return dynamic

    dynamic = jax.lax.cond(predicate, lambda: arrays(on_true), lambda: arrays(on_false))
    return eqx.combine(dynamic, rest[0])
