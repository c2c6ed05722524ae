"""The objective on one batch around the present parameters: its value, its gradient, its quadratic models."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._capture import Linearization, Problem
from .._math.tree import all_finite, inner_products
from .._math.types import Counter, Parameters, PRNGKey, PyTree, Scalar
from .l2 import L2
from .passes import gradient_of, gram_of, loss_of
from .quadratic import Plane, QuadraticModel


class Objective(eqx.Module):
    """The objective, with its L2 term, on one batch.

    **Fields:**

    - `problem`: model and batch.
    - `l2`, `mask`: the regularizer, and what it acts on.
    - `micro_batches`: in how many parts the batch is run.
    - `l2_value`: of the L2 term at the present parameters.
    - `loss`, `gradient`: of the objective at the present parameters.
    - `squared_norm`: of the gradient.
    - `is_finite`: whether the gradient is.
    - `model_state`, `aux`: what `loss_fn` returned.
    """

    problem: Problem
    l2: L2
    mask: PyTree
    micro_batches: int = eqx.field(static=True)
    l2_value: Scalar
    loss: Scalar
    gradient: Parameters
    squared_norm: Scalar
    is_finite: Bool[Array, ""]
    model_state: Any
    aux: Any

    @property
    def is_good(self) -> Bool[Array, ""]:
        """Whether all that the batch gave is finite; of the model state, what was finite before."""
        old, new = (eqx.filter(x, eqx.is_inexact_array) for x in (self.problem.model_state, self.model_state))
        state = jax.tree.map(lambda x, y: jnp.where(jnp.isfinite(x), y, 0), old, new)
        return self.is_finite & all_finite((self.loss, state))

    def loss_at(self, parameters: Parameters, l2_change: Scalar | None) -> Scalar:
        """The objective at other parameters, on the same batch, with the same key; given by how much L2 changes."""
        loss = loss_of(self.problem, self.micro_batches, parameters)
        if l2_change is not None:
            return loss + self.l2_value + l2_change
        return loss + self.l2.total(self.mask, inner_products((parameters,), [(0, 0)])[0])[0] / 2

    def plane(self, directions: tuple[Parameters, ...]) -> Plane:
        """All inner products of some directions with each other, the gradient and the parameters."""
        k = len(directions)
        vectors, columns = (*directions, self.gradient, self.problem.parameters), k + 1 + self.l2.is_active
        pairs = [(i, j) for i in range(k) for j in range(i, columns)]
        products, sizes = inner_products(vectors[:columns], pairs, measured=range(k))
        table = dict(zip(pairs, jnp.sum(products, axis=0), strict=True))
        regularized = dict(zip(pairs, self.l2.total(self.mask, products), strict=True))

        def square(table):
            return jnp.stack([jnp.stack([table[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])

        def column(table, j):
            return jnp.stack([table[i, j] for i in range(k)])

        return Plane(
            inner=square(table),
            slopes=column(table, k),
            l2=square(regularized),
            l2_slopes=column(regularized, columns - 1),
            sizes=jnp.max(sizes, axis=0),
            range=min(float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(self.problem.parameters)),
        )

    def gram(self, model: QuadraticModel, directions: tuple[Parameters, ...], step: Counter) -> Float[Array, "k k"]:
        """`vᵢᵀ C vⱼ` for some directions, of the exact curvature of the batch, without L2."""
        problem, number = self.problem, self.micro_batches
        if model.batch is not None:
            problem = problem_with(problem, model.batch(problem.batch, step))
            number = 1
        return gram_of(problem, number, model.source, directions)


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
    gradient = l2.add_gradient(mask, result.means["gradient"], parameters)
    vectors = (gradient, parameters)[: 1 + l2.is_active]
    products, sizes = inner_products(vectors, [(i, i) for i in range(len(vectors))], measured=[0])
    l2_value = l2.total(mask, products)[-1] / 2
    objective = Objective(
        problem=problem,
        l2=l2,
        mask=mask,
        micro_batches=micro_batches,
        l2_value=l2_value,
        loss=result.means["loss"] + l2_value,
        gradient=gradient,
        squared_norm=jnp.sum(products[:, 0]),
        is_finite=jnp.isfinite(jnp.max(sizes)),
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
