"""How a step is chosen, and what becomes of it: coefficients, damping, rejection."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._math.scalars import scheduled
from .._math.tree import all_finite, combine, cond, dot, norm, select, zeros_like
from .._math.types import Counter, Parameters, Scalar, Schedule
from .damping import DampingRule, LevenbergMarquardt, RelativeDamping, rule_of
from .preconditioner import Preconditioner, PreconditionerState
from .present import Present
from .quadratic import QuadraticModel
from .rescale import NormConstraint, Rejection
from .state import layer_norms, OptimizerState, StepInfo, StepResult


Coefficient = Scalar | Schedule | QuadraticModel | NormConstraint


class Given(eqx.Module):
    """What is given to a single step, in place of what the optimizer would choose."""

    learning_rate: Scalar | None = None
    momentum: Scalar | None = None
    damping: Scalar | None = None


class Attempt(eqx.Module):
    """A step that is proposed.

    **Fields:**

    - `parameters`: after the step.
    - `update`: of the parameters.
    - `descent`: the preconditioned gradient, downwards.
    - `coefficients`: learning rate and momentum.
    - `preconditioner`: its state, refreshed if that was due.
    - `failed`: whether an inverse failed, or there is none yet.
    - `is_given`: whether another one was taken.
    - `damping`: λ.
    - `is_measured`: whether the following are known.
    - `change`: of the objective, as predicted; may be known in any case.
    - `after`: the objective after the step.
    - `ratio`: of the actual change to the predicted one.
    """

    parameters: Parameters
    update: Parameters
    descent: Parameters
    coefficients: tuple[Scalar, Scalar]
    preconditioner: PreconditionerState
    failed: Bool[Array, ""]
    is_given: bool = eqx.field(static=True)
    damping: Scalar
    is_measured: Bool[Array, ""]
    change: Scalar
    after: Scalar
    ratio: Scalar


class Rules(eqx.Module):
    """How the optimizer chooses a step, and whether it takes it."""

    learning_rate: Coefficient
    momentum: Coefficient
    damping: DampingRule | RelativeDamping
    preconditioner: Preconditioner
    rejection: Rejection | None

    @property
    def rule(self) -> DampingRule:
        """That of the damping, in its own units."""
        return rule_of(self.damping)

    def dampings(
        self, state: OptimizerState, parameters: Parameters, l2: Scalar | dict[str, Scalar], number: Scalar | None
    ) -> tuple[Scalar, Scalar | dict[str, Scalar]]:
        """λ, from what the rule says or the given number; and what is to be added to the preconditioner's curvature."""
        number = self.rule.value(state.damping, state.step) if number is None else number
        damping, own = self.preconditioner.dampings(self.damping, number, state.preconditioner, parameters, state.step)
        return damping, {key: own + eta for key, eta in l2.items()} if isinstance(l2, dict) else own + l2

    def attempt(self, present: Present, state: OptimizerState, given: Given, is_measured: bool) -> Attempt:
        """**Arguments:**

        - `present`: the objective.
        - `state`: with the batch in its estimate of the curvature.
        - `given`: what is not to be chosen.
        - `is_measured`: whether to evaluate the objective after the step, also if the damping rule does not ask for it.
        """
        parameters = present.problem.parameters
        l2 = present.l2.damping(present.mask, parameters)
        damping, damped = self.dampings(state, parameters, l2, given.damping)
        preconditioner, failed = self.preconditioner.maybe_refresh(state.preconditioner, parameters, damped, state.step)
        descent = combine((-1,), (self.preconditioner.apply(preconditioner, present.gradient, damped),))
        directions = (descent, state.velocity)
        coefficients, predicted = self._coefficients(present, given, damping, directions, state.step)
        update = combine(coefficients, directions)
        new = combine((1, 1), (parameters, update))
        dtype = present.loss.dtype
        unknown = jnp.full((), jnp.nan, dtype)

        def measure():
            change = self._predict(present, preconditioner, update, state.step) if predicted is None else predicted
            return change.astype(dtype), present.loss_at(new).astype(dtype)

        def do_not_measure():
            return unknown if predicted is None else predicted.astype(dtype), unknown

        wanted = is_measured or self.rule.wants_ratio(state.step)
        change, after = do_not_measure() if wanted is False else cond(wanted, measure, do_not_measure)
        if isinstance(self.rule, LevenbergMarquardt) and self.rule.includes_damping:
            change += (damping * dot(update, update) / 2).astype(dtype)
        return Attempt(
            parameters=new,
            update=update,
            descent=descent,
            coefficients=coefficients,
            preconditioner=preconditioner,
            failed=failed | _is_stuck(present.gradient, descent),
            is_given=given.damping is not None,
            damping=damping,
            is_measured=jnp.asarray(wanted),
            change=change,
            after=after,
            ratio=(after - present.loss) / change,
        )

    def adjusted(
        self, stored: Scalar, attempt: Attempt, wanted: Bool[Array, ""] | bool, undone: Bool[Array, ""]
    ) -> Scalar:
        """What the damping rule stores after a step, if it is wanted; and after one that is undone in any case."""
        if attempt.is_given:
            return stored
        # Where no decrease was predicted the ratio says nothing.
        tells = undone | (wanted & ~(attempt.change >= 0))
        new = self.rule.update(stored, jnp.where(undone, jnp.nan, attempt.ratio))
        return jnp.where(tells, new, stored)

    def conclude(
        self,
        present: Present,
        state: OptimizerState,
        attempt: Attempt,
        bad_curvature: Bool[Array, ""],
        report_layers: bool,
    ) -> tuple[Parameters, OptimizerState, StepInfo]:
        """Takes the proposed step if it is good; parameters, state and report after it."""
        is_good, is_finite = present.is_good, all_finite(attempt.parameters)
        accept = jnp.isfinite if self.rejection is None else self.rejection.accepts(present.loss)
        is_bad_step = attempt.is_measured & ~accept(attempt.after)
        accepted = is_good & is_finite & ~is_bad_step
        undone = is_good & ~accepted
        # A velocity that led nowhere, and not for the first time, is what may have to go.
        again = ~is_finite | state.was_undone | (self.rejection is None)
        stay = select(undone & again, zeros_like(state.velocity), state.velocity)
        stale = attempt.preconditioner.is_stale | undone
        adjusted = self.adjusted(state.damping, attempt, self.rule.wants_ratio(state.step), undone)
        new_state = OptimizerState(
            step=state.step + 1,
            damping=jnp.where(is_good, adjusted, state.damping),
            velocity=select(accepted, attempt.update, stay),
            preconditioner=eqx.tree_at(lambda p: p.is_stale, attempt.preconditioner, stale),
            was_undone=jnp.where(is_good, undone, state.was_undone),
        )
        applied = select(accepted, attempt.update, zeros_like(attempt.update))
        vectors = (present.problem.parameters, present.gradient, attempt.descent, applied)
        return (
            select(accepted, attempt.parameters, present.problem.parameters),
            new_state,
            StepInfo(
                step=state.step,
                result=_first(
                    (~is_good, StepResult.non_finite_batch),
                    (~is_finite, StepResult.non_finite_update),
                    (is_bad_step, StepResult.rejected),
                    (attempt.failed, StepResult.non_finite_inverse),
                    (bad_curvature, StepResult.non_finite_curvature),
                ),
                loss=present.loss,
                gradient_norm=norm(present.gradient),
                update_norm=norm(applied),
                learning_rate=attempt.coefficients[0],
                momentum=attempt.coefficients[1],
                damping=attempt.damping,
                predicted_change=attempt.change,
                reduction_ratio=attempt.ratio,
                layers=layer_norms(*vectors) if report_layers else None,
                model_state=_keep(accepted, present.model_state, present.problem.model_state),
                aux=present.aux,
            ),
        )

    def _coefficients(
        self,
        present: Present,
        given: Given,
        damping: Scalar,
        directions: tuple[Parameters, Parameters],
        step: Counter,
    ) -> tuple[tuple[Scalar, Scalar], Scalar | None]:
        """Learning rate and momentum, and the change that the exact quadratic model predicts if it was asked."""
        learning_rate = _choose("learning_rate", self.learning_rate, given.learning_rate, step)
        momentum = _choose("momentum", self.momentum, given.momentum, step)
        if learning_rate is not None and isinstance(self.learning_rate, NormConstraint):
            squared_norm = -dot(present.gradient, directions[0])
            learning_rate = self.learning_rate.limit(learning_rate, squared_norm, step)
        if learning_rate is not None and momentum is not None:
            return (learning_rate, momentum), None
        plane = present.plane(self._model, directions, step)
        coefficients = plane.minimize(damping, learning_rate, momentum)
        return coefficients, plane.change(jnp.stack(coefficients))

    @property
    def _model(self) -> QuadraticModel:
        return next(each for each in (self.learning_rate, self.momentum) if isinstance(each, QuadraticModel))

    def _predict(
        self, present: Present, preconditioner: PreconditionerState, update: Parameters, step: Counter
    ) -> Scalar:
        """The change that a quadratic model predicts where no coefficient was chosen by one."""
        if isinstance(self.rule, LevenbergMarquardt) and self.rule.exact_model is not None:
            return present.plane(QuadraticModel(self.rule.exact_model), (update,), step).change(jnp.ones(1))
        estimator = self.preconditioner.estimator
        return present.predict(lambda v: estimator.multiply(preconditioner.curvature, v), update)


def _choose(name: str, coefficient: Coefficient, given: Scalar | None, step: Counter) -> Scalar | None:
    """The coefficient's value in this step; `None` if the quadratic model is to choose it."""
    if given is not None:
        return given
    if isinstance(coefficient, NormConstraint):
        coefficient = coefficient.learning_rate
    if isinstance(coefficient, QuadraticModel):
        return None
    if callable(coefficient):
        return scheduled(name, coefficient, step)
    return coefficient


def _is_stuck(gradient: Parameters, descent: Parameters) -> Bool[Array, ""]:
    """Whether there is no inverse yet."""
    return (dot(descent, descent) == 0) & (dot(gradient, gradient) > 0)


def _first(*cases: tuple[Bool[Array, ""], StepResult]) -> StepResult:
    """The result of the first condition that holds."""
    result = StepResult.successful
    for condition, reason in reversed(cases):
        result = StepResult.where(condition, reason, result)
    return result


def _keep(accepted: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new model state if the step was taken; there may be none."""
    return new if new is None else select(accepted, new, old)
