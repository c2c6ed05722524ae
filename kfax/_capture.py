"""One linearization of the model, and what is pulled back through it: gradients, and the statistics of its layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._fold import ExampleAxis, Slot, Use
from ._layers import Borrowed, borrowed, fill_slots, Part, parts
from ._losses import Loss
from ._objective import evaluate, Evaluation
from ._operations import Operation
from ._registry import split_parameters, trainable
from ._tree import tie
from ._types import Model, Parameters, PRNGKey, Where


@dataclasses.dataclass(frozen=True)
class Reading:
    """What to read of one operation.

    **Fields:**

    - `zeros`: arrays of the shapes of what is read, with the stack axes of the layer.
    - `statistic`: `(operation, use)` to what is read of one use. Usually the operation is the part's own; of a
        parameter that is tied to another layer's, it is what that one does.
    - `is_sum`: whether it is a plain sum over rows.
    """

    zeros: PyTree[Array]
    statistic: Callable[[Operation, Use], PyTree[Array]]
    is_sum: bool


class Linearization(eqx.Module):
    """A model linearized at its parameters on one batch, ready to be differentiated backwards any number of times.

    **Fields:**

    - `evaluation`: the losses, and what else `loss_fn` returned.
    - `weights`: of the examples, divided by their mean; `None` if equal.
    - `pullback`: from cotangents of the losses' arrays to cotangents of the parameters and of the slots.
    """

    evaluation: Evaluation
    weights: Float[Array, " n"] | None
    pullback: Callable

    @property
    def losses(self) -> tuple[Loss, ...]:
        return self.evaluation.losses

    def gradient(self) -> Parameters:
        """The gradient of the summed losses in the parameters, also through targets and weights."""

        def value(losses):
            return Evaluation(losses, None, None).value()

        parameters, _ = self.pullback(eqx.filter_grad(value)(self.losses))
        return parameters

    def observe(self, cotangents: tuple[Float[Array, "n ..."], ...]) -> dict[str, Any]:
        """What the layers' readings are when the losses' outputs have these cotangents, by path."""
        return self.pullback(self._at_outputs(cotangents))[1]

    def pull(self, cotangents: tuple[Float[Array, "n ..."], ...]) -> tuple[Parameters, dict[str, Any]]:
        """The parameters' cotangent together with the readings."""
        return self.pullback(self._at_outputs(cotangents))

    def _at_outputs(self, cotangents):
        """Cotangents of all arrays of the losses, which are zero but for the outputs."""
        zeros = jax.tree.map(jnp.zeros_like, eqx.filter(self.losses, eqx.is_inexact_array))
        return eqx.tree_at(lambda losses: [loss.outputs for loss in losses], zeros, list(cotangents))


def linearize(
    loss_fn: Callable,
    model: Model,
    batch: Any,
    read: Callable[[Part, int], Reading],
    *,
    example_axis: str | None,
    frozen: Where | None,
    key: PRNGKey | None,
    model_state: Any,
) -> Linearization:
    """Runs the model forward with its slots filled.

    **Arguments:**

    - `loss_fn`, `model`, `batch`, `key`, `model_state`: see `evaluate`.
    - `read`: given an operation that has shapes in place of its trained parameters, and the number of examples, says
        what to read of it.
    - `example_axis`: the name of the axis that enumerates the examples, or `None` for the outermost one.
    - `frozen`: what is not trained.
    """
    parameters, rest = split_parameters(model, frozen)

    def call(parameters, slots):
        filled = fill_slots(eqx.combine(parameters, rest), slots)
        evaluation = evaluate(loss_fn, filled, batch, key=key, model_state=model_state)
        return evaluation.losses, (evaluation.model_state, evaluation.aux)

    # Shapes first: slots depend on the number of examples. The values of the weights too, where there are any;
    # what else this computes is not used and is left out under `jit`.
    def unobserved():
        return call(parameters, {})[0]

    shapes = eqx.filter_eval_shape(unobserved)
    num_examples = shapes[0].num_examples
    weights = None
    if any(loss.weighting.is_weighted for loss in shapes):
        weights = jax.lax.stop_gradient(_example_weights(unobserved()))

    external = (loss_fn, model, batch, key, model_state)
    loans: dict[str, list[Borrowed]] = {}
    for loan in borrowed(model, trainable(model, frozen)):
        loans.setdefault(loan.owner, []).append(loan)
    values, uses = {}, {}
    for part in parts(eqx.filter_eval_shape(lambda: parameters)).values():
        reading = read(part, num_examples)
        values[part.key] = tie(reading.zeros, external)
        make = functools.partial(_slot, part, reading, example_axis, num_examples, weights)
        uses.setdefault((part.path, part.name), []).append((part.key, make(part.path, part.operation)))
        for other in loans.get(part.key, ()):
            uses.setdefault((other.path, other.name), []).append((part.key, make(other.path, other.operation)))

    def observed(parameters, values):
        filled = {
            place: tuple(dataclasses.replace(slot, value=values[key]) for key, slot in slots)
            for place, slots in uses.items()
        }
        return call(parameters, filled)

    losses, pullback, (state, aux) = eqx.filter_vjp(observed, parameters, values, has_aux=True)
    return Linearization(Evaluation(losses, state, aux), weights, pullback)


def _slot(
    part: Part,
    reading: Reading,
    example_axis: str | None,
    num_examples: int,
    weights: Float[Array, " n"] | None,
    path: str,
    operation: Operation,
) -> Slot:
    """A slot, as yet without its value, for a use of a part by the layer at `path`."""

    def statistic(use):
        try:
            found = reading.statistic(operation, use)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{_observed(part, operation, use)} {error}") from error
        if [x.shape for x in jax.tree.leaves(found)] != [x.shape[len(stack) :] for x in expected]:
            raise ValueError(
                f"{_observed(part, operation, use)} These shapes do not fit. An operation is observed for one position "
                "at a time (map over positions by `jax.vmap`), output before input: `self.observe(y, x)`; and a layer "
                "that cannot tell its stack has to be tagged inside the function that is mapped."
            )
        return found

    stack, expected = part.operation.shape().stack, jax.tree.leaves(reading.zeros)
    stacked = None if weights is None else jnp.broadcast_to(weights, (*stack, num_examples))
    axis = ExampleAxis(example_axis, num_examples, reading.is_sum and weights is None, path)
    ndim = jax.tree.leaves(reading.zeros)[0].ndim - len(stack)
    return Slot(reading.zeros, stacked, statistic, axis, ndim)


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
