"""How a step is chosen, and what becomes of it: coefficients, damping, rejection."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._math.linalg import matmul
from .._math.moving_average import MovingAverage
from .._math.scalars import are_valid, nonnegative, positive, scheduled, within_closed_unit
from .._math.tree import combine, cond, finite_or_zero, inner_products, select
from .._math.types import Counter, Parameters, Scalar, Schedule
from .base import AnyPreconditioner
from .damping import DampingRule, LevenbergMarquardt, RelativeDamping, rule_of
from .l2 import L2
from .objective import Objective
from .quadratic import Plane, QuadraticModel
from .rescale import limit, LossConstraint, NormConstraint, ProjectedMomentum, Rejection
from .state import layer_norms, OptimizerState, StepInfo, StepResult
from .weight_decay import WeightDecay


Coefficient = Scalar | Schedule | QuadraticModel | NormConstraint | LossConstraint | ProjectedMomentum


class Overrides(eqx.Module):
    """What is given to a single step, in place of what the optimizer would choose."""

    learning_rate: Scalar | None = None
    momentum: Scalar | None = None
    damping: Scalar | None = None


class Settings(eqx.Module):
    """The numbers that are given for a step: to it alone, to the optimizer, or by schedules and rules.

    **Fields:**

    - `learning_rate`, `momentum`: `None` if the quadratic model is to choose them.
    - `bound`: of the norm, if there is one.
    - `damping`: λ, in the units of its rule.
    - `is_overridden`: whether it is none that the rule chose.
    - `are_valid`: whether all of them, and those that rules and estimator hold, are within their ranges.
    """

    learning_rate: Scalar | None
    momentum: Scalar | None
    bound: Scalar | None
    damping: Scalar
    is_overridden: bool = eqx.field(static=True)
    are_valid: Bool[Array, ""]


class ProposedStep(eqx.Module):
    """A step that is proposed.

    **Fields:**

    - `directions`: the preconditioned gradient, downwards, and the velocity, or what a projection leaves of it.
    - `descent_norm`, `norm`: of the preconditioned gradient, and of the update.
    - `is_finite`: whether update and parameters after it are.
    - `coefficients`: learning rate and momentum.
    - `preconditioner`: its state, refreshed if that was due.
    - `failed`: whether an inverse failed, or there is none yet.
    - `settings`: what was given for it.
    - `damping`: λ.
    - `is_measured`: whether the following are known.
    - `change`: of the objective, as predicted; may be known in any case.
    - `after`: the objective after the step.
    - `ratio`: of the actual change to the predicted one.
    - `losses`: the mean of absolute values so far, with this batch.
    """

    directions: tuple[Parameters, Parameters]
    descent_norm: Scalar
    norm: Scalar
    is_finite: Bool[Array, ""]
    coefficients: tuple[Scalar, Scalar]
    preconditioner: Any
    failed: Bool[Array, ""]
    settings: Settings
    damping: Scalar
    is_measured: Bool[Array, ""]
    change: Scalar
    after: Scalar
    ratio: Scalar
    losses: MovingAverage

    @property
    def is_constrained(self) -> Bool[Array, ""]:
        """Whether the learning rate is less than what was given."""
        given = self.settings.learning_rate
        return jnp.zeros((), bool) if given is None else self.coefficients[0] < given

    def taken(self, accepted: Bool[Array, ""], keeps_velocity: Bool[Array, ""]) -> tuple[Parameters, Parameters]:
        """The update and the velocity after it, if it is accepted; or else zeros, and the old velocity or zeros.

        What is not taken has coefficients of zero: a choice between arrays compiles to several loops.
        """
        directions = finite_or_zero(self.directions)
        learning_rate, momentum = (jnp.where(accepted, each, 0) for each in self.coefficients)
        kept = ~accepted & keeps_velocity
        update = combine((learning_rate, momentum), directions)
        return update, combine((learning_rate, momentum + kept), directions)


class StepRules(eqx.Module):
    """How the optimizer chooses a step, and whether it takes it."""

    learning_rate: Coefficient
    momentum: Coefficient
    damping: DampingRule | RelativeDamping
    preconditioner: AnyPreconditioner
    rejection: Rejection | None
    l2: L2
    weight_decay: WeightDecay

    @property
    def rule(self) -> DampingRule:
        """That of the damping, in its own units."""
        return rule_of(self.damping)

    def settings(self, state: OptimizerState, overrides: Overrides) -> Settings:
        """What is given for the next step; NaN where it is out of its range."""
        step = state.step
        learning_rate = _choose("learning_rate", self.learning_rate, overrides.learning_rate, step, nonnegative)
        momentum = _choose("momentum", self.momentum, overrides.momentum, step, within_closed_unit)
        bound = self.learning_rate.bound if isinstance(self.learning_rate, NormConstraint) else None
        bound = scheduled("bound", bound, step, positive) if callable(bound) else bound
        damping = overrides.damping
        if damping is None:
            damping = positive("damping", self.rule.value(state.damping, step))
        own = nonnegative("damping", self.preconditioner.damping.value(damping, step))
        return Settings(
            learning_rate=learning_rate,
            momentum=momentum,
            bound=bound,
            damping=damping,
            is_overridden=overrides.damping is not None,
            are_valid=are_valid((self, learning_rate, momentum, bound, damping, own)),
        )

    def dampings(
        self, number: Scalar, state: OptimizerState, parameters: Parameters, l2: Scalar | dict[str, Scalar]
    ) -> tuple[Scalar, Scalar | dict[str, Scalar]]:
        """λ, where the rule says a number; and what is to be added to the preconditioner's curvature."""
        return self.preconditioner.dampings(self.damping, number, l2, state.preconditioner, parameters, state.step)

    def propose(
        self, objective: Objective, state: OptimizerState, settings: Settings, is_measured: bool
    ) -> ProposedStep:
        """**Arguments:**

        - `objective`: on this batch.
        - `state`: with the batch in its estimate of the curvature.
        - `settings`: what is not to be chosen.
        - `is_measured`: whether to evaluate the objective after the step, also if the damping rule does not ask for it.
        """
        parameters = objective.problem.parameters
        l2 = objective.l2.damping(objective.mask, parameters)
        damping, damped = self.dampings(settings.damping, state, parameters, l2)
        preconditioner, failed = self.preconditioner.maybe_refresh(state.preconditioner, parameters, damped, state.step)
        is_good = objective.is_good & settings.are_valid
        preconditioner, uphill = self.preconditioner.apply(preconditioner, objective.gradient, damped, is_good)
        carried = state.velocity
        if isinstance(self.momentum, ProjectedMomentum):
            own = nonnegative("damping", self.preconditioner.damping.value(damping, state.step))
            carried = combine((own,), (self.preconditioner.apply(preconditioner, carried, damped, is_good)[1],))
        directions = (combine((-1,), (uphill,)), carried)
        plane = objective.plane(directions)
        losses = state.losses.update(jnp.abs(objective.loss).astype(state.losses.value.dtype), jnp.ones(()))
        coefficients, predicted = self._coefficients(
            objective, settings, damping, directions, plane, state.step, losses.value
        )
        dtype, both = objective.loss.dtype, jnp.stack(coefficients)
        unknown = jnp.full((), jnp.nan, dtype)

        def measure():
            change, update = predicted, combine(coefficients, directions)
            if change is None:
                curvature = self._curvature(objective, preconditioner, update, state.step)
                change = plane.change(curvature, both)
            new = combine((1, 1), (parameters, self._with_decay(objective, update, coefficients[0])))
            l2_change = plane.l2_change(both) if self.weight_decay.coefficient is None else None
            return change.astype(dtype), objective.loss_at(new, l2_change).astype(dtype)

        def do_not_measure():
            return unknown if predicted is None else predicted.astype(dtype), unknown

        wanted = is_measured or self.rule.wants_ratio(state.step)
        change, after = do_not_measure() if wanted is False else cond(wanted, measure, do_not_measure)
        if isinstance(self.rule, LevenbergMarquardt) and self.rule.includes_damping:
            change += (damping * plane.squared_norm(both) / 2).astype(dtype)
        return ProposedStep(
            directions=directions,
            descent_norm=jnp.sqrt(plane.inner[0, 0]),
            norm=jnp.sqrt(plane.squared_norm(both)),
            is_finite=plane.is_finite(both),
            coefficients=coefficients,
            preconditioner=preconditioner,
            # Or there is no inverse yet.
            failed=failed | ((plane.inner[0, 0] == 0) & (objective.squared_norm > 0)),
            settings=settings,
            damping=damping,
            is_measured=jnp.asarray(wanted),
            change=change,
            after=after,
            ratio=(after - objective.loss) / change,
            losses=losses,
        )

    def adjusted(
        self, stored: Scalar, proposed: ProposedStep, wanted: Bool[Array, ""] | bool, undone: Bool[Array, ""]
    ) -> Scalar:
        """What the damping rule stores after a step, if it is wanted; and after one that is undone in any case."""
        if proposed.settings.is_overridden:
            return stored
        # Where no decrease was predicted the ratio says nothing.
        tells = undone | (wanted & ~(proposed.change >= 0))
        new = self.rule.update(stored, jnp.where(undone, jnp.nan, proposed.ratio))
        return jnp.where(tells, new, stored)

    def conclude(
        self,
        objective: Objective,
        state: OptimizerState,
        proposed: ProposedStep,
        bad_curvature: Bool[Array, ""],
        report_layers: bool,
    ) -> tuple[Parameters, OptimizerState, StepInfo]:
        """Takes the proposed step if it is good; parameters, state and report after it."""
        are_valid = proposed.settings.are_valid
        is_good, is_finite = objective.is_good & are_valid, proposed.is_finite
        accept = jnp.isfinite if self.rejection is None else self.rejection.accepts(objective.loss)
        is_bad_step = proposed.is_measured & ~accept(proposed.after)
        accepted = is_good & is_finite & ~is_bad_step
        undone = is_good & ~accepted
        # A velocity that led nowhere, and not for the first time, is what may have to go.
        again = ~is_finite | state.was_undone | (self.rejection is None)
        update, velocity = proposed.taken(accepted, keeps_velocity=~(undone & again))
        update = self._with_decay(objective, update, jnp.where(accepted, proposed.coefficients[0], 0))
        stale = proposed.preconditioner.is_stale | undone
        adjusted = self.adjusted(state.damping, proposed, self.rule.wants_ratio(state.step), undone)
        new_state = OptimizerState(
            step=state.step + 1,
            damping=jnp.where(is_good, adjusted, state.damping),
            velocity=velocity,
            preconditioner=eqx.tree_at(lambda p: p.is_stale, proposed.preconditioner, stale),
            was_undone=jnp.where(is_good, undone, state.was_undone),
            losses=select(is_good, proposed.losses, state.losses),
        )
        vectors = (objective.problem.parameters, objective.gradient, proposed.directions[0])
        return (
            combine((1, 1), (objective.problem.parameters, update)),
            new_state,
            StepInfo(
                step=state.step,
                result=_first(
                    (~are_valid, StepResult.invalid_setting),
                    (~is_good, StepResult.non_finite_batch),
                    (~is_finite, StepResult.non_finite_update),
                    (is_bad_step, StepResult.rejected),
                    (proposed.failed, StepResult.non_finite_inverse),
                    (bad_curvature, StepResult.non_finite_curvature),
                ),
                loss=objective.loss,
                loss_after=proposed.after,
                gradient_norm=jnp.sqrt(objective.squared_norm),
                descent_norm=proposed.descent_norm,
                proposed_norm=proposed.norm,
                update_norm=jnp.where(accepted, proposed.norm, 0),
                learning_rate=proposed.coefficients[0],
                momentum=proposed.coefficients[1],
                is_constrained=proposed.is_constrained,
                damping=proposed.damping,
                predicted_change=proposed.change,
                reduction_ratio=proposed.ratio,
                layers=layer_norms(*vectors, update) if report_layers else None,
                model_state=_keep(accepted, objective.model_state, objective.problem.model_state),
                aux=objective.aux,
            ),
        )

    def _coefficients(
        self,
        objective: Objective,
        settings: Settings,
        damping: Scalar,
        directions: tuple[Parameters, Parameters],
        plane: Plane,
        step: Counter,
        mean_loss: Scalar,
    ) -> tuple[tuple[Scalar, Scalar], Scalar | None]:
        """Learning rate and momentum, and the change that the exact quadratic model predicts if it was asked."""
        learning_rate, momentum = settings.learning_rate, settings.momentum
        if learning_rate is not None and settings.bound is not None:
            learning_rate = limit(learning_rate, -plane.slopes[0], settings.bound)
        if learning_rate is not None and isinstance(self.learning_rate, LossConstraint):
            learning_rate = self.learning_rate.limit(learning_rate, -plane.slopes[0], mean_loss)
        if learning_rate is not None and momentum is not None:
            return (learning_rate, momentum), None
        gram = objective.gram(self._model, directions, step)
        coefficients = plane.minimize(gram, damping, learning_rate, momentum)
        both = jnp.stack(coefficients)
        return coefficients, plane.change(matmul(both, gram, both), both)

    @property
    def _model(self) -> QuadraticModel:
        return next(each for each in (self.learning_rate, self.momentum) if isinstance(each, QuadraticModel))

    def _with_decay(self, objective: Objective, update: Parameters, learning_rate: Scalar) -> Parameters:
        problem = objective.problem
        return self.weight_decay.add(problem.model, problem.parameters, update, learning_rate)

    def _curvature(self, objective: Objective, preconditioner: Any, update: Parameters, step: Counter) -> Scalar:
        """`δᵀ C δ` for an update, of the C of the quadratic model where no coefficient was chosen by one."""
        if isinstance(self.rule, LevenbergMarquardt) and self.rule.exact_model is not None:
            return objective.gram(QuadraticModel(self.rule.exact_model), (update,), step)[0, 0]
        product = self.preconditioner.estimator.multiply(preconditioner.curvature, update)
        return jnp.sum(inner_products((update, product), [(0, 1)])[0])


def _choose(
    name: str,
    coefficient: Coefficient,
    given: Scalar | None,
    step: Counter,
    check: Callable[[str, Any], Scalar],
) -> Scalar | None:
    """The coefficient's value in this step; `None` if the quadratic model is to choose it."""
    if given is not None:
        return given
    if isinstance(coefficient, NormConstraint | LossConstraint):
        coefficient = coefficient.learning_rate
    if isinstance(coefficient, ProjectedMomentum):
        coefficient = coefficient.momentum
    if isinstance(coefficient, QuadraticModel):
        return None
    return scheduled(name, coefficient, step, check) if callable(coefficient) else coefficient


def _first(*cases: tuple[Bool[Array, ""], StepResult]) -> StepResult:
    """The result of the first condition that holds."""
    result = StepResult.successful
    for condition, reason in reversed(cases):
        result = StepResult.where(condition, reason, result)
    return result


def _keep(accepted: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new model state if the step was taken; there may be none."""
    return new if new is None else select(accepted, new, old)
