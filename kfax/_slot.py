"""The slot: how a layer's inputs and output cotangents leave a transformed computation as finished statistics.

A layer that wants to be observed passes its output through `observe(y, x, slot)`, which returns `y`. With `slot=None`
that is all. Otherwise the slot holds arrays, and the caller differentiates with respect to *them*, backwards. The rule
of `observe` then is a linear function whose transpose hands `dy` on to `y` and gives the slot the "cotangent"
`fold(x, dy)`: whatever statistic of the layer's inputs and output cotangents is wanted. Reverse mode does the rest. It
adds up the contributions of several calls and of the iterations of a `scan`, it runs through `jit`, `cond` and
`checkpoint`, and it stacks what belongs to stacked layers. A derivative in which the slot has no tangent is one that
the loss takes of the model, by forward mode: the rule observes the layer's tangents as it does its values.

What it would not do by itself is treat a batch well. Under `jax.vmap(model)` plain batching would compute the
statistic of every example, an array of batch x d x d numbers, and only then sum it. So `fold` is a `custom_vmap`
function, whose rule is consulted for every mapped axis, innermost first:

- *Slot not mapped* (the same layer sees every element: examples, sequence positions, noise samples). The axis becomes
  one more axis of rows of `x` and `dy`, and the result is reported as unmapped. When no axes are left, the statistic
  of all rows is computed at once, in one matrix product.
- *Slot mapped* (each element is a layer of its own: an ensemble, experts, stacked layers). The result is one
  statistic for each element: `fold` is rebuilt around the vmapped statistic, so that the rule stays in force for the
  axes still outside.

Therefore a slot must be mapped over exactly those axes over which its layer's *statistics* are distinct. Whoever fills
slots ties them to everything that the computation receives from outside (see `_math.tree.tie`).

Which of the row axes enumerates the examples? Sums over all rows never ask. A statistic that is not a plain sum, such
as one of per-example gradients, does, and so do example weights:

- *Named*: the user writes `jax.vmap(model, axis_name="batch")`. `observe` takes `lax.axis_index("batch")`, the
  *marker*, which is mapped over that axis and no other, so that the rule recognizes it; `y` is made to depend on the
  marker, so that the backward pass sees the axis even where `x` does not depend on the example. Then a slot that is
  mapped over this axis as well, which is what a `lax.cond` whose predicate differs between examples makes of it, can
  be told from one that belongs to stacked layers: the axis enumerates rows all the same, one example at a time.
- *Unnamed*: the outermost row axis, the last one that the rule is asked about. Its size must be the number of
  examples.

Two kinds of statistic use this. A *sum* adds over rows: second moments, counts. A *linear* one keeps an axis of
examples and is linear in each use of the layer (a per-example gradient), to be squared by the caller: squaring in each
use would be wrong for a layer that is used twice. To this module both are functions with results like the slot.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Bool, Float

from ._example_axis import ExampleAxis
from ._math.mesh import as_around, on_automatic_axes
from ._math.tree import tie
from ._math.types import ArrayTree, Counter, PyTree


_Y = TypeVar("_Y")


class Use(eqx.Module):
    """One use of a layer, by all examples and at all positions. The leading axes are (examples, positions).

    **Fields:**

    - `x`: what the layer was given, `(n, p, ...)`, or a PyTree of such arrays.
    - `dy`: the cotangent of what it returned, likewise. Per example: not divided by n.
    - `present`: which positions count; `None` if all do. Where `False`, `dy` is zero, and `x` is one that counts.
    - `weights`: of the examples, divided by the mean of all; `None` if equal.
    - `examples`: which of all examples they are; `None` for an unknown part of them.
    - `context`: what the layer passed beside `x`, without these axes, such as its parameters.
    - `is_tangent`: whether `x` is the derivative of an input along some direction, within a loss that contains
        derivatives of the model. What is added to every output, a bias, has no part in it.
    - `given`: what the estimator has of this layer from before, such as an eigenbasis, if the statistic asks for it.
    - `is_only`: whether it is known that there is no other use of the layer.
    """

    x: ArrayTree
    dy: ArrayTree
    present: Bool[Array, "n p"] | None
    weights: Float[Array, " n"] | None
    context: PyTree
    examples: range | None = eqx.field(static=True)
    is_tangent: bool = eqx.field(static=True, default=False)
    given: ArrayTree = None
    is_only: bool = eqx.field(static=True, default=False)

    @property
    def num_examples(self) -> int:
        return jax.tree.leaves(self.dy)[0].shape[0]

    @property
    def num_positions(self) -> int:
        return jax.tree.leaves(self.dy)[0].shape[1]


class Slot(eqx.Module):
    """What an estimator puts into a layer in order to observe it.

    **Fields:**

    - `value`: arrays of the statistic's shapes and dtypes; their contents are never read. Differentiate with respect
        to these.
    - `weights`: the weight of each example, or `None` for equal weights. Carries the same stack axes as `value`.
    - `statistic`: from a `Use` to something like `value`.
    - `axis`: which mapped axis enumerates the examples.
    - `ndim`: how many axes the first array in `value` has for a single layer, without stack axes.
    - `on_forward`: called when the layer is called; may raise an error.
    - `present`: whether the next call counts, as told by [`kfax.masked`][]; `None` if it does. Carries the same stack
        axes as `value`.
    - `given`: what `Use` hands on of it. Carries the same stack axes as `value`, and is mapped over no others.
    """

    value: ArrayTree
    weights: Float[Array, "*stack n"] | None
    statistic: Callable[[Use], ArrayTree] = eqx.field(static=True)
    axis: ExampleAxis = eqx.field(static=True)
    ndim: int = eqx.field(static=True, default=0)
    on_forward: Callable[[], None] = eqx.field(static=True, default=lambda: None)
    present: Bool[Array, "*stack"] | None = None
    given: ArrayTree = None

    @property
    def is_stacked(self) -> bool:
        """Whether there is a layer for each element of leading axes."""
        return jax.tree.leaves(self.value)[0].ndim > self.ndim

    def masked(self, mask: Bool[Array, ""]) -> "Slot":
        """The slot for a call that counts only if `mask` holds."""
        value = jax.tree.leaves(self.value)[0]
        mask = jnp.broadcast_to(mask, value.shape[: value.ndim - self.ndim])
        return dataclasses.replace(self, present=mask if self.present is None else self.present & mask)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """A slot that is no leaf of the tree it is in, and goes through transformations as what a function closes over."""

    slot: Slot

    def masked(self, mask: Bool[Array, ""]) -> "Hidden":
        return Hidden(self.slot.masked(mask))


def observe(y: _Y, x: PyTree, slot: Slot | Hidden | None, context: PyTree = None) -> _Y:
    """Returns `y`, and lets `slot` see the input `x` and, in the backward pass, the cotangent of `y`.

    To be called by a tagged layer for each output `y` that is computed from `x` by its parameters: arrays, or PyTrees
    of them, of one call, without batch axes: those come from `jax.vmap`. Costs nothing when `slot` is `None`.
    `context` is for arrays that belong to the layer rather than to the call.
    """
    if slot is None:
        return y
    slot = as_around(slot.slot) if isinstance(slot, Hidden) else slot
    slot.on_forward()
    observed, rest = eqx.partition(y, eqx.is_inexact_array)
    x = jax.tree.map(jnp.asarray, x)
    ndims = jax.tree.map(jnp.ndim, x), jax.tree.map(jnp.ndim, observed)
    layer = slot.weights, context, slot.given
    result = _observer(slot, *ndims)(observed, x, slot.value, layer, slot.axis.marker(), slot.present)
    return eqx.combine(result, rest)


def _observer(slot: Slot, x_ndims: PyTree, y_ndims: PyTree, is_tangent: bool = False) -> Callable:
    fold = _make_fold(_row_statistic(slot, x_ndims, y_ndims, is_tangent), num_stacks=0, axis=slot.axis)

    @jax.custom_jvp
    def observer(y, x, value, layer, marker, present):
        del x, value, layer
        # JAX forgets the rule below where it makes linear functions, and runs this instead of it; and nowhere else.
        if is_tangent:
            factor = 1 + _fail(jnp.zeros(()), *slot.axis.of_all(ExampleAxis.in_reverse))
            y = jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, y)
        return tie(y, (marker, present))  # mapped over the named axis, and over positions of which some are masked

    @functools.partial(observer.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (y, x, value, *others), (dy, dx, dvalue, *_) = primals, tangents
        if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(dvalue)):
            # Within the loss the model is differentiated: the tangent is one more use of the matrix, by each example,
            # though the first layer's is the same for all.
            dy, dx = tie((_instantiated(dy, y), _instantiated(dx, x)), y)
            again = _observer(slot, x_ndims, y_ndims, is_tangent=True)
            return observer(*primals), again(dy, dx, value, *others)

        def transpose(_, cotangents):
            dy, slots = cotangents
            statistic = on_automatic_axes(fold)(tie(value, slots), *others, x, dy)
            cotangent = jax.tree.map(lambda v, s: jnp.asarray(s, v.dtype), value, statistic)
            # Also what is constant, such as a count of rows, must be as mapped (or device-varying) as the slot is.
            return dy, tie(cotangent, value)

        # A linear function that passes `dy` on, with a transpose of its own: JAX has them as solvers, all of whose
        # inputs must be linear. `dy` gets the axes of `y`; of a bias alone, say, it is the same for all examples.
        dvalue = _instantiated(dvalue, value)
        zero = sum(jnp.sum(leaf.ravel()[:0]) for leaf in jax.tree.leaves(dvalue))
        given = tie(_instantiated(dy, y, zero), (y, *others[1:])), dvalue
        solution = jax.lax.custom_linear_solve(lambda b: b, given, lambda _, b: b, transpose)
        return tie(y, others[1:]), solution[0]

    return observer


def _instantiated(tangent: PyTree, like: PyTree, zero: ArrayLike = 0) -> PyTree:
    """Tangents as arrays, with this zero where they are zeros; of integers, in place of theirs, zeros."""
    return jax.tree.map(lambda t, x: jnp.full_like(x, zero) if isinstance(t, SymbolicZero) else t, tangent, like)


def _row_statistic(slot: Slot, x_ndims: PyTree, y_ndims: PyTree, is_tangent: bool) -> Callable:
    """The slot's statistic as a function of `x` and `dy` with all their row axes, the examples' first if known.

    JAX traces `fold` once without any axis, before it consults the rule. So an axis that is not what it should be is
    no error yet: it becomes one, in place of the statistic, if this is the computation that is run in the end.
    """
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), slot.value)
    axis, read = slot.axis, slot.statistic

    def statistic(seen: bool, layer, present, x, dy):
        weights, context, given = layer
        first, first_ndim = jax.tree.leaves(dy)[0], jax.tree.leaves(y_ndims)[0]
        rows = first.shape[: first.ndim - first_ndim]
        found = rows[0] if rows and (seen or axis.name is None) else None
        if axis.fault(found) is not None:
            zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
            # Every layer is first traced without some of its axes: results differ between devices as they will then.
            return _fails(tie(zeros, dy), first, *axis.of_all(lambda each: str(each.fault(found))))

        counts = None if present is None else present.reshape(rows[0], -1)
        examples = axis.of(found)
        weights = weights if weights is None or examples is None else weights[examples.start : examples.stop]

        def by_example(array, ndim):
            return array.reshape(rows[0], -1, *array.shape[array.ndim - ndim :])

        x, dy = jax.tree.map(by_example, x, x_ndims), jax.tree.map(by_example, dy, y_ndims)
        if counts is not None:
            x = jax.tree.map(lambda array: _replace_absent(array, counts), x)
            dy = jax.tree.map(lambda array: jnp.where(_like(counts, array), array, 0), dy)
        return tie(read(Use(x, dy, counts, weights, context, examples, is_tangent, given)), dy)

    return statistic


def _fails(statistic: ArrayTree, rows: ArrayTree, index: ArrayLike, faults: tuple[str, ...]) -> ArrayTree:
    """The statistic, whose computation fails if it is run, with one of several messages."""
    zero = _fail(jnp.ravel(jax.tree.leaves(rows)[0])[0], jnp.asarray(index), faults)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), statistic)


@functools.partial(jax.jit, static_argnums=2)  # costly to trace, and so for all layers together
def _fail(anything: Array, index: Counter, faults: tuple[str, ...]) -> Float[Array, ""]:
    always = (anything == anything) | (anything != anything)
    return eqx.branched_error_if(jnp.zeros(()), always, index, faults)


def _replace_absent(x: Array, present: Bool[Array, "n p"]) -> Array:
    """Rows of x that are present in the places of those that are not: harmless numbers for the layer at hand."""
    example, position = jnp.unravel_index(jnp.argmax(present), present.shape)
    return jnp.where(_like(present, x), x, jnp.where(jnp.any(present), x[example, position], jnp.zeros((), x.dtype)))


def _like(present: Bool[Array, "n p"], array: Array) -> Bool[Array, "n p ..."]:
    return present.reshape(*present.shape, *(1,) * (array.ndim - 2))


def _make_fold(
    statistic: Callable, num_stacks: int, axis: ExampleAxis, seen: bool = False, num_rows: int = 0
) -> Callable:
    """Builds `fold(value, layer, marker, present, x, dy)`, where `layer` is what else belongs to the layer.

    The operands have the axes `(*stacks, *rows, *one call)`, those of a layer itself without rows. `seen` says that
    the named example axis is among the rows, as the first of them.
    """

    @custom_vmap
    def fold(value, layer, marker, present, x, dy):
        del value, marker
        return statistic(seen, layer, present, x, dy)

    @fold.def_vmap
    def rule(size, mapped, value, layer, marker, present, x, dy):
        def broadcast(array, is_mapped):
            return array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))

        def one(array, is_mapped):
            return array[0] if is_mapped else array

        of_layer, layer_mapped, rows_mapped = (value, layer), tuple(mapped[:2]), tuple(mapped[3:])
        present, x, dy = jax.tree.map(broadcast, (present, x, dy), rows_mapped)
        is_stacked = any(jax.tree.leaves(mapped[0]))
        is_examples = axis.name is not None and not seen and any(jax.tree.leaves(mapped[2]))

        if is_stacked and not is_examples:
            # One layer for each element: one statistic for each element.
            value, layer = jax.tree.map(broadcast, of_layer, layer_mapped)

            def stacked(seen, *operands):
                return jax.vmap(functools.partial(statistic, seen))(*operands)

            fold = _make_fold(stacked, num_stacks + 1, axis, seen, num_rows)
            out = fold(value, layer, marker, present, x, dy)
            return out, jax.tree.map(lambda _: True, out)

        # One layer for all elements: the axis enumerates rows.
        if is_stacked:
            value, layer = jax.tree.map(one, of_layer, layer_mapped)
        position = num_stacks + (1 if seen else 0)
        present, x, dy = jax.tree.map(lambda array: jnp.moveaxis(array, 0, position), (present, x, dy))
        fold = _make_fold(statistic, num_stacks, axis, seen or is_examples, num_rows + 1)
        marker = None if is_examples else marker
        if not is_stacked:
            out = fold(value, layer, marker, present, x, dy)
            return out, jax.tree.map(lambda _: False, out)

        # A `cond` took the slot along. JAX will add up what is due to each example for which this branch was taken.
        rows = jax.tree.leaves(dy)[0].shape[: num_stacks + num_rows + 1]
        example = jax.lax.broadcasted_iota(int, rows, num_stacks)

        def due_to(index):
            only = example == index
            return fold(value, layer, marker, only if present is None else only & present, x, dy)

        out = jax.lax.map(due_to, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return fold
