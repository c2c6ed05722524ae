"""The preconditioner as a gradient transformation of optax."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from .._capture import Problem, split_key
from .._estimators import measured_across
from .._math.arguments import frozen_nodes, loss_function
from .._math.mesh import on_automatic_axes
from .._math.scalars import are_valid, nonnegative, number_or_schedule, positive, scheduled
from .._math.tree import all_finite, anywhere, combine, cond, dot, select, zeros_like
from .._math.types import Counter, Model, Parameters, PRNGKey, Scalar, Schedule, Where
from .base import AnyPreconditioner, check_preconditioner
from .damping import check_blind, DampingRule, own_damping, RelativeDamping, rule_of
from .eigenbasis_adam import EigenbasisAdam
from .objective import problem_with
from .preconditioner import Preconditioner
from .rescale import limit


class ScaleByCurvatureState(eqx.Module):
    """The state of [`kfax.scale_by_curvature`][].

    **Fields:**

    - `step`: how many updates were made.
    - `preconditioner`: a [`kfax.PreconditionerState`][] or a [`kfax.EigenbasisAdamState`][].
    """

    step: Counter
    preconditioner: Any


def scale_by_curvature(
    loss_fn: Callable,
    *,
    damping: ArrayLike | Schedule | DampingRule | RelativeDamping,
    preconditioner: Preconditioner | EigenbasisAdam | None = None,
    norm_constraint: ArrayLike | Schedule | None = None,
    frozen: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse curvature, $(\hat C + \lambda I)^{-1} \nabla h$: a link for `optax.chain`.

    For those who have a training loop with optax. Momentum, learning rate, weight decay, clipping and averages are the
    other links'. `update` takes, beside the gradients, what the curvature is taken of:

        updates, state = optim.update(gradients, state, params, model=model, batch=batch, key=key)

    with the tagged `model`, the `batch` as `loss_fn` takes it, and if needed `key` and `model_state`. It runs the model
    on the batch once more, forward and backward; a `preconditioner` with an update period or a part of the batch makes
    that cheaper. What only [`kfax.Optimizer`][] can do, since it looks at the loss: the quadratic model,
    Levenberg-Marquardt damping, rejection.

    If gradients are not finite, or what a schedule says is out of its range, the state stays as it was but for the
    counter, and the updates are zero. Statistics that are not finite are left out, and of inverses the last good one is
    kept, as in [`kfax.Optimizer`][]. Call [`kfax.check`][] once before training: this function cannot.

    **Arguments:**

    - `loss_fn`: as for [`kfax.Optimizer`][].
    - `damping`: λ, a number, a schedule or a [`kfax.RelativeDamping`][]. L2, if there is any, belongs in it.
        [loss/param²]
    - `preconditioner`: which curvature is inverted, and how often; [`kfax.Preconditioner`][]`()` if not given.
    - `norm_constraint`: κ: updates u are shortened so that `uᵀ(Ĉ + λI)u` is at most κ, a number or a schedule. With a
        learning rate α in a later link it bounds the step by α²κ. None if not given. As for
        [`kfax.NormConstraint`][], of an exponent of -1 and a fresh inverse. [loss]
    - `frozen`: as in [`kfax.tag`][]; what is frozen has updates of zero.

    **Returns:** an `optax.GradientTransformationExtraArgs`. Its `init` takes the parameters, as usual
    `equinox.filter(model, equinox.is_inexact_array)`.

    **Raises:** `ValueError` for values out of their range, and for a damping that would have to see the loss.
    """
    damping = own_damping(damping)
    check_blind("damping", rule_of(damping))
    if preconditioner is not None:
        check_preconditioner(preconditioner).check_settings(isinstance(damping, RelativeDamping), micro_batches=1)
    link = _Link(
        loss_fn=loss_function(loss_fn),
        damping=damping,
        preconditioner=Preconditioner() if preconditioner is None else preconditioner,
        bound=_bound(norm_constraint),
        frozen=frozen_nodes(frozen),
    )
    return optax.GradientTransformationExtraArgs(link.init, link.update)


# A batch may be anything, `None` included.
_NOT_GIVEN: Any = object()


class _Link(eqx.Module):
    """The two functions of the transformation."""

    loss_fn: Callable
    damping: DampingRule | RelativeDamping
    preconditioner: AnyPreconditioner
    bound: Scalar | Schedule | None
    frozen: Where | None

    @on_automatic_axes
    def init(self, params: Parameters) -> Any:
        parameters = Problem(self.loss_fn, params, None, frozen=self.frozen).parameters
        state = self.preconditioner.init(params, parameters, self.frozen)
        return ScaleByCurvatureState(jnp.zeros((), jnp.int32), state)

    @on_automatic_axes
    def update(
        self,
        updates: Parameters,
        state: Any,
        params: Parameters = None,
        *,
        model: Model = None,
        batch: Any = _NOT_GIVEN,
        key: PRNGKey | None = None,
        model_state: Any = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        del params, others
        if model is None or batch is _NOT_GIVEN:
            raise ValueError(
                "`kfax.scale_by_curvature` needs to see model and batch: call "
                "`optim.update(gradients, state, params, model=model, batch=batch)`."
            )
        loss_key, source_key = split_key(self.loss_fn, key)
        problem = Problem(self.loss_fn, model, batch, loss_key, model_state, self.frozen)
        if not isinstance(state, ScaleByCurvatureState):
            raise ValueError(f"`state` must be what `init` or `update` returned, got {type(state).__name__}.")
        parameters, step = problem.parameters, state.step
        gradient = _restrict(updates, parameters)
        number, bound = self._numbers(step)
        own = nonnegative("damping", self.preconditioner.damping.value(number, step))
        settings = (self.damping, self.preconditioner, self.bound, number, bound, own)
        is_good = all_finite(gradient) & are_valid(settings)
        preconditioner = self._take_in(problem, state, source_key, is_good)
        _, damping = self.preconditioner.dampings(self.damping, number, None, preconditioner, parameters, step)
        preconditioner, _ = self.preconditioner.maybe_refresh(preconditioner, parameters, damping, step)
        preconditioner, solved = self.preconditioner.apply(preconditioner, gradient, damping, is_good)
        if bound is not None:
            solved = combine((limit(jnp.ones(()), dot(gradient, solved), bound),), (solved,))
        solved = select(is_good & all_finite(solved), solved, zeros_like(gradient))
        return eqx.combine(solved, zeros_like(updates)), ScaleByCurvatureState(step + 1, preconditioner)

    def _numbers(self, step: Counter) -> tuple[Scalar, Scalar | None]:
        """What rule and schedules say for a step: λ, in the units of its rule, and the bound."""
        rule, bound = rule_of(self.damping), self.bound
        number = positive("damping", rule.value(rule.init(), step))
        return number, scheduled("norm_constraint", bound, step, positive) if callable(bound) else bound

    def _take_in(self, problem: Problem, state: ScaleByCurvatureState, key: PRNGKey | None, is_good: Any) -> Any:
        """The preconditioner's state with the statistics of the batch, if they are due."""
        preconditioner, estimator = self.preconditioner, self.preconditioner.estimator
        due = preconditioner.wants_curvature(state.preconditioner, state.step)
        if preconditioner.batch is not None:
            problem = problem_with(problem, preconditioner.part_of(problem.batch, state.step))

        def fold():
            linearization = estimator.linearize(problem, state.preconditioner.curvature)
            measured = measured_across(self.loss_fn, estimator.measure(linearization, key))
            return preconditioner.fold(state.preconditioner, measured, is_good & due)[0]

        return cond(due if due is True else anywhere(due), fold, lambda: state.preconditioner)


def _restrict(tree: Parameters, like: Parameters) -> Parameters:
    """The leaves of a PyTree where another one has leaves."""
    try:
        return jax.tree.map(lambda x, leaf: None if x is None else leaf, like, tree, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            "The gradients must be those of the tagged model that is given as `model=`, with its structure, as "
            "`equinox.filter_grad` of a function of it gives them: is one of the two not tagged?"
        ) from error


def _bound(value: Any) -> Scalar | Schedule | None:
    return None if value is None else number_or_schedule("norm_constraint", value, positive)
