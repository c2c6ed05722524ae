"""The exact curvature of one batch from the gradients of single examples."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._capture import Cotangents, on_each, Problem
from .._losses import Loss
from .._math import linalg
from .._math.types import Counter, Parameters, PRNGKey
from .sources import CurvatureSource


_Total = TypeVar("_Total")


class ExampleRows(eqx.Module):
    r"""The rows of a factor of the curvature, $C = \sum_{ni} r_{ni} r_{ni}^\top$, $r_{ni} = J_n^\top q_{ni} / \sqrt N$.

    $q_{ni}$ are the source's cotangents of example n. $J_n$ comes from the batch with that example alone: a row of each
    of its arrays. An example's outputs may depend on nothing else, which `checked_fold` finds out.

    **Fields:**

    - `source`, `problem`, `key`: which matrix of which batch.
    - `losses`: of the whole batch.
    - `sizes`: how many examples there are in each set, one after another along axis 0 of the outputs.
    - `is_apart`: whether each set has losses of its own.
    """

    source: CurvatureSource
    problem: Problem
    losses: tuple[Loss, ...]
    key: PRNGKey | None
    sizes: tuple[int, ...] = eqx.field(static=True)
    is_apart: bool = eqx.field(static=True)

    @property
    def parameters(self) -> Parameters:
        return on_each(self.problem.loss_fn, self.problem.parameters)

    @property
    def width(self) -> int:
        """How many rows an example has."""
        return self.source.num_cotangents(self.losses)

    def fold(
        self, add: Callable[[_Total, Float[Array, "c k p"], Int[Array, " c"]], _Total], total: _Total, max_examples: int
    ) -> _Total:
        """Adds up over all examples, some at a time.

        **Arguments:**

        - `add`: `(total, rows, numbers) -> total`, given the rows of some examples, and the examples' numbers. Rows
            that stand for no example are zeros, and so is their number.
        - `total`: to begin with.
        - `max_examples`: how many at a time.
        """
        total = on_each(self.problem.loss_fn, total)
        for position, size in enumerate(self.sizes):
            count = math.ceil(size / max_examples)
            length = math.ceil(size / count)

            def step(total, index, position=position, length=length):
                return add(total, *self.chunk(position, length, index)), None

            if count == 1:
                total, _ = step(total, jnp.zeros((), jnp.int32))
            else:
                total, _ = jax.lax.scan(step, total, jnp.arange(count, dtype=jnp.int32))
        return total

    def checked_fold(
        self, add: Callable[[_Total, Float[Array, "c k p"], Int[Array, " c"]], _Total], total: _Total, max_examples: int
    ) -> tuple[_Total, Bool[Array, ""]]:
        """The same, and whether the rows are those of the whole batch, up to rounding.

        They are not if examples see each other, or if the batch was not taken apart as it is put together. A sum of all
        rows with random signs is compared with the pullback of the same cotangents of the whole batch.
        """
        shape = (self.losses[0].num_examples, self.width)
        signs = jax.random.rademacher(jax.random.key(0), shape, jnp.result_type(*(x.outputs for x in self.losses)))
        pull = jax.vjp(lambda p: _outputs(self.problem, self.problem.batch, p), self.parameters)[1]
        expected = _ravel(pull(self.source.multiply_factor(self.losses, signs, self.key))[0]) / math.sqrt(shape[0])

        def add_both(totals, rows, numbers):
            total, found, square = totals
            flat = rows.reshape(-1, rows.shape[-1])
            found += linalg.matmul(signs[numbers].reshape(-1).astype(flat.dtype), flat)
            return add(total, rows, numbers), found, square + jnp.sum(jnp.square(flat))

        start = (total, jnp.zeros_like(expected), jnp.zeros((), expected.dtype))
        total, found, square = self.fold(add_both, start, max_examples)
        dtypes = [x.dtype for x in (*jax.tree.leaves(self.problem.parameters), *(loss.outputs for loss in self.losses))]
        tolerance = min(_ROUNDINGS * max(float(jnp.finfo(dtype).eps) for dtype in dtypes), _COARSEST)
        return total, jnp.linalg.norm(found - expected) <= tolerance * jnp.sqrt(square)

    def chunk(self, position: int, length: int, index: Counter) -> tuple[Float[Array, "c k p"], Int[Array, " c"]]:
        """The rows of `length` examples of a set, the index-th so many; zeros where there is no example left."""
        size, start = self.sizes[position], sum(self.sizes[:position])
        within = index * length + jnp.arange(length)
        exists, within = within < size, jnp.minimum(within, size - 1)
        numbers = jnp.where(exists, start + within, 0)

        root = math.sqrt(self.losses[0].num_examples)

        def column(i):
            vectors = self.source.cotangents(self.losses, i, self.key)
            return tuple(_by_example(exists, vector[start + within]) / root for vector in vectors)

        cotangents = jax.lax.map(column, jnp.arange(self.width))
        chosen, rest = _partition(self.problem.batch, self.sizes, size)
        chosen = jax.tree.map(lambda leaf: leaf[within][:, None] if length < size else leaf[:, None], chosen)

        def rows(one, cotangents):
            def outputs(parameters):
                found = _outputs(self.problem, eqx.combine(one, rest), parameters)
                return tuple(x[0 if self.is_apart else position] for x in found)

            pull = jax.vjp(outputs, self.parameters)[1]
            return jax.vmap(lambda u: _ravel(pull(u)[0]))(cotangents)

        return jax.vmap(rows, in_axes=(0, 1))(chosen, cotangents), numbers


def rows_of_examples(
    source: CurvatureSource, problem: Problem, losses: tuple[Loss, ...], key: PRNGKey | None
) -> ExampleRows | None:
    """The rows, if by the shapes of its arrays the batch can be taken apart; `None` otherwise.

    It can if all arrays that have as many rows as there are examples have them along axis 0. If none has, then all
    arrays are taken for sets of examples, each with as many as it has rows, whose outputs are one after another in the
    order in which the arrays stand in the batch. Losses of different examples say themselves how many these are.
    """
    number = losses[0].num_examples
    arrays = [leaf for leaf in jax.tree.leaves(problem.batch) if eqx.is_array(leaf) and leaf.ndim > 0]
    sizes = tuple(dict.fromkeys(leaf.shape[0] for leaf in arrays))
    sets = tuple(dict.fromkeys(len(loss.examples) for loss in losses))
    is_apart = len(sets) > 1
    if is_apart:
        sizes = sets if set(sets) <= set(sizes) else ()
    elif number in sizes:
        sizes = (number,)
    if not sizes or 0 in sizes:
        return None
    try:
        jax.eval_shape(lambda: source.cotangents(losses, jnp.zeros((), jnp.int32), key))
        chosen, rest = _partition(problem.batch, sizes, sizes[0])
        first = eqx.combine(jax.tree.map(lambda leaf: leaf[:1], chosen), rest)
        found = jax.eval_shape(lambda: _outputs(problem, first, problem.parameters))
    except Exception:  # whatever a loss function, or a loss without a factor, has against one example
        return None
    count = found[0].shape[0]
    sizes = sizes * count if len(sizes) == 1 else sizes
    expected = [(count, *loss.outputs.shape[1:]) for loss in losses]
    together = 1 if is_apart else len(sizes)
    if together != count or sum(sizes) != number or [x.shape for x in found] != expected:
        return None
    return ExampleRows(source, problem, losses, key, sizes, is_apart)


# Roundings in another order, through a deep network or second derivatives; and what is no rounding in any precision.
_ROUNDINGS, _COARSEST = 1e3, 0.05


def _partition(batch: Any, sizes: tuple[int, ...], size: int) -> tuple[Any, Any]:
    """The arrays of the examples of one set, and all else, with one row of each other set."""

    def has_rows(leaf):
        return eqx.is_array(leaf) and leaf.ndim > 0

    chosen, rest = eqx.partition(batch, lambda leaf: has_rows(leaf) and leaf.shape[0] == size)
    return chosen, jax.tree.map(lambda leaf: leaf[:1] if has_rows(leaf) and leaf.shape[0] in sizes else leaf, rest)


def _outputs(problem: Problem, batch: Any, parameters: Parameters) -> Cotangents:
    losses = dataclasses.replace(problem, batch=batch).evaluate(parameters).losses
    return tuple(loss.outputs for loss in losses)


def _by_example(scale: Bool[Array, " c"], array: Float[Array, "c ..."]) -> Float[Array, "c ..."]:
    return array * scale.reshape(-1, *(1,) * (array.ndim - 1)).astype(array.dtype)


def _ravel(tree: Parameters) -> Float[Array, " p"]:
    """All numbers in one vector, in at least float32."""
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(jnp.float32, *leaves)
    return jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in leaves])
