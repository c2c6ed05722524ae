"""Solves with the exact curvature of a whole data set, one pass over it for each iteration."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._estimators import (
    check_layout,
    check_source,
    CurvatureEstimator,
    CurvatureSource,
    ExactGGN,
    ImplicitExactCurvature,
    layout_of,
    total_weight,
    wide,
)
from .._math.mesh import on_automatic_axes
from .._math.moving_average import MovingAverage
from .._math.scalars import nonnegative
from .._math.tree import zeros_like
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .stacks import AT_ONCE, check_stack, dots, solve_each


class ConjugateGradientsState(eqx.Module):
    r"""Several systems $(C + \lambda I)\, x = v$ that are being solved. All vectors have a leading axis of q systems.

    **Fields:**

    - `solution`: x, so far.
    - `residual`: $v - (C + \lambda I)\, x$.
    - `direction`: p, along which x is going to change.
    - `product`: C p, the mean over the batches of this pass.
    - `decrement`: $r^\top M r$ of the residual r and the preconditioner M, `(q,)`.
    - `size`: the norms of v, `(q,)`.
    - `damping`: λ.
    - `preconditioner`: the state of the preconditioner.
    """

    solution: Parameters
    residual: Parameters
    direction: Parameters
    product: MovingAverage
    decrement: Float[Array, " q"]
    size: Float[Array, " q"]
    damping: Scalar
    preconditioner: Any

    @property
    def relative_residual(self) -> Float[Array, " q"]:
        """The norm of each residual, divided by that of v."""
        return jnp.sqrt(dots(self.residual, self.residual)) / jnp.where(self.size > 0, self.size, 1)


class ConjugateGradients(eqx.Module):
    r"""Solves $(C + \lambda I)\, x = v$ for several v at once, with the exact curvature C of a whole data set.

    C is never formed, and no batch is kept: each iteration is a pass over the data set, by `update` with one batch
    after another, and then a `step`. The loop is the caller's, and so is the decision when to stop. The state can be
    saved, and the solve resumed. Where all examples fit into one batch, [`kfax.ImplicitExactCurvature`][] does the same
    in one call, up to a tolerance.

    A batch costs, for each v, a pass forward and one backward. Memory: five vectors for each v, and the outputs of all
    layers on a batch for 32 of them at a time.

    ??? cite "Source"
        Martens 2010, "Deep learning via Hessian-free optimization", section 4.
    """

    source: CurvatureSource
    preconditioner: CurvatureEstimator | None

    def __init__(self, source: CurvatureSource = ExactGGN(), *, preconditioner: CurvatureEstimator | None = None):
        """**Arguments:**

        - `source`: which matrix: [`kfax.ExactGGN`][], [`kfax.ExactFisher`][] or [`kfax.EmpiricalFisher`][]. With one
            that draws random numbers, each batch needs the same key in each pass.
        - `preconditioner`: an estimator whose inverse is close to that of C + λI, such as
            [`kfax.BlockDiagonalCurvature`][]`(decay=1.0)`; none, if not given.

        **Raises:** `ValueError` for something else than that.
        """
        self.source = check_source(source)
        if not (preconditioner is None or isinstance(preconditioner, CurvatureEstimator)):
            raise ValueError(
                "`preconditioner` must be an estimator, such as `kfax.BlockDiagonalCurvature(decay=1.0)`, got "
                f"{preconditioner!r}."
            )
        self.preconditioner = preconditioner

    @on_automatic_axes
    def init(self, state: Any, vectors: Parameters, damping: ArrayLike) -> ConjugateGradientsState:
        """**Arguments:**

        - `state`: of the preconditioner, after a refresh; `None` if there is none.
        - `vectors`: v, a PyTree like the parameters with a leading axis, as of [`kfax.Influence`][]`.gradients`.
        - `damping`: λ. [loss/param²]

        **Returns:** the state before the first pass, with x = 0.

        **Raises:** `ValueError` for vectors without a leading axis, or a state where there is no preconditioner.
        """
        if (state is None) != (self.preconditioner is None):
            raise ValueError(
                "`state` must be that of the preconditioner, after a refresh, or `None` if there is none: "
                "`solver.init(state, vectors, damping)`."
            )
        check_stack("vectors", vectors)
        damping, residual = nonnegative("damping", damping), wide(vectors)
        direction = self._precondition(state, residual)
        return ConjugateGradientsState(
            solution=zeros_like(residual),
            residual=residual,
            direction=direction,
            product=MovingAverage.zeros(residual),
            decrement=dots(residual, direction),
            size=jnp.sqrt(dots(residual, residual)),
            damping=damping,
            preconditioner=state,
        )

    @on_automatic_axes
    def update(
        self,
        state: ConjugateGradientsState,
        loss_fn: Callable,
        model: Model,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        frozen: Where | None = None,
    ) -> ConjugateGradientsState:
        """Takes one batch into the products of this pass.

        **Arguments:** as for [`kfax.CurvatureEstimator`][]`.update`.

        **Returns:** the new state.
        """
        _check_state(state)
        exact = ImplicitExactCurvature(self.source)
        options = {"key": key, "model_state": model_state, "frozen": frozen}
        problem = exact.update(exact.init(model, frozen=frozen), loss_fn, model, batch, **options)
        check_layout(jax.tree.map(lambda v: v[0], state.direction), layout_of(problem.damping))
        multiply = exact.as_operator(problem, problem.damping).mv
        products = jax.lax.map(multiply, state.direction, batch_size=AT_ONCE)
        losses = problem.problem.evaluate(problem.problem.parameters).losses
        product = state.product.update(products, jnp.ones(()), total_weight(losses))
        return eqx.tree_at(lambda s: s.product, state, product)

    @on_automatic_axes
    def step(self, state: ConjugateGradientsState) -> ConjugateGradientsState:
        """One iteration, after a pass.

        **Arguments:**

        - `state`: after an update with each batch.

        **Returns:** the state for the next pass, with a better solution.

        **Raises:** an error, when run, if no batch was taken in since the last step.
        """
        _check_state(state)
        decrement = eqx.error_if(state.decrement, state.product.weight == 0, _NO_PASS)
        direction = state.direction
        product = jax.tree.map(lambda c, p: c + state.damping.astype(p.dtype) * p, state.product.value, direction)
        rate = _ratio(decrement, dots(direction, product))
        solution = _add(state.solution, rate, direction)
        residual = _add(state.residual, -rate, product)
        preconditioned = self._precondition(state.preconditioner, residual)
        new = dots(residual, preconditioned)
        return ConjugateGradientsState(
            solution=solution,
            residual=residual,
            direction=_add(preconditioned, _ratio(new, decrement), direction),
            product=MovingAverage.zeros(product),
            decrement=new,
            size=state.size,
            damping=state.damping,
            preconditioner=state.preconditioner,
        )

    def _precondition(self, state: Any, vectors: Parameters) -> Parameters:
        return vectors if self.preconditioner is None else solve_each(self.preconditioner, state, vectors)


_NO_PASS = (
    "`kfax.ConjugateGradients.step` needs a pass over the data set: `state = solver.update(state, loss_fn, model, "
    "batch)` for each batch, then `state = solver.step(state)`."
)


def _check_state(state: Any) -> None:
    if not isinstance(state, ConjugateGradientsState):
        raise ValueError(f"`state` must be that of the solver, as of its `init`, got {type(state).__name__}.")


def _ratio(numerator: Float[Array, " q"], denominator: Float[Array, " q"]) -> Float[Array, " q"]:
    """Zero of a system that is solved."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def _add(x: Parameters, rate: Float[Array, " q"], y: Parameters) -> Parameters:
    """`x + rate y`, with a rate for each system."""
    return jax.tree.map(lambda a, b: a + rate.reshape(-1, *(1,) * (a.ndim - 1)).astype(a.dtype) * b, x, y)
