"""The objective on one batch around the present parameters: its value, its gradient, its quadratic models."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._capture import Linearization, Problem
from .._math.tree import all_finite, combine, dot
from .._math.types import Counter, Parameters, PRNGKey, PyTree, Scalar
from .l2 import L2
from .passes import gradient_of, gram_of, loss_of
from .quadratic import PlaneModel, QuadraticModel


class Objective(eqx.Module):
    """The objective, with its L2 term, on one batch.

    **Fields:**

    - `problem`: model and batch.
    - `l2`, `mask`: the regularizer, and what it acts on.
    - `micro_batches`: in how many parts the batch is run.
    - `loss`, `gradient`: of the objective at the present parameters.
    - `model_state`, `aux`: what `loss_fn` returned.
    """

    problem: Problem
    l2: L2
    mask: PyTree
    micro_batches: int = eqx.field(static=True)
    loss: Scalar
    gradient: Parameters
    model_state: Any
    aux: Any

    @property
    def is_good(self) -> Bool[Array, ""]:
        """Whether all that the batch gave is finite; of the model state, what was finite before."""
        old, new = (eqx.filter(x, eqx.is_inexact_array) for x in (self.problem.model_state, self.model_state))
        state = jax.tree.map(lambda x, y: jnp.where(jnp.isfinite(x), y, 0), old, new)
        return all_finite((self.loss, self.gradient, state))

    def loss_at(self, parameters: Parameters) -> Scalar:
        """The objective elsewhere, on the same batch and with the same key."""
        loss = loss_of(self.problem, self.micro_batches, parameters)
        return loss + self.l2.value(self.mask, parameters)

    def plane(self, model: QuadraticModel, directions: tuple[Parameters, ...], step: Counter) -> PlaneModel:
        """The exact quadratic model, without damping, on the span of some directions."""
        problem, number = self.problem, self.micro_batches
        if model.batch is not None:
            problem = problem_with(problem, model.batch(problem.batch, step))
            number = 1
        gram = gram_of(problem, number, model.source, directions)
        regularized = tuple(self.l2.multiply(self.mask, v) for v in directions)
        slopes = jnp.stack([dot(self.gradient, v) for v in directions])
        return PlaneModel(gram + _table(directions, regularized), _table(directions, directions), slopes)

    def predict(self, multiply: Callable[[Parameters], Parameters], update: Parameters) -> Scalar:
        """The change that the quadratic model of a curvature, without damping, predicts for an update."""
        product = combine((1, 1), (multiply(update), self.l2.multiply(self.mask, update)))
        return dot(self.gradient, update) + dot(update, product) / 2


def objective_on(
    problem: Problem,
    l2: L2,
    micro_batches: int,
    key: PRNGKey | None,
    linearize: Callable[[Problem], Linearization],
    measure: Callable[[Linearization, PRNGKey | None, Any], Any],
    measured: Any,
) -> tuple[Objective, Any]:
    """Runs a batch forward and backward; for the arguments see `gradient_of`."""
    parameters = problem.parameters
    result, measured = gradient_of(problem, micro_batches, key, linearize, measure, measured)
    _check_model_state(problem.model_state, result.model_state)
    mask = l2.mask(problem.model, parameters)
    objective = Objective(
        problem=problem,
        l2=l2,
        mask=mask,
        micro_batches=micro_batches,
        loss=result.means["loss"] + l2.value(mask, parameters),
        gradient=combine((1, 1), (result.means["gradient"], l2.multiply(mask, parameters))),
        model_state=result.model_state,
        aux=result.aux,
    )
    return objective, measured


def _check_model_state(old: Any, new: Any) -> None:
    """A new state must be like the old one, for one of them is to be chosen."""

    def layout(state):
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        describe = lambda leaf: f"{leaf.dtype} of shape {leaf.shape}" if eqx.is_array(leaf) else repr(leaf)  # noqa: E731
        return structure, {jax.tree_util.keystr(path): describe(leaf) for path, leaf in leaves}

    (was, before), (now, after) = layout(old), layout(new)
    if was == now and before == after:
        return
    where = [path for path in before | after if before.get(path) != after.get(path)] or [""]
    raise ValueError(
        f"`loss_fn` returned a model state unlike the one it was given: at `model_state{where[0]}` there was "
        f"{before.get(where[0], was)}, and now {after.get(where[0], now)}. It must keep structure, shapes and dtypes, "
        "and what changes must be arrays: a `jnp.asarray(0)`, say, not a 0."
    )


def problem_with(problem: Problem, batch: Any) -> Problem:
    """The same problem with another batch."""
    return Problem(problem.loss_fn, problem.model, batch, problem.key, problem.model_state, problem.frozen)


def _table(left: tuple[Parameters, ...], right: tuple[Parameters, ...]) -> Float[Array, "k k"]:
    return jnp.stack([jnp.stack([dot(v, w) for w in right]) for v in left])
