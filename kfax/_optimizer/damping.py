"""How the damping λ is chosen: pure rules on one scalar."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool

from .._estimators import check_deterministic, CurvatureSource
from .._math.arguments import flag, function, whole_number
from .._math.scalars import at_least_one, not_a_class, positive, scalar, scheduled, within_unit
from .._math.tree import is_traced
from .._math.types import Counter, Scalar, Schedule


class DampingRule(eqx.Module):
    """Chooses λ at each step, from a number that the optimizer's state stores for it.

    λ is in loss/param²: multiply the loss by c, and λ is to be multiplied by c. In a [`kfax.RelativeDamping`][] it is
    in units of the mean eigenvalue.
    """

    @abc.abstractmethod
    def init(self) -> Scalar:
        """The number to be stored at first: what `OptimizerState.damping` starts as."""

    @abc.abstractmethod
    def value(self, stored: Scalar, step: Counter) -> Scalar:
        """λ > 0 of this step."""

    @abc.abstractmethod
    def wants_ratio(self, step: Counter) -> Bool[Array, ""] | bool:
        """Whether the rule is to be told the reduction ratio of this step; `False` if it never is."""

    @abc.abstractmethod
    def update(self, stored: Scalar, ratio: Scalar) -> Scalar:
        """The number to be stored after a step whose ratio the rule wants, or that was undone.

        **Arguments:**

        - `stored`: the number before, which `value` was given.
        - `ratio`: the reduction ratio, or NaN after a step that was undone. A NaN fails every comparison.
        """


class FixedDamping(DampingRule):
    """The same λ at every step; what a plain number stands for."""

    damping: Scalar

    def __init__(self, damping: ArrayLike):
        """**Arguments:**

        - `damping`: λ > 0. [loss/param²]
        """
        self.damping = positive("damping", damping)

    def init(self) -> Scalar:
        return self.damping

    def value(self, stored: Scalar, step: Counter) -> Scalar:
        del stored, step
        return self.damping

    def wants_ratio(self, step: Counter) -> bool:
        del step
        return False

    def update(self, stored: Scalar, ratio: Scalar) -> Scalar:
        del ratio
        return stored


class ScheduledDamping(DampingRule):
    """λ as a function of the step; what an optax schedule stands for.

    **Fields:**

    - `schedule`: from the step to λ > 0. [loss/param²]
    """

    schedule: Schedule

    def __check_init__(self) -> None:
        function("schedule", self.schedule, "lambda step: 0.1 * 0.99**step")

    def init(self) -> Scalar:
        return scheduled("damping", self.schedule, jnp.zeros((), jnp.int32), positive)

    def value(self, stored: Scalar, step: Counter) -> Scalar:
        del stored
        return scheduled("damping", self.schedule, step, positive)

    def wants_ratio(self, step: Counter) -> bool:
        del step
        return False

    def update(self, stored: Scalar, ratio: Scalar) -> Scalar:
        del ratio
        return stored


class DampingMultiple(DampingRule):
    """A multiple of the optimizer's λ, for the preconditioner alone.

    **Fields:**

    - `factor`: positive, without unit.
    """

    factor: Scalar

    def __init__(self, factor: ArrayLike):
        """**Arguments:**

        - `factor`: positive, without unit.
        """
        self.factor = positive("factor", factor)

    def init(self) -> Scalar:
        raise ValueError("`kfax.DampingMultiple` has no λ of its own.")

    def value(self, stored: Scalar, step: Counter) -> Scalar:
        del step
        return self.factor * stored

    def wants_ratio(self, step: Counter) -> bool:
        del step
        return False

    def update(self, stored: Scalar, ratio: Scalar) -> Scalar:
        del ratio
        return stored


class LevenbergMarquardt(DampingRule):
    r"""Raises and lowers λ by how well the quadratic model predicts the change of the loss.

    Every `period` steps the loss h is computed again after the step δ, on the same batch, and compared with the
    prediction of the quadratic model M, by default without damping:

    $$\rho = \frac{h(\theta + \delta) - h(\theta)}{M(\delta) - M(0)}$$

    λ is multiplied by `decay ** period` if ρ > `upper`, and divided by it if ρ < `lower`. Where M predicts no decrease,
    as it may with momentum that is given, ρ says nothing and λ stays. On these steps a δ after which the loss is not
    finite is undone, and λ raised; for all steps, and losses that rose, see [`kfax.Rejection`][].

    M has the exact curvature if learning rate or momentum are chosen by [`kfax.QuadraticModel`][], and the estimator's
    otherwise, unless `exact_model` says which: that costs a forward pass of derivatives on the steps that need it.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, section 6.5. Differs: the paper's M includes λ‖δ‖²/2; here it does
        if asked to.
    """

    initial: Scalar
    decay: Scalar
    lower: Scalar
    upper: Scalar
    minimum: Scalar
    maximum: Scalar
    undone_factor: Scalar | None
    period: int = eqx.field(static=True)
    exact_model: CurvatureSource | None
    includes_damping: bool = eqx.field(static=True)

    def __init__(
        self,
        initial: ArrayLike,
        *,
        decay: ArrayLike = 0.95,
        period: int = 5,
        lower: ArrayLike = 0.25,
        upper: ArrayLike = 0.75,
        minimum: ArrayLike = 1e-8,
        maximum: ArrayLike = 1e8,
        undone_factor: ArrayLike | None = None,
        exact_model: CurvatureSource | None = None,
        includes_damping: bool = False,
    ):
        """**Arguments:**

        - `initial`: λ of the first step. [loss/param²]
        - `decay`: ω in (0, 1]; its power `period` is the factor of one adjustment. The default is that of the paper,
            19/20.
        - `period`: how many steps between adjustments.
        - `lower`, `upper`: thresholds of the reduction ratio. The defaults are those of the paper.
        - `minimum`, `maximum`: bounds for λ. [loss/param²]
        - `undone_factor`: by what λ is multiplied after a step that was undone, at least 1. As after a ratio below
            `lower`, if not given: `decay ** -period`.
        - `exact_model`: with which exact curvature to predict where no coefficient is chosen by a quadratic model:
            [`kfax.ExactGGN`][]`()`, [`kfax.ExactFisher`][]`()` or [`kfax.EmpiricalFisher`][]`()`. With the estimator's,
            if not given.
        - `includes_damping`: whether M includes λ‖δ‖²/2, as in the source.

        **Raises:** `ValueError` for values out of their range.
        """
        self.initial = positive("initial", initial)
        self.decay = within_unit("decay", decay)
        self.lower = scalar("lower", lower)
        self.upper = scalar("upper", upper)
        self.minimum = positive("minimum", minimum)
        self.maximum = positive("maximum", maximum)
        for names, bounds in ((("lower", "upper"), (lower, upper)), (("minimum", "maximum"), (minimum, maximum))):
            if not (is_traced(bounds) or np.less_equal(*bounds)):
                raise ValueError(f"`{names[0]}` of `LevenbergMarquardt` must not be above `{names[1]}`: {bounds}.")
        self.upper = jnp.where(self.lower <= self.upper, self.upper, jnp.nan)
        self.maximum = jnp.where(self.minimum <= self.maximum, self.maximum, jnp.nan)
        self.undone_factor = None if undone_factor is None else at_least_one("undone_factor", undone_factor)
        self.period = whole_number("period", period)
        self.exact_model = None if exact_model is None else check_deterministic("exact_model", exact_model)
        self.includes_damping = flag("includes_damping", includes_damping)

    def init(self) -> Scalar:
        return self.initial

    def value(self, stored: Scalar, step: Counter) -> Scalar:
        del step
        return stored

    def wants_ratio(self, step: Counter) -> Bool[Array, ""] | bool:
        return (step + 1) % self.period == 0

    def update(self, stored: Scalar, ratio: Scalar) -> Scalar:
        factor = self.decay**self.period
        lowered, raised = stored * factor, stored / factor
        if self.undone_factor is not None:
            raised = jnp.where(jnp.isnan(ratio), stored * self.undone_factor, raised)
        # A NaN fails both comparisons: first the one that would keep or lower λ.
        new = jnp.where(ratio > self.upper, lowered, jnp.where(ratio >= self.lower, stored, raised))
        return jnp.clip(new, self.minimum, self.maximum)


class RelativeDamping(eqx.Module):
    """λ as a multiple of the mean eigenvalue of the estimated curvature.

    What is right for one network or loss is then about right for another: the number has no unit, and does not change
    when the loss is multiplied by a constant. The mean eigenvalue, the mean of the diagonal, is taken at each step.

    Beware of it with learning rates that are given, on data that can be fitted: the curvature of a cross entropy
    vanishes with the loss, and λ with it, until steps are too long.

    ??? cite "Source"
        Grosse et al. 2023, arXiv:2308.03296, damp by a tenth of the mean eigenvalue. For the choice of λ by the scale
        of the curvature see also Ishikawa & Karakida 2023, arXiv:2312.12226.
    """

    rule: DampingRule

    def __init__(self, damping: ArrayLike | Schedule | DampingRule):
        """**Arguments:**

        - `damping`: λ in units of the mean eigenvalue: a number, a schedule or a rule.
        """
        self.rule = as_damping_rule(damping)


def rule_of(damping: DampingRule | RelativeDamping) -> DampingRule:
    """The rule, in its own units."""
    return damping.rule if isinstance(damping, RelativeDamping) else damping


def own_damping(damping: Any) -> DampingRule | RelativeDamping:
    """A damping that is not a multiple of another one."""
    damping = damping if isinstance(damping, RelativeDamping) else as_damping_rule(damping)
    if isinstance(rule_of(damping), DampingMultiple):
        raise ValueError(
            "`kfax.DampingMultiple` is a multiple of the optimizer's λ, for the preconditioner: "
            "`kfax.Preconditioner(damping=kfax.DampingMultiple(...))`. The optimizer's own `damping` is a number, a "
            "schedule, a rule, or a `kfax.RelativeDamping` of one."
        )
    return damping


def check_blind(name: str, rule: DampingRule) -> DampingRule:
    """A rule where there is no loss after the step to tell it of."""
    if rule.wants_ratio(jnp.zeros((), jnp.int32)) is not False:
        raise ValueError(
            f"`{type(rule).__name__}` adapts λ by the loss after each step, which only the `damping` of "
            f"`kfax.Optimizer` is told. Here `{name}` must be a number or a schedule, or a rule that does not adapt."
        )
    return rule


def as_damping_rule(damping: Any) -> DampingRule:
    """A number is a fixed damping, a function of the step a scheduled one."""
    if isinstance(damping, DampingRule):
        return damping
    return ScheduledDamping(damping) if callable(not_a_class("damping", damping)) else FixedDamping(damping)
