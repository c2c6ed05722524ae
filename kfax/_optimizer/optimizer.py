"""The K-FAC optimizer: from a model, a state and a batch to the next model and state."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from .._capture import linearize, Problem, split_key
from .._estimators import CurvatureEstimator, ExplicitExactCurvature, measured_across
from .._layers import any_parameters_of
from .._math.arguments import flag, frozen_nodes, loss_function, whole_number
from .._math.mesh import on_automatic_axes
from .._math.moving_average import MovingAverage
from .._math.scalars import nonnegative, number_or_schedule, positive, within_closed_unit
from .._math.tree import anywhere, cond, is_traced, zeros_like
from .._math.types import Model, PRNGKey, PyTree, Schedule, Where
from .base import check_preconditioner
from .damping import DampingRule, own_damping, RelativeDamping
from .eigenbasis_adam import EigenbasisAdam
from .l2 import L2
from .objective import Objective, objective_on, problem_with
from .preconditioner import Preconditioner
from .quadratic import QuadraticModel
from .rescale import LossConstraint, NormConstraint, ProjectedMomentum, Rejection
from .state import OptimizerState, parameters_for, StepInfo
from .step import Coefficient, Overrides, StepRules
from .weight_decay import WeightDecay


class Optimizer(eqx.Module):
    r"""Minimizes a loss by preconditioned gradient steps with momentum.

    $$\delta_t = -\alpha_t\, (\hat C + (\lambda_t + \eta) I)^{-1} \nabla h(\theta_t) + \beta_t\, \delta_{t-1}, \qquad
    \theta_{t+1} = \theta_t + \delta_t$$

    with Ĉ the estimator's curvature, λ the damping and η the coefficient of L2. `init` and `step` are pure functions:
    jit them, scan them, vmap them as you like. An optimizer is a PyTree whose numbers are array leaves, so that another
    value needs no new compilation.

    For two settings that work in most cases see [`kfax.full_batch`][] and [`kfax.stochastic`][].

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, algorithm 2. Differs: the preconditioner is damped by λ itself, not
        by a γ that is searched for separately.
    """

    loss_fn: Callable
    learning_rate: Coefficient
    momentum: Coefficient
    damping: DampingRule | RelativeDamping
    l2: L2
    weight_decay: WeightDecay
    preconditioner: Preconditioner | EigenbasisAdam
    rejection: Rejection | None
    micro_batches: int = eqx.field(static=True)
    report_layers: bool = eqx.field(static=True)
    frozen: Where | None = eqx.field(static=True)

    def __init__(
        self,
        loss_fn: Callable,
        *,
        learning_rate: ArrayLike | Schedule | QuadraticModel | NormConstraint | LossConstraint,
        momentum: ArrayLike | Schedule | QuadraticModel | ProjectedMomentum,
        damping: ArrayLike | Schedule | DampingRule | RelativeDamping,
        l2: ArrayLike | L2 | None = None,
        weight_decay: ArrayLike | WeightDecay | None = None,
        preconditioner: Preconditioner | EigenbasisAdam | None = None,
        micro_batches: int = 1,
        rejection: Rejection | None = None,
        report_layers: bool = False,
        frozen: Where | None = None,
    ):
        """**Arguments:**

        - `loss_fn`: called as `loss_fn(model, batch)`, and with `key=` and `model_state=` if it has parameters of
            these names. Returns a [`kfax.Loss`][] of the whole batch (or a list or dictionary of them), or a tuple
            `(losses, aux)`; if it takes a model state, `(losses, model_state)` or `(losses, model_state, aux)`.
        - `learning_rate`: α ≥ 0, a number, a schedule (a function of the step, as those of optax),
            [`kfax.QuadraticModel`][] or [`kfax.NormConstraint`][]. A number or schedule stands for a
            [`kfax.LossConstraint`][] of it, which lowers it in steps that promise too much; with an `exponent` other
            than -1, where nothing is promised, it is taken as it is.
        - `momentum`: β in [0, 1], a number, a schedule, [`kfax.QuadraticModel`][] or [`kfax.ProjectedMomentum`][].
        - `damping`: λ > 0, a number, a schedule, a rule such as [`kfax.LevenbergMarquardt`][], or one of these relative
            to the curvature, [`kfax.RelativeDamping`][]. [loss/param²]
        - `l2`: η, a number, or a [`kfax.L2`][] for some of the parameters; none, if not given. [loss/param²]
        - `weight_decay`: w of decoupled weight decay, a number, or a [`kfax.WeightDecay`][] for some of the
            parameters; none, if not given.
        - `preconditioner`: which curvature is inverted, and how often; [`kfax.Preconditioner`][]`()` if not given. Or a
            [`kfax.EigenbasisAdam`][].
        - `micro_batches`: in how many equal parts a batch is run, one after the other, to save memory. Examples are
            expected on axis 0 of all arrays of the batch. Parts of it that preconditioner or quadratic model are told
            to use are run whole. The step is the same, except where examples see each other (batch normalization), for
            random numbers and, with masks and `mean_over_positions`, for how much each part counts in A.
        - `rejection`: when to undo a step, [`kfax.Rejection`][]`()`; never, if not given.
        - `report_layers`: whether `StepInfo` has the norms of single layers.
        - `frozen`: what is not trained: a function of the model that returns nodes of it, as in [`kfax.tag`][].

        **Raises:** `ValueError` for values out of their range.
        """
        whole_number("micro_batches", micro_batches)
        preconditioner = Preconditioner() if preconditioner is None else preconditioner
        check_preconditioner(preconditioner)
        if not (rejection is None or isinstance(rejection, Rejection)):
            raise ValueError(f"`rejection` must be `kfax.Rejection()` or `None`, got {rejection!r}.")
        if isinstance(momentum, NormConstraint | LossConstraint):
            name = type(momentum).__name__
            raise ValueError(f"`kfax.{name}` is for the learning rate. `momentum` is a number or a schedule.")
        if isinstance(learning_rate, LossConstraint) and preconditioner.exponent != -1:
            raise ValueError("`kfax.LossConstraint` needs an inverse: give the preconditioner an `exponent` of -1.")
        if isinstance(learning_rate, ProjectedMomentum):
            raise ValueError("`kfax.ProjectedMomentum` is for the momentum. `learning_rate` is a number or a schedule.")
        if isinstance(momentum, ProjectedMomentum) and preconditioner.exponent != -1:
            raise ValueError("`kfax.ProjectedMomentum` needs an inverse: give the preconditioner an `exponent` of -1.")
        self.loss_fn = loss_function(loss_fn)
        rate = _coefficient("learning_rate", learning_rate)
        self.learning_rate = _constrained(rate) if preconditioner.exponent == -1 else rate
        self.momentum = _coefficient("momentum", momentum)
        if isinstance(learning_rate, QuadraticModel) and isinstance(momentum, QuadraticModel):
            if learning_rate != momentum:
                raise ValueError("Learning rate and momentum must be chosen by one `kfax.QuadraticModel`.")
        self.damping = own_damping(damping)
        preconditioner.check_settings(is_relative=isinstance(damping, RelativeDamping), micro_batches=micro_batches)
        self.l2 = l2 if isinstance(l2, L2) else L2(l2)
        self.weight_decay = weight_decay if isinstance(weight_decay, WeightDecay) else WeightDecay(weight_decay)
        if isinstance(preconditioner.estimator, ExplicitExactCurvature) and preconditioner.exponent != -1:
            if self.l2.where is not None:
                raise ValueError(
                    "A power of `kfax.ExplicitExactCurvature` has one damping for all parameters: give `l2` a number, "
                    "or the preconditioner an `exponent` of -1."
                )
        self.preconditioner = preconditioner
        self.rejection = rejection
        self.micro_batches = micro_batches
        self.report_layers = flag("report_layers", report_layers)
        self.frozen = frozen_nodes(frozen)

    @property
    def estimator(self) -> CurvatureEstimator:
        """The estimator of the curvature."""
        return self.preconditioner.estimator

    @on_automatic_axes
    def init(self, model: Model, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None) -> OptimizerState:
        """**Arguments:**

        - `model`: the tagged model. For an exact estimator, which needs no layers, it may be untagged.
        - `batch`: as for `step`. Used only to check model and `loss_fn`, by [`kfax.check`][] (of which an exact
            estimator needs only that loss and gradient are finite). That takes values: inside `jit` and the like there
            is no such check.
        - `key`, `model_state`: for `loss_fn`, if it takes them.

        **Returns:** the state for the first step.

        **Raises:** `ValueError` for a parameter without a block, and all that `kfax.check` raises.
        """
        parameters = any_parameters_of(model, self.frozen)
        self.l2.mask(model, parameters)
        self.weight_decay.add(model, parameters, parameters, jnp.zeros(()))  # for its errors
        rule, start = self._rules.rule, zeros_like(jax.ShapeDtypeStruct((), jnp.int32))
        positive("damping", rule.value(rule.init(), start))
        if not is_traced((model, batch, key, model_state)):
            self.estimator.check(Problem(self.loss_fn, model, batch, key, model_state, self.frozen))
        return OptimizerState(
            step=start,
            damping=jnp.array(rule.init()),  # a copy, so that the state may be donated
            velocity=zeros_like(parameters),
            preconditioner=self.preconditioner.init(model, parameters, self.frozen),
            was_undone=zeros_like(jax.ShapeDtypeStruct((), bool)),
            losses=MovingAverage.zeros(jax.ShapeDtypeStruct((), jnp.result_type(float))),
        )

    @on_automatic_axes
    def step(
        self,
        model: Model,
        state: OptimizerState,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        learning_rate: ArrayLike | None = None,
        momentum: ArrayLike | None = None,
        damping: ArrayLike | None = None,
    ) -> tuple[Model, OptimizerState, StepInfo]:
        """**Arguments:**

        - `model`: the tagged model.
        - `state`: from `init` or the previous step.
        - `batch`: passed to `loss_fn`. Its size may change from step to step (each size is compiled once).
        - `key`: for the estimator's source if it draws random numbers, and for `loss_fn` if it takes a key.
        - `model_state`: for `loss_fn`, if it takes one.
        - `learning_rate`, `momentum`, `damping`: used in this step in place of what the optimizer would choose. A
            constraint holds for the given learning rate too, and a relative damping is given in its own units.

        **Returns:** the next model, the next state, and a [`kfax.StepInfo`][].

        **Raises:** `ValueError` if model, state and batch do not fit.
        """
        overrides = Overrides(
            None if learning_rate is None else nonnegative("learning_rate", learning_rate),
            None if momentum is None else within_closed_unit("momentum", momentum),
            None if damping is None else positive("damping", damping),
        )
        problem, key = self._problem(model, state, batch, key, model_state)
        due = self.preconditioner.wants_curvature(state.preconditioner, state.step)
        settings = self._rules.settings(state, overrides)
        objective, state, failed = self._observe(problem, state, key, due, settings.are_valid)
        proposed = self._rules.propose(objective, state, settings, is_measured=self.rejection is not None)
        parameters, state, info = self._rules.conclude(objective, state, proposed, failed, self.report_layers)
        return eqx.combine(parameters, model), state, info

    @on_automatic_axes
    def burn_in(
        self, model: Model, state: OptimizerState, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None
    ) -> OptimizerState:
        """Takes a batch into the estimate of the curvature, without a step: for better statistics at the start.

        **Arguments:** as for `step`.

        **Returns:** the state with the new estimate.
        """
        problem, key = self._problem(model, state, batch, key, model_state)
        return self._observe(problem, state, key, due=True, is_wanted=True)[1]

    @on_automatic_axes
    def refresh(self, model: Model, state: OptimizerState) -> OptimizerState:
        """Computes all inverses anew, for the present estimate and λ, whether they are due or not.

        **Arguments:**

        - `model`: the tagged model.
        - `state`: from `init`, `burn_in` or the previous step.

        **Returns:** the state with new inverses; those that are not finite are as before.
        """
        parameters = parameters_for(state, model, self.frozen)
        l2 = self.l2.damping(self.l2.mask(model, parameters), parameters)
        number = self._rules.settings(state, Overrides()).damping
        _, damping = self._rules.dampings(number, state, parameters, l2)
        preconditioner, _ = self.preconditioner.refresh(state.preconditioner, parameters, damping)
        return eqx.tree_at(lambda s: s.preconditioner, state, preconditioner)

    @on_automatic_axes
    def calibrate(
        self, model: Model, state: OptimizerState, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None
    ) -> OptimizerState:
        """Finds a λ to start with: adjusts it on one batch until the rule would leave it as it is.

        Tries the first step again and again from where the model is, with everything that depends on λ computed anew,
        and has the damping rule judge it; at most 100 times. Of two λ between which it would go back and forth the
        larger one is taken. Worth its time where a good `initial` is not known.

        **Arguments:** as for `step`.

        **Returns:** the state with another λ, and with the batch in its estimate of the curvature. If the batch is not
        finite λ is as before.

        **Raises:** `ValueError` if the damping rule does not adapt.
        """
        problem, key = self._problem(model, state, batch, key, model_state)
        if self._rules.rule.wants_ratio(state.step) is False:
            raise ValueError("`calibrate` needs a damping that adapts, such as `kfax.LevenbergMarquardt(1.0)`.")
        objective, state, _ = self._observe(problem, state, key, due=True, is_wanted=True)
        fresh = eqx.tree_at(lambda s: s.preconditioner.is_stale, state, jnp.ones((), bool))

        def adjust(carry):
            number, direction, count = carry
            start = eqx.tree_at(lambda s: s.damping, fresh, number)
            settings = self._rules.settings(start, Overrides())
            proposed = self._rules.propose(objective, start, settings, is_measured=True)
            new = self._rules.adjusted(number, proposed, True, undone=~jnp.isfinite(proposed.after))
            towards = jnp.sign(new - number)
            turned = towards * direction < 0
            return jnp.where(turned, jnp.maximum(number, new), new), jnp.where(turned, 0, towards), count + 1

        def goes_on(carry):
            _, direction, count = carry
            return (direction != 0) & (count < _MAX_TRIALS)

        # At first there is no direction that it could turn from.
        start = (state.damping, jnp.full_like(state.damping, jnp.nan), jnp.zeros((), jnp.int32))
        number, *_ = jax.lax.while_loop(goes_on, adjust, start)
        is_good = objective.is_good & jnp.isfinite(number)
        return eqx.tree_at(lambda s: s.damping, fresh, jnp.where(is_good, number, state.damping))

    def state_axes(self, state: OptimizerState) -> PyTree:
        """`in_axes` and `out_axes` of a state for `equinox.filter_vmap` over an ensemble: all arrays but the counter.

        An unmapped counter keeps "every fifth step" one decision for the whole ensemble. With a mapped one, JAX would
        do the work of both branches at every step.

        **Arguments:**

        - `state`: that of one member or of the ensemble, or its shapes.

        **Returns:** zeros, and `None` for `step`, in the structure of the state.
        """
        if not isinstance(state, OptimizerState):
            raise ValueError(f"`state` must be that of an optimizer, got {type(state).__name__}.")
        axes = jax.tree.map(lambda _: 0, state)
        return eqx.tree_at(lambda s: s.step, axes, None)

    @property
    def _rules(self) -> StepRules:
        return StepRules(
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            damping=self.damping,
            preconditioner=self.preconditioner,
            rejection=self.rejection,
            l2=self.l2,
            weight_decay=self.weight_decay,
        )

    def _problem(
        self, model: Model, state: OptimizerState, batch: Any, key: PRNGKey | None, model_state: Any
    ) -> tuple[Problem, PRNGKey | None]:
        """What is to be run, and a key for the curvature."""
        parameters_for(state, model, self.frozen)
        loss_key, source_key = split_key(self.loss_fn, key)
        return Problem(self.loss_fn, model, batch, loss_key, model_state, self.frozen), source_key

    def _observe(
        self,
        problem: Problem,
        state: OptimizerState,
        key: PRNGKey | None,
        due: Bool[Array, ""] | bool,
        is_wanted: Bool[Array, ""] | bool,
    ) -> tuple[Objective, OptimizerState, Bool[Array, ""]]:
        """Runs the batch, and takes its curvature into the state if due, wanted and finite; and whether it is not."""
        estimator, curvature = self.estimator, state.curvature
        for_anyone = due if due is True else anywhere(due)
        arguments = (problem, self.l2, self.micro_batches, key)
        linearize_in = functools.partial(estimator.linearize, state=curvature)
        # What is measured is a function, so that nothing has to stand for it where it is not due.
        if self.preconditioner.batch is not None:
            part = problem_with(problem, self.preconditioner.part_of(problem.batch, state.step))
            objective, _ = objective_on(*arguments, linearize, lambda linearization, key, measured: None, None)
            measured = lambda: estimator.measure(estimator.linearize(part, curvature), key)  # noqa: E731
        elif self.micro_batches == 1:
            later = lambda linearization, key, _: lambda: estimator.measure(linearization, key)  # noqa: E731
            objective, measured = objective_on(*arguments, linearize_in, later, None)
        else:

            def add(linearization, key, total):
                more = lambda: estimator.add(total, estimator.measure(linearization, key))  # noqa: E731
                return cond(for_anyone, more, lambda: total)

            objective, total = objective_on(*arguments, linearize_in, add, estimator.nothing(curvature))
            measured = lambda: total  # noqa: E731
        is_good = objective.is_good & is_wanted & due
        everywhere = lambda: measured_across(self.loss_fn, measured())  # noqa: E731
        fold = lambda: self.preconditioner.fold(state.preconditioner, everywhere(), is_good)  # noqa: E731
        preconditioner, failed = cond(for_anyone, fold, lambda: (state.preconditioner, jnp.zeros((), bool)))
        return objective, eqx.tree_at(lambda s: s.preconditioner, state, preconditioner), failed


# Enough for a factor of 1e11 by the default adjustments.
_MAX_TRIALS = 100


_RULES = QuadraticModel | NormConstraint | LossConstraint | ProjectedMomentum


def _constrained(rate: Coefficient) -> Coefficient:
    return rate if isinstance(rate, _RULES) else LossConstraint(rate)


def _coefficient(name: str, value: Any) -> Coefficient:
    if isinstance(value, _RULES):
        return value
    return number_or_schedule(name, value, within_closed_unit if name == "momentum" else nonnegative)
