"""The contract between what turns gradients into directions by means of curvature, and those who step along them."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool

from .._estimators import CurvatureEstimator
from .._math.types import Counter, Model, Parameters, Scalar, Where
from .damping import DampingRule, RelativeDamping


class AnyPreconditioner(eqx.Module):
    """Turns gradients into directions by means of a curvature, whose parts it renews once in a while.

    Its state has at least `curvature`, that of the estimator, and `is_stale`: whether what is computed from the
    statistics is to be computed anew at the next step, due or not.

    **Fields:**

    - `estimator`: of the curvature.
    - `damping`: its own λ, of that of the optimizer.
    - `batch`: the part of a batch that statistics are taken of; all of it if `None`.
    - `exponent`: the power of the curvature that it stands for.
    - `curvature_update_period`: how many steps between updates of the statistics.
    """

    estimator: eqx.AbstractVar[CurvatureEstimator]
    damping: eqx.AbstractVar[DampingRule]
    batch: eqx.AbstractVar[Callable[..., Any] | None]
    exponent: eqx.AbstractVar[float]
    curvature_update_period: eqx.AbstractVar[int]

    @abc.abstractmethod
    def check_settings(self, is_relative: bool, micro_batches: int) -> None:
        """Raises an error for settings of the optimizer that it cannot do with."""

    @abc.abstractmethod
    def init(self, model: Model, parameters: Parameters, frozen: Where | None) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def dampings(
        self,
        damping: DampingRule | RelativeDamping,
        number: Scalar,
        l2: Scalar | dict[str, Scalar] | None,
        state: Any,
        parameters: Parameters,
        step: Counter,
    ) -> tuple[Scalar, Scalar | dict[str, Scalar]]:
        """λ, where a rule says a number; and its own, with what L2 adds to it. NaN if out of its range."""

    @abc.abstractmethod
    def maybe_refresh(
        self, state: Any, parameters: Parameters, damping: Scalar | Mapping[str, Scalar], step: Counter
    ) -> tuple[Any, Bool[Array, ""]]:
        """The state with what is due computed anew; and whether any of it failed, so that the old was kept.

        Within an ensemble what one member asks for is computed for all, but taken by that one only.
        """

    @abc.abstractmethod
    def refresh(
        self, state: Any, parameters: Parameters, damping: Scalar | Mapping[str, Scalar]
    ) -> tuple[Any, Bool[Array, ""]]:
        """The same, with everything computed anew."""

    @abc.abstractmethod
    def apply(
        self,
        state: Any,
        gradient: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        is_good: Bool[Array, ""],
    ) -> tuple[Any, Parameters]:
        """The state, with the gradient in its averages if that is good; and the direction, uphill."""

    def wants_curvature(self, state: Any, step: Counter) -> Bool[Array, ""] | bool:
        """Whether this step is to measure the curvature: in its turn, and if nothing is known yet."""
        due = is_due(step, self.curvature_update_period)
        return True if due is True else due | (self.estimator.weight(state.curvature) == 0)

    def part_of(self, batch: Any, step: Counter) -> Any:
        """What statistics are taken of."""
        return batch if self.batch is None else self.batch(batch, step // self.curvature_update_period)

    def fold(self, state: Any, measured: Any, is_wanted: Bool[Array, ""]) -> tuple[Any, Bool[Array, ""]]:
        """Takes in what was measured if it is wanted and finite; and whether it is not finite."""
        curvature, failed = self.estimator.fold_finite(state.curvature, measured, is_wanted)
        return eqx.tree_at(lambda s: s.curvature, state, curvature), failed & is_wanted


def is_due(step: Counter, period: int) -> Bool[Array, ""] | bool:
    return True if period == 1 else step % period == 0


def add_l2(damping: Scalar, l2: Scalar | dict[str, Scalar] | None) -> Scalar | dict[str, Scalar]:
    """A damping with what L2 adds to it, for all blocks or for each."""
    if l2 is None:
        return damping
    return {key: damping + eta for key, eta in l2.items()} if isinstance(l2, dict) else damping + l2


def check_preconditioner(value: Any) -> AnyPreconditioner:
    if not isinstance(value, AnyPreconditioner):
        raise ValueError(
            f"`preconditioner` must be a `kfax.Preconditioner(...)` or a `kfax.EigenbasisAdam(...)`, got {value!r}."
        )
    return value
