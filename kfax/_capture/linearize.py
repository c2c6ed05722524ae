"""One linearization of the model, and what is pulled back through it: gradients, and the statistics of its layers."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float

from .._layers import Borrowed, borrowed, fill_slots, parameters_of, Part, parts, split_parameters, trainable
from .._losses import Loss
from .._math.tree import is_traced, tie
from .._math.types import ArrayTree, Model, Parameters, PRNGKey, PyTree, Where
from .._operations import Operation
from .._slot import ExampleAxis, Slot, Use
from .across import on_each
from .evaluate import evaluate, Evaluation


Cotangents = tuple[Float[Array, "n ..."], ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What to read of one operation.

    **Fields:**

    - `zeros`: arrays of the shapes of what is read, with the stack axes of the layer.
    - `statistic`: `(operation, use)` to what is read of one use. Usually the operation is the part's own; of a
        parameter that is tied to another layer's, it is what that one does.
    - `is_sum`: whether it is a plain sum over rows.
    - `operand`: arrays that `statistic` finds in the use, with the stack axes of the layer; or `None`.
    """

    zeros: ArrayTree
    statistic: Callable[[Operation, Use], ArrayTree]
    is_sum: bool
    operand: ArrayTree = None


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
    """

    problem: Problem
    evaluation: Evaluation
    weights: Float[Array, " n"] | None
    pullback: Callable

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


class Outputs(eqx.Module):
    """A model linearized at its parameters on one batch, from parameters to the losses' outputs.

    **Fields:**

    - `losses`: of the batch.
    - `pull`: `u -> Jᵀu`.
    - `push`: `v -> Jv`.
    """

    losses: tuple[Loss, ...]
    pull: Callable[[Cotangents], Parameters]
    push: Callable[[Parameters], Cotangents]


def linearize_outputs(problem: Problem) -> Outputs:
    """Runs the model forward with empty slots.

    Both directions come from one linearization: the backward one is the transpose of the forward one. Of a model that
    has no forward mode, such as one with a `jax.custom_vjp` function, it is the other way around.
    """
    parameters, rest = on_each(problem.loss_fn, problem.parameters), []

    def outputs(parameters):
        losses = problem.evaluate(parameters).losses
        arrays, others = eqx.partition(losses, eqx.is_array)
        rest.append(others)
        return tuple(loss.outputs for loss in losses), arrays

    pull, push, arrays = _forwards(outputs, parameters) or _backwards(outputs, parameters)

    def explained(vector):
        with _explained(_PUSH):
            return push(on_each(problem.loss_fn, vector))

    # In a compiled program it is traced once for several vectors; outside of one it would be compiled for each batch.
    explained = jax.jit(explained) if is_traced(problem) else explained
    return Outputs(eqx.combine(arrays, rest[-1]), pull, explained)


def _forwards(outputs: Callable, parameters: Parameters) -> tuple[Callable, Callable, PyTree] | None:
    """Both directions, and what else is returned, by forward mode; `None` if there is none."""
    try:
        _, push, arrays = jax.linearize(outputs, parameters, has_aux=True)
        has_rule = _mentions("custom_lin", jax.make_jaxpr(push)(parameters).jaxpr)
    except Exception as error:
        if any(words in str(error) for words in _WITHOUT_FORWARD_MODE):
            return None
        raise
    return None if has_rule else (lambda u: jax.linear_transpose(push, parameters)(u)[0], push, arrays)


def _backwards(outputs: Callable, parameters: Parameters) -> tuple[Callable, Callable, PyTree]:
    """The same by reverse mode, and by the transpose of its backward pass."""
    values, backward, arrays = jax.vjp(outputs, parameters, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, values)
    pull = lambda u: backward(u)[0]  # noqa: E731
    return pull, lambda v: jax.vjp(pull, zeros)[1](v)[0], arrays


def _mentions(name: str, jaxpr: Jaxpr) -> bool:
    """Whether a primitive is somewhere in a program: what stands for a rule of reverse mode is an error only if run."""
    inner = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=_is_program)
    programs = [getattr(each, "jaxpr", each) for each in inner if _is_program(each)]
    return any(eqn.primitive.name == name for eqn in jaxpr.eqns) or any(_mentions(name, each) for each in programs)


def _is_program(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


class _Run:
    """Whether the model is being run forward."""

    def __init__(self):
        self.active = False

    def __enter__(self):
        self.active = True

    def __exit__(self, *_):
        self.active = False


def linearize(
    problem: Problem, read: Callable[[Part, int], Reading] | None = None, *, example_axis: str | None = None
) -> Linearization:
    """Runs the model forward with its slots filled.

    **Arguments:**

    - `problem`: what to run.
    - `read`: given an operation that has shapes in place of its trained parameters, and the number of examples, says
        what to read of it. Without it slots stay empty.
    - `example_axis`: the name of the axis that enumerates the examples, or `None` for the outermost one.
    """
    parameters = on_each(problem.loss_fn, problem.parameters)

    def call(parameters, slots):
        evaluation = problem.evaluate(parameters, slots)
        return (evaluation.losses, evaluation.penalty), (evaluation.model_state, evaluation.aux)

    # Shapes first: slots depend on the number of examples. The values of the weights too, where there are any;
    # what else this computes is not used and is left out under `jit`.
    def unobserved():
        return call(parameters, {})[0][0]

    shapes = eqx.filter_eval_shape(unobserved)
    num_examples = shapes[0].num_examples
    weights = None
    if any(loss.weighting.is_weighted for loss in shapes):
        weights = jax.lax.stop_gradient(_example_weights(unobserved()))

    run, values, uses = _Run(), {}, {}
    if read is not None:
        make = functools.partial(_slot, example_axis, num_examples, weights, run)
        values, uses = _slots(problem, lambda part: read(part, num_examples), make)

    def observed(parameters, values):
        filled = {
            place: tuple(dataclasses.replace(slot, value=values[key]) for key, slot in slots)
            for place, slots in uses.items()
        }
        with run:
            return call(parameters, filled)

    with _explained(_FORWARD):
        terms, pullback, (state, aux) = eqx.filter_vjp(observed, parameters, values, has_aux=True)
    return Linearization(problem, Evaluation(*terms, state, aux), weights, pullback)


_OUT_OF_SIGHT = (
    "is called by a `jax.custom_vjp` function, as in a reversible network, or by `diffrax.BacksolveAdjoint`: its "
    "derivative is then another function's, where it cannot be observed. Leave the derivative to JAX (in diffrax to "
    "the default adjoint), or wrap the module around that function in `kfax.TaggedModule`."
)
_ONLY_BACKWARD = (
    "Products with the Jacobian, which `kfax.QuadraticModel`, `kfax.full_batch` and the exact estimators need, cannot "
    "be had of this model: its backward pass has a `while_loop` (that of diffrax's default adjoint has). Give the "
    "solver another adjoint, such as `diffrax.DirectAdjoint()`, or choose learning rate and momentum by numbers or "
    "schedules, as `kfax.stochastic` does."
)

# By what JAX says of it: of forward mode through a function without, and of a slot that is not an argument.
_WITHOUT_FORWARD_MODE = ("forward-mode", "custom_lin", "call_hi_primitive")
_FORWARD = {
    "closed-over value": f"A tagged layer {_OUT_OF_SIGHT}",
}
_PUSH = {"while_loop": _ONLY_BACKWARD}


@contextlib.contextmanager
def _explained(explanations: Mapping[str, str]) -> Iterator[None]:
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
) -> tuple[dict[str, ArrayTree], dict[tuple[str, str], list[tuple[str, Slot]]]]:
    """The slots' values by part, and for each place in the model its slots, with the parts that they belong to."""
    model, frozen = problem.model, problem.frozen
    split_parameters(model, frozen)  # every parameter needs a block
    loans: dict[str, list[Borrowed]] = {}
    for loan in borrowed(model, trainable(model, frozen)):
        loans.setdefault(loan.owner, []).append(loan)
    values, uses = {}, {}
    anchor = tie(jnp.zeros((), bool), problem)  # one for all, since a problem has as many arrays as layers
    found = parts(eqx.filter_eval_shape(lambda: problem.parameters)).values()
    places = {part.key: (part, *loans.get(part.key, ())) for part in found}
    paths = tuple(dict.fromkeys(place.path for several in places.values() for place in several))
    for part in found:
        reading = read(part)
        values[part.key] = tie(reading.zeros, (anchor, reading.operand))
        for place in places[part.key]:
            slot = make(part, reading, place.path, paths, place.operation)
            uses.setdefault((place.path, place.name), []).append((part.key, slot))
    return values, uses


def _slot(
    example_axis: str | None,
    num_examples: int,
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
                return jax.tree.map(lambda x: jnp.zeros(x.shape[len(stack) :], x.dtype), reading.zeros)
            found = reading.statistic(mine, use)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{_observed(part, operation, use)} {error}") from error
        if [x.shape for x in jax.tree.leaves(found)] != [x.shape[len(stack) :] for x in expected]:
            raise ValueError(
                f"{_observed(part, operation, use)} These shapes do not fit. An operation is observed for one position "
                "at a time (map over positions by `jax.vmap`), output before input: `self.observe(y, x)`; and a layer "
                "that cannot tell its stack has to be tagged inside the function that is mapped."
            )
        return found

    def on_forward():
        if not run.active:  # a forward pass within the backward pass
            raise ValueError(f"The layer at `{path}` {_OUT_OF_SIGHT}")

    stack, expected = part.operation.shape().stack, jax.tree.leaves(reading.zeros)
    stacked = None if weights is None else jnp.broadcast_to(weights, (*stack, num_examples))
    axis = ExampleAxis(example_axis, num_examples, reading.is_sum and weights is None, path, paths)
    ndim = jax.tree.leaves(reading.zeros)[0].ndim - len(stack)
    return Slot(reading.zeros, stacked, statistic, axis, ndim, on_forward, reading.operand)


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
