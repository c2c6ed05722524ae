"""One linearization of the model, and what is pulled back through it: gradients, and the statistics of its layers."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._example_axis import ExampleAxis
from .._layers import Borrowed, borrowed, fill_slots, parameters_of, Part, parts, split_parameters, trainable
from .._losses import Loss
from .._math.arguments import frozen_nodes, loss_function, single_key
from .._math.tree import tie
from .._math.types import ArrayTree, Model, Parameters, PRNGKey, PyTree, Where
from .._operations import Operation
from .._slot import Slot, Use
from .across import on_each
from .evaluate import evaluate, Evaluation
from .uses import count_uses


Cotangents = tuple[Float[Array, "n ..."], ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What to read of one operation.

    **Fields:**

    - `zeros`: arrays of the shapes of what is read, with the stack axes of the layer.
    - `statistic`: `(operation, use)` to what is read of one use. Usually the operation is the part's own; of a
        parameter that is tied to another layer's, it is what that one does.
    - `is_sum`: whether it is a plain sum over rows.
    - `given`: what a `Use` hands to the statistic, with the stack axes of the layer.
    """

    zeros: ArrayTree
    statistic: Callable[[Operation, Use], ArrayTree]
    is_sum: bool
    given: ArrayTree = None


class Problem(eqx.Module):
    """A model with the batch to be run on, and the loss to be computed.

    **Fields:**

    - `loss_fn`, `model`, `batch`, `key`, `model_state`, `frozen`: as for `CurvatureEstimator.update`.
    """

    loss_fn: Callable
    model: Model
    batch: Any
    key: PRNGKey | None = None
    model_state: Any = None
    frozen: Where | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        loss_function(self.loss_fn)
        frozen_nodes(self.frozen)
        if self.key is not None:
            single_key(self.key)

    @property
    def parameters(self) -> Parameters:
        """What is trained of the model."""
        return parameters_of(self.model, frozen=self.frozen)

    def evaluate(self, parameters: Parameters, slots: Mapping[tuple[str, str], tuple[Slot, ...]] = {}) -> Evaluation:
        """Calls `loss_fn` on the model with other parameters, and with its slots filled."""
        rest = eqx.filter(self.model, trainable(self.model, self.frozen), inverse=True)
        filled = fill_slots(eqx.combine(parameters, rest), slots)
        return evaluate(self.loss_fn, filled, self.batch, key=self.key, model_state=self.model_state)


class Linearization(eqx.Module):
    """A model linearized at its parameters on one batch, ready to be differentiated backwards any number of times.

    **Fields:**

    - `problem`: what was run.
    - `evaluation`: the losses, and what else `loss_fn` returned.
    - `weights`: of the examples, divided by their mean; `None` if equal.
    - `pullback`: from cotangents of the arrays of losses and penalty to cotangents of the parameters and of the slots.
    - `given`: what the readings were given, by path.
    """

    problem: Problem
    evaluation: Evaluation
    weights: Float[Array, " n"] | None
    pullback: Callable
    given: dict[str, ArrayTree]

    @property
    def losses(self) -> tuple[Loss, ...]:
        return self.evaluation.losses

    def gradient(self) -> Parameters:
        """The gradient of the summed losses and penalties in the parameters, also through targets and weights."""
        return self.pullback(self.of_value())[0]

    def observe(self, cotangents: Cotangents) -> dict[str, Any]:
        """What the layers' readings are when the losses' outputs have these cotangents, by path."""
        return self.pullback(self.at_outputs(cotangents))[1]

    def of_value(self) -> PyTree:
        """Cotangents, for `pullback`, of the sum of losses and penalties."""

        def value(terms):
            losses, penalty = terms
            return Evaluation(losses, penalty, None, None).value()

        return eqx.filter_grad(value)((self.losses, self.evaluation.penalty))

    def at_outputs(self, cotangents: Cotangents) -> PyTree:
        """Cotangents, for `pullback`, which are zero but for those of the losses' outputs."""
        terms = (self.losses, self.evaluation.penalty)
        zeros = jax.tree.map(jnp.zeros_like, eqx.filter(terms, eqx.is_inexact_array))
        return eqx.tree_at(lambda terms: [loss.outputs for loss in terms[0]], zeros, list(cotangents))


class _Run:
    """Whether the model is being run forward."""

    def __init__(self):
        self.active = False

    def __enter__(self):
        self.active = True

    def __exit__(self, *_):
        self.active = False


def linearize(
    problem: Problem,
    read: Callable[[Part, int, bool], Reading] | None = None,
    *,
    example_axis: str | None = None,
    counts_uses: bool = False,
) -> Linearization:
    """Runs the model forward with its slots filled.

    **Arguments:**

    - `problem`: what to run.
    - `read`: given an operation that has shapes in place of its trained parameters, the number of examples, and whether
        the operation is known to be used once, says what to read of it. Without it slots stay empty.
    - `example_axis`: the name of the axis that enumerates the examples, or `None` for the outermost one.
    - `counts_uses`: whether to find out which are used once.
    """
    parameters = on_each(problem.loss_fn, problem.parameters)

    def call(parameters, slots):
        evaluation = problem.evaluate(parameters, slots)
        return (evaluation.losses, evaluation.penalty), (evaluation.model_state, evaluation.aux)

    # Shapes first: slots depend on the number of examples. The values of the weights too, where there are any;
    # what else this computes is not used and is left out under `jit`.
    def unobserved():
        return call(parameters, {})[0][0]

    if counts_uses:
        shapes, once = _used_once(problem, parameters, example_axis)
    else:
        shapes, once = eqx.filter_eval_shape(unobserved), frozenset()
    num_examples = shapes[0].num_examples
    sets = tuple(dict.fromkeys(loss.examples for loss in shapes))
    weights = None
    if any(loss.weighting.is_weighted for loss in shapes):
        weights = jax.lax.stop_gradient(_example_weights(unobserved()))

    run, values, uses, given = _Run(), {}, {}, {}
    if read is not None:
        make = functools.partial(_slot, example_axis, sets, weights, run)
        values, uses, given = _slots(problem, lambda part: read(part, num_examples, part.key in once), make)

    def observed(parameters, values):
        with run:
            return call(parameters, _filled(uses, values))

    with explained(_FORWARD):
        terms, pullback, (state, aux) = eqx.filter_vjp(observed, parameters, values, has_aux=True)
    return Linearization(problem, Evaluation(*terms, state, aux), weights, pullback, given)


def _used_once(
    problem: Problem, parameters: Parameters, example_axis: str | None
) -> tuple[tuple[Loss, ...], frozenset[str]]:
    """The losses, with shapes in place of arrays, and which operations are known to be used once at most."""

    def read(part):
        return Reading(jnp.zeros(part.operation.shape().stack), lambda operation, use: use, is_sum=True)

    run = _Run()
    values, uses, _ = _slots(problem, read, functools.partial(_slot, example_axis, (range(0),), None, run))

    def losses(values):
        with run:
            return problem.evaluate(parameters, _filled(uses, values)).losses

    program, arrays, others = eqx.filter_make_jaxpr(losses)(values)
    counts = count_uses(program, range(len(values)))
    once = frozenset(key for key, count in zip(sorted(values), counts, strict=True) if count <= 1)
    return eqx.combine(arrays, others), once


_OUT_OF_SIGHT = (
    "is called by a `jax.custom_vjp` function, as in a reversible network, or by `diffrax.BacksolveAdjoint`: its "
    "derivative is then another function's, where it cannot be observed. Leave the derivative to JAX (in diffrax to "
    "the default adjoint), or wrap the module around that function in `kfax.TaggedModule`."
)

# By what JAX says of it: of a slot that is not an argument.
_FORWARD = {
    "closed-over value": f"A tagged layer {_OUT_OF_SIGHT}",
}


@contextlib.contextmanager
def explained(explanations: Mapping[str, str]) -> Iterator[None]:
    """Replaces what JAX cannot say of kfax's use of it; should JAX's wording change, its own error is seen."""
    try:
        yield
    except Exception as error:
        for words, explanation in explanations.items():
            if words in str(error):
                raise ValueError(explanation) from error
        raise


def _slots(
    problem: Problem,
    read: Callable[[Part], Reading],
    make: Callable[[Part, Reading, str, tuple[str, ...], Operation], Slot],
) -> tuple[dict[str, ArrayTree], dict[tuple[str, str], list[tuple[str, Slot]]], dict[str, ArrayTree]]:
    """The slots by value and by place in the model, there with the parts that they belong to; and what is given."""
    model, frozen = problem.model, problem.frozen
    split_parameters(model, frozen)  # every parameter needs a block
    loans: dict[str, list[Borrowed]] = {}
    for loan in borrowed(model, trainable(model, frozen)):
        loans.setdefault(loan.owner, []).append(loan)
    values, uses = {}, {}
    found = parts(eqx.filter_eval_shape(lambda: problem.parameters)).values()
    readings = {part.key: read(part) for part in found}
    given = {key: reading.given for key, reading in readings.items()}
    anchor = tie(jnp.zeros((), bool), (problem, given))  # one for all, since a problem has as many arrays as layers
    places = {part.key: (part, *loans.get(part.key, ())) for part in found}
    paths = tuple(dict.fromkeys(place.path for several in places.values() for place in several))
    for part in found:
        # What is given is as mapped, and as device-varying, as the slot's value.
        reading = dataclasses.replace(readings[part.key], given=tie(given[part.key], anchor))
        values[part.key] = tie(reading.zeros, anchor)
        for place in places[part.key]:
            slot = make(part, reading, place.path, paths, place.operation)
            uses.setdefault((place.path, place.name), []).append((part.key, slot))
    return values, uses, given


def _filled(
    uses: Mapping[tuple[str, str], list[tuple[str, Slot]]], values: Mapping[str, ArrayTree]
) -> dict[tuple[str, str], tuple[Slot, ...]]:
    """The slots with their values."""
    return {
        place: tuple(dataclasses.replace(slot, value=values[key]) for key, slot in slots)
        for place, slots in uses.items()
    }


def _slot(
    example_axis: str | None,
    sets: tuple[range, ...],
    weights: Float[Array, " n"] | None,
    run: _Run,
    part: Part,
    reading: Reading,
    path: str,
    paths: tuple[str, ...],
    operation: Operation,
) -> Slot:
    """A slot, as yet without its value, for a use of a part by the layer at `path`, one of several `paths`."""

    def statistic(use):
        try:
            mine = operation.of_tangents() if use.is_tangent else operation
            if mine is None:
                return jax.tree.unflatten(structure, [jnp.zeros(x.shape, x.dtype) for x in expected])
            found = _among_all(reading.statistic(mine, use), use.examples, expected)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{_observed(part, operation, use)} {error}") from error
        if [x.shape for x in jax.tree.leaves(found)] != [x.shape for x in expected]:
            raise ValueError(
                f"{_observed(part, operation, use)} These shapes do not fit. An operation is observed for one position "
                "at a time (map over positions by `jax.vmap`), output before input: `self.observe(y, x)`; and a layer "
                "that cannot tell its stack has to be tagged inside the function that is mapped."
            )
        return found

    def on_forward():
        if not run.active:  # a forward pass within the backward pass
            raise ValueError(f"The layer at `{path}` {_OUT_OF_SIGHT}")

    stack = part.operation.shape().stack
    arrays, structure = jax.tree.flatten(reading.zeros)
    expected = [jax.ShapeDtypeStruct(x.shape[len(stack) :], x.dtype) for x in arrays]
    stacked = None if weights is None else jnp.broadcast_to(weights, (*stack, len(weights)))
    axis = ExampleAxis(example_axis, sets, reading.is_sum and weights is None, path, paths)
    return Slot(reading.zeros, stacked, statistic, axis, expected[0].ndim, on_forward, given=reading.given)


def _among_all(found: ArrayTree, examples: range | None, expected: list[jax.ShapeDtypeStruct]) -> ArrayTree:
    """What was read of some examples, with zeros for the others along axes that are as long as there are examples."""
    leaves, structure = jax.tree.flatten(found)
    if examples is None or [leaf.ndim for leaf in leaves] != [len(like.shape) for like in expected]:
        return found

    def spread(leaf, like):
        is_axis = [size == len(examples) < total for size, total in zip(leaf.shape, like.shape, strict=True)]
        if not any(is_axis):
            return leaf
        after = like.shape[is_axis.index(True)] - examples.stop
        return jnp.pad(leaf, [(examples.start, after) if each else (0, 0) for each in is_axis])

    return jax.tree.unflatten(structure, [spread(*pair) for pair in zip(leaves, expected, strict=True)])


def _observed(part: Part, operation: Operation, use: Use) -> str:
    """What was observed where, for messages."""
    x, dy = ([leaf.shape[2:] for leaf in jax.tree.leaves(tree)] for tree in (use.x, use.dy))
    return (
        f"The layer at `{part.path}` cannot be estimated. It observed inputs of shape {x} and outputs of shape {dy} "
        f"in one call, of {type(operation).__name__} with V of {part.operation.shape()}."
    )


def _example_weights(losses: tuple[Loss, ...]) -> Float[Array, " n"]:
    """The weights with which examples count in the layers' inputs: the mean over all losses."""
    ones = jnp.ones(losses[0].num_examples)
    weights = [loss.example_weights() for loss in losses]
    return jnp.mean(jnp.stack([ones if w is None else w for w in weights]), axis=0)
