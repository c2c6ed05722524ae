"""The inverse curvature that gradients are multiplied by, and when its costly parts are computed anew."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from .._blocks import Spectrum, unbounded
from .._estimators import (
    BlockDiagonalCurvature,
    CurvatureEstimator,
    Eigendecomposition,
    LastBatchCurvature,
    PlacedCurvature,
    SampleSpaceCurvature,
)
from .._math.arguments import function, whole_number
from .._math.scalars import nonnegative
from .._math.tree import anywhere, cond, keep_finite, mean, zeros_like
from .._math.types import Counter, Model, Parameters, Scalar, Schedule, Where
from .base import add_l2, AnyPreconditioner, is_due
from .damping import as_damping_rule, check_blind, DampingMultiple, DampingRule, RelativeDamping


class Staggered(eqx.Module):
    """Spreads the refresh over the steps of a period: each step refreshes some of the blocks, for about equal cost.

    As much is computed as by a refresh of everything once in a period, but no step takes longer than others: except the
    first one, and one after an inverse that failed or a step that was undone, which refresh everything.

    **Fields:**

    - `period`: the number of steps in which every block has its turn.
    """

    period: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        whole_number("period", self.period)


class PreconditionerState(eqx.Module):
    """What a preconditioner keeps between steps.

    **Fields:**

    - `curvature`: the state of the estimator, with its inverses.
    - `eigendecomposition`: for a power other than -1; otherwise `None`.
    - `is_stale`: whether inverses are to be computed anew at the next step, due or not: one of them failed, or a step
        was undone and λ raised.
    """

    curvature: Any
    eigendecomposition: Eigendecomposition | None
    is_stale: Bool[Array, ""]


class Preconditioner(AnyPreconditioner):
    r"""The inverse curvature that gradients are multiplied by, $(\hat C + \lambda I)^{-1}$, and when it is renewed.

    Its parts have different costs, and change at different rates: the statistics with every batch, the inverses that
    are computed from them once in a while.
    """

    estimator: CurvatureEstimator
    damping: DampingRule
    batch: Callable | None
    exponent: float = eqx.field(static=True)
    inverse_update_period: int | Staggered = eqx.field(static=True)
    curvature_update_period: int = eqx.field(static=True)

    def __init__(
        self,
        estimator: CurvatureEstimator | None = None,
        *,
        inverse_update_period: int | Staggered = 5,
        curvature_update_period: int = 1,
        batch: Callable | None = None,
        damping: ArrayLike | Schedule | DampingRule | None = None,
        exponent: float = -1.0,
    ):
        """**Arguments:**

        - `estimator`: of the curvature; [`kfax.BlockDiagonalCurvature`][]`()` if not given.
        - `inverse_update_period`: how many steps between refreshes of the inverse, the costly part; or
            [`kfax.Staggered`][]`(period)` to spread them over the steps.
        - `curvature_update_period`: how many steps between updates of the statistics.
        - `batch`: `(batch, count) -> batch`, the part of each batch that statistics are taken of, such as
            [`kfax.Fraction`][]`(1 / 8)`, given how many updates of the statistics there were. It is run through the
            model apart from the rest. All of it, if not given.
        - `damping`: of the preconditioner, if it is not to be that of the optimizer: a number, a schedule, or a
            [`kfax.DampingMultiple`][] of it. [loss/param²]
        - `exponent`: at least -1, the inverse, and below 0. Any but -1, such as -1/2, is taken in an eigenbasis, with
            the damping added to the eigenvalues whatever `inversion` a block has.

        **Raises:** `ValueError` for values out of their range.
        """
        # Not as defaults of arguments: importing must not make arrays.
        estimator = BlockDiagonalCurvature() if estimator is None else estimator
        if not isinstance(estimator, CurvatureEstimator):
            raise ValueError(f"`estimator` must be a curvature estimator, got {estimator!r}.")
        if isinstance(exponent, bool) or not (isinstance(exponent, int | float) and -1 <= exponent < 0):
            raise ValueError(f"`exponent` must be at least -1 and below 0, such as -1 or -1/2, got {exponent!r}.")
        whole_number("curvature_update_period", curvature_update_period)
        if batch is not None:
            function("batch", batch, "kfax.Fraction(1 / 8)", 2)
        if isinstance(inverse_update_period, Staggered):
            if not isinstance(estimator, BlockDiagonalCurvature | PlacedCurvature) or exponent != -1:
                raise ValueError(
                    "`kfax.Staggered` refreshes block by block, which takes `kfax.BlockDiagonalCurvature` or "
                    "`kfax.PlacedCurvature`, and an `exponent` of -1. Otherwise give `inverse_update_period` a number."
                )
        else:
            whole_number("inverse_update_period", inverse_update_period)
        if isinstance(estimator, LastBatchCurvature) and curvature_update_period != 1:
            name = type(estimator).__name__
            raise ValueError(f"`kfax.{name}` is that of the present batch: its `curvature_update_period` must be 1.")
        if isinstance(estimator, SampleSpaceCurvature) and (inverse_update_period != 1 or exponent != -1):
            raise ValueError(
                "`kfax.SampleSpaceCurvature` inverts the matrix of each batch: write "
                "`kfax.Preconditioner(kfax.SampleSpaceCurvature(), inverse_update_period=1)`, without an `exponent`."
            )
        self.estimator = estimator
        self.damping = DampingMultiple(1.0) if damping is None else check_blind("damping", as_damping_rule(damping))
        self.batch = batch
        self.exponent = float(exponent)
        self.inverse_update_period = inverse_update_period
        self.curvature_update_period = curvature_update_period

    def check_settings(self, is_relative: bool, micro_batches: int) -> None:
        # An estimator that holds one batch has no diagonal, and needs it whole.
        if not isinstance(self.estimator, LastBatchCurvature):
            return
        name = type(self.estimator).__name__
        if is_relative:
            raise ValueError(
                f"`kfax.RelativeDamping` needs the diagonal of the curvature, which `kfax.{name}` has not. Give λ "
                "itself, or use `kfax.BlockDiagonalCurvature`."
            )
        if micro_batches != 1:
            raise ValueError(
                f"`kfax.{name}` needs its batch whole: `micro_batches` must be 1. For other estimators the batch is "
                "run in parts."
            )

    def init(self, model: Model, parameters: Parameters, frozen: Where | None) -> PreconditionerState:
        curvature, eigendecomposition = self.estimator.init(model, frozen=frozen), None
        if self.exponent != -1:
            shapes = eqx.filter_eval_shape(self.estimator.decompose, curvature, parameters)
            eigendecomposition = _immovable(shapes)
        stale = zeros_like(jax.ShapeDtypeStruct((), bool))
        return PreconditionerState(curvature=curvature, eigendecomposition=eigendecomposition, is_stale=stale)

    def dampings(
        self,
        damping: DampingRule | RelativeDamping,
        number: Scalar,
        l2: Scalar | dict[str, Scalar] | None,
        state: PreconditionerState,
        parameters: Parameters,
        step: Counter,
    ) -> tuple[Scalar, Scalar | dict[str, Scalar]]:
        if isinstance(damping, RelativeDamping):
            # Of a matrix that may be indefinite, how large it is.
            wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), parameters)
            diagonal = self.estimator.diagonal(state.curvature, wide)
            number = number * mean(jax.tree.map(jnp.abs, diagonal))
        return number, add_l2(nonnegative("damping", self.damping.value(number, step)), l2)

    def maybe_refresh(
        self,
        state: PreconditionerState,
        parameters: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        step: Counter,
    ) -> tuple[PreconditionerState, Bool[Array, ""]]:
        if isinstance(self.inverse_update_period, Staggered):
            return self._next_refresh(state, parameters, damping, step, self.inverse_update_period.period)
        due = is_due(step, self.inverse_update_period)
        if due is True:
            return self.refresh(state, parameters, damping)
        due |= state.is_stale
        refresh = lambda: self.refresh(state, parameters, damping, is_wanted=due)  # noqa: E731
        return cond(anywhere(due), refresh, lambda: (state, jnp.zeros((), bool)))

    def _next_refresh(
        self,
        state: PreconditionerState,
        parameters: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        step: Counter,
        period: int,
    ) -> tuple[PreconditionerState, Bool[Array, ""]]:
        """Everything at first and if the state is stale, and otherwise the blocks whose turn it is."""
        everything, failed = (step == 0) | state.is_stale, jnp.zeros((), bool)
        for i, group in enumerate(self._groups(parameters, period)):
            due = everything | (step % period == i)
            refresh = lambda s=state, g=group, due=due: self.refresh(s, parameters, damping, g, due)  # noqa: E731
            kept = lambda s=state: (s, jnp.zeros((), bool))  # noqa: E731
            state, has_failed = cond(anywhere(due), refresh, kept)
            failed |= has_failed
        return eqx.tree_at(lambda s: s.is_stale, state, failed), failed

    def refresh(
        self,
        state: PreconditionerState,
        parameters: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        only: tuple[str, ...] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[PreconditionerState, Bool[Array, ""]]:
        """The state with new inverses, of all blocks or of some, if they are wanted; and whether any failed."""
        curvature, eigendecomposition = state.curvature, state.eigendecomposition
        if eigendecomposition is None:
            curvature, failed = self.estimator.refresh_finite(curvature, parameters, damping, only, is_wanted)
        else:
            if isinstance(self.estimator, BlockDiagonalCurvature):
                # Eigenbases are renewed as by any refresh. Of its inverses nothing is used, and so nothing computed.
                renewed, _ = self.estimator.refresh_finite(curvature, parameters, damping, only, is_wanted)
                curvature = eqx.tree_at(lambda state: state.inverses, renewed, curvature.inverses)
            new = self.estimator.decompose(curvature, parameters)
            known = self.estimator.weight(curvature) > 0
            spectra, failed = keep_finite(new.spectra, eigendecomposition.spectra, known, is_wanted)
            eigendecomposition = eqx.tree_at(lambda e: e.spectra, new, spectra)
        new = PreconditionerState(curvature=curvature, eigendecomposition=eigendecomposition, is_stale=failed)
        return new, failed

    def apply(
        self,
        state: PreconditionerState,
        gradient: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        is_good: Bool[Array, ""],
    ) -> tuple[PreconditionerState, Parameters]:
        """`(Ĉ + λI)^p ∇h`; for p = -1 with λ as of the last refresh, where a new one would take another refresh."""
        del is_good
        if state.eigendecomposition is None:
            return state, self.estimator.solve(self.estimator.redamp(state.curvature, gradient, damping), gradient)
        return state, state.eigendecomposition.power(gradient, self.exponent, damping)

    def _groups(self, parameters: Parameters, number: int) -> list[tuple[str, ...]]:
        """The blocks in groups of about equal cost: the costliest first, each to the group with the least so far."""
        assert isinstance(self.estimator, BlockDiagonalCurvature | PlacedCurvature)
        costs = self.estimator.refresh_flops(parameters)
        groups, totals = [[] for _ in range(number)], [0] * number
        for key in sorted(costs, key=lambda key: (-costs[key], key)):
            least = totals.index(min(totals))
            groups[least].append(key)
            totals[least] += costs[key]
        return [tuple(group) for group in groups if group]


def _immovable(shapes: Eigendecomposition) -> Eigendecomposition:
    """So that nothing moves before the first refresh."""
    return jax.tree.map(unbounded, zeros_like(shapes), is_leaf=lambda x: isinstance(x, Spectrum))
