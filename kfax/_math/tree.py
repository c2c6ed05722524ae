"""Vector-space operations on PyTrees of arrays."""

import abc
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float

from .types import ArrayTree, PyTree, Scalar


def dot(x: ArrayTree, y: ArrayTree) -> Scalar:
    """The inner product of two PyTrees of one structure, in the widest dtype among their leaves (at least float32)."""

    def leaf(a, b):
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        return jnp.sum(a.astype(dtype) * b.astype(dtype))

    return jax.tree.reduce(operator.add, jax.tree.map(leaf, x, y), jnp.zeros((), jnp.float32))


def inner_products(
    vectors: Sequence[ArrayTree], pairs: Sequence[tuple[int, int]], measured: Sequence[int] = ()
) -> tuple[Float[Array, "leaves pairs"], Float[Array, "leaves measured"]]:
    """Inner products of several PyTrees of one structure, in one pass over their numbers.

    One reduction of several arrays at once for each leaf, along its last axis first, for the sake of rounding errors.
    Of single sums XLA makes three kernels each on the CPU, and stores the products in between.

    **Arguments:**

    - `vectors`: the PyTrees.
    - `pairs`: of which of them, by number.
    - `measured`: which of them are also asked for their largest absolute values.

    **Returns:** the products, by leaf; and the largest absolute values, by leaf. In the widest dtype among their leaves
    (at least float32).
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(vectors))

    def add(totals, more):
        sums, sizes = totals[: len(pairs)], totals[len(pairs) :]
        products, others = more[: len(pairs)], more[len(pairs) :]
        return [*map(jnp.add, sums, products), *map(jnp.maximum, sizes, others)]

    def leaf(*arrays):
        wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]
        terms = [*(wide[i] * wide[j] for i, j in pairs), *(jnp.abs(wide[i]) for i in measured)]
        zeros = [jnp.zeros((), x.dtype) for x in terms]
        if terms[0].ndim > 1:
            terms = jax.lax.reduce(terms, zeros, add, (terms[0].ndim - 1,))
        terms = jax.lax.reduce(terms, zeros, add, tuple(range(terms[0].ndim)))
        return [x.astype(dtype) for x in terms]

    leaves = list(zip(*map(jax.tree.leaves, vectors), strict=True))
    numbers = [number for arrays in leaves for number in leaf(*arrays)]
    table = jnp.stack(numbers).reshape(len(leaves), -1)
    return table[:, : len(pairs)], table[:, len(pairs) :]


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


def finite_or_zero(x: ArrayTree) -> ArrayTree:
    """Zeros in the places of all numbers that are not finite."""
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros((), leaf.dtype)), x)


def distinct(tree: PyTree) -> PyTree:
    """The same PyTree, made anew, in which no two places hold the same object: to tell places apart by identity."""
    seen = set()

    def own(leaf):
        if not eqx.is_inexact_array(leaf) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return jnp.array(leaf)

    return jax.tree.map(own, tree)


class Summarized(eqx.Module):
    """Arrays of which fewer numbers tell whether they are finite."""

    @abc.abstractmethod
    def summary(self) -> list[Float[Array, "..."]]:
        """Numbers that are finite if and only if all arrays are."""


def all_finite(x: PyTree) -> Bool[Array, ""]:
    """Whether there is neither NaN nor infinity in any floating-point array of `x`."""
    nodes = jax.tree.leaves(x, is_leaf=_is_summarized)
    few = [array.reshape(-1) for node in nodes if _is_summarized(node) for array in node.summary()]
    arrays = [node for node in nodes if eqx.is_inexact_array(node)]
    if few:
        dtype = jnp.result_type(*few)
        arrays.append(jnp.concatenate([array.astype(dtype) for array in few]))
    flags = [jnp.all(jnp.isfinite(array)) for array in arrays]
    return functools.reduce(operator.and_, flags, jnp.ones((), bool))


def _is_summarized(node: Any) -> bool:
    return isinstance(node, Summarized)


def full_like(x: PyTree, value: ArrayLike) -> ArrayTree:
    """Arrays of one value, like those of a PyTree of arrays or of shapes.

    Made by NumPy where the arrays are known and on one device: of each shape `jnp.full_like` compiles a program.
    """

    def leaf(x):
        if isinstance(x, Tracer) or isinstance(getattr(x, "sharding", None), NamedSharding):
            return jnp.full_like(x, value)
        return jax.device_put(np.broadcast_to(np.asarray(value, x.dtype), x.shape))

    return jax.tree.map(leaf, x)


def zeros_like(x: PyTree) -> ArrayTree:
    return full_like(x, 0)


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
        return jnp.any(jax.lax.broadcast(leaf, (0,)) == 0)  # of no numbers at all, so that nothing is computed

    flags = [flag_of(leaf) for leaf in jax.tree.leaves(eqx.filter(to, eqx.is_array))]
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


def keep_finite(
    new: dict[Any, Any], old: dict[Any, Any], is_known: Bool[Array, ""], is_wanted: Bool[Array, ""] | bool = True
) -> tuple[dict[Any, Any], Bool[Array, ""]]:
    """The entries of `new` that are finite, if anything is known and wanted, and otherwise those of `old`.

    Also whether any is wanted and not finite.
    """
    finite = {key: all_finite(value) & is_known for key, value in new.items()}
    kept = {key: select(finite[key] & is_wanted, value, old[key]) for key, value in new.items()}
    failed = functools.reduce(operator.or_, [~flag for flag in finite.values()], jnp.zeros((), bool))
    return kept, failed & is_wanted


def cond(predicate: Any, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond`, or a plain `if` where the predicate's value is known. What is no array must be the same.

    What both branches return as it was given to them stays out of it: XLA would copy it.
    """
    if not is_traced(predicate):
        return on_true() if predicate else on_false()
    kept, structure = jax.tree.flatten(on_false())  # what is computed for it is not used, and left out by XLA
    differs: list[bool] = []

    def changed(branch):
        leaves = jax.tree.leaves(branch())
        if not differs:
            differs.extend(eqx.is_array(x) and x is not y for x, y in zip(leaves, kept, strict=True))
        return [leaf for leaf, other in zip(leaves, differs, strict=True) if other]

    results = iter(jax.lax.cond(predicate, lambda: changed(on_true), lambda: changed(on_false)))
    leaves = [next(results) if other else leaf for leaf, other in zip(kept, differs, strict=True)]
    return jax.tree.unflatten(structure, leaves)
