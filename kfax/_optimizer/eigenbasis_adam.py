"""Adam in the eigenbases of the curvature's blocks."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from .._blocks import Product
from .._estimators import (
    axes_of,
    BlockDiagonalCurvature,
    full_bases,
    no_bases,
    spectra_in,
    turned_bases,
    wide,
)
from .._layers import from_matrices, parts, to_matrices
from .._math.arguments import whole_number
from .._math.moving_average import MovingAverage
from .._math.scalars import nonnegative, positive, within_closed_unit
from .._math.tree import anywhere, cond, keep_finite, select
from .._math.types import Counter, Model, Parameters, Scalar, Where
from .base import AnyPreconditioner, is_due
from .damping import DampingMultiple, DampingRule, RelativeDamping


class EigenbasisAdamState(eqx.Module):
    """What [`kfax.EigenbasisAdam`][] keeps between steps.

    **Fields:**

    - `curvature`: the state of the estimator.
    - `is_stale`: whether the bases are to be computed in full at the next step.
    - `bases`: the orthogonal matrices of each block, by key, with basis vectors as columns: that of each of its dense
        factors. At first they are identities.
    - `first`: the running averages of the gradients, `(*leading, d_g, d_a)`, by key. [loss/param]
    - `second`: of their squares in the bases, in the shape of the block's eigenvalues, by key. [loss²/param²]
    """

    curvature: Any
    is_stale: Bool[Array, ""]
    bases: dict[str, Any]
    first: MovingAverage
    second: MovingAverage


class EigenbasisAdam(AnyPreconditioner):
    r"""Adam in the eigenbasis of each block, to be given in place of a [`kfax.Preconditioner`][].

    With $U_G$ and $U_A$ the eigenvectors of a Kronecker-factored block, and the gradient $\nabla_t$ of its matrix V,
    the direction of a step is

    $$U_G \left[ \frac{U_G^\top\, \hat m_t\, U_A}{\sqrt{v_t + \epsilon \bar v_t + \lambda}} \right] U_A^\top, \qquad
    v_t = b_2\, v_{t-1} + (1 - b_2)\, (U_G^\top\, \nabla_t\, U_A)^2, \qquad
    m_t = b_1\, m_{t-1} + (1 - b_1)\, \nabla_t,$$

    where squares, roots and quotients are those of each number, and both averages are divided by the sum of their
    weights. m̂ is the average after the same gradient once more (Nesterov's momentum), $\bar v$ the mean of all numbers
    in v, and ε the relative damping. Where a block has no dense factors, as [`kfax.Diagonal`][] blocks have not, it is
    Adam itself, and with [`kfax.Full`][] blocks the basis is that of all numbers of a layer.

    On mini-batches this is worth more than the inverse of the curvature, and costs less: what a number
    is divided by follows the gradients themselves, at every step, and from the curvature only the directions are taken,
    which change slowly. So statistics are taken only every `period` steps, when the bases are turned after them by a
    step of the power method, of about 5 d³ flops for each factor; every step multiplies each matrix six times by its
    bases. The directions know no unit: the loss may be multiplied by
    what you like (as long as λ stays negligible).

    Numbers beyond `limit` are cut: where a basis turns, squares are for a while those of another direction. The
    relative damping keeps directions of which little is seen, some of them but rounding errors, from moving as far as
    all others.

    ??? cite "Source"
        Vyas et al. 2024, arXiv:2409.11321 (SOAP), algorithm 3. Differs: the bases are those of K-FAC's factors rather
        than of the gradient's; Nesterov's momentum; the limit and the relative damping.
    """

    estimator: BlockDiagonalCurvature
    b1: Scalar
    b2: Scalar
    limit: Scalar
    relative_damping: Scalar
    period: int = eqx.field(static=True)

    def __init__(
        self,
        estimator: BlockDiagonalCurvature | None = None,
        *,
        period: int = 10,
        b1: ArrayLike = 0.9,
        b2: ArrayLike = 0.95,
        limit: ArrayLike = 2.0,
        relative_damping: ArrayLike = 0.01,
    ):
        """**Arguments:**

        - `estimator`: of the curvature; `kfax.BlockDiagonalCurvature(decay=0.6)` if not given, since it is updated so
            seldom.
        - `period`: how many steps between updates of the statistics, and turns of the bases.
        - `b1`, `b2`: the decays of the averages of gradients and of squares, in [0, 1]; 1 is the plain mean.
        - `limit`: the largest number in a basis, before it is multiplied by the learning rate.
        - `relative_damping`: ε ≥ 0.

        **Raises:** `ValueError` for values out of their range, or another estimator.
        """
        estimator = BlockDiagonalCurvature(decay=0.6) if estimator is None else estimator
        if not isinstance(estimator, BlockDiagonalCurvature):
            raise ValueError(f"`estimator` must be a `kfax.BlockDiagonalCurvature(...)`, got {estimator!r}.")
        if estimator.placement is not None:
            raise ValueError(
                "`kfax.EigenbasisAdam` turns all bases on all devices: give its estimator no `placement`, or use "
                "`kfax.Preconditioner`."
            )
        self.estimator = estimator
        self.b1, self.b2 = within_closed_unit("b1", b1), within_closed_unit("b2", b2)
        self.limit = positive("limit", limit)
        self.relative_damping = nonnegative("relative_damping", relative_damping)
        self.period = whole_number("period", period)

    @property
    def damping(self) -> DampingRule:
        return DampingMultiple(1.0)

    @property
    def batch(self) -> None:
        return None

    @property
    def exponent(self) -> float:
        return -0.5

    @property
    def curvature_update_period(self) -> int:
        return self.period

    def check_settings(self, is_relative: bool, micro_batches: int) -> None:
        del micro_batches
        if is_relative:
            raise ValueError(
                "`kfax.EigenbasisAdam` adds λ to squares of gradients, of which `kfax.RelativeDamping` knows nothing. "
                "Give λ as a number, such as 1e-16."
            )

    def init(self, model: Model, parameters: Parameters, frozen: Where | None) -> EigenbasisAdamState:
        curvature, found = self.estimator.init(model, frozen=frozen), parts(parameters)
        for key, part in found.items():
            if part.block.given(part.operation.shape(), curvature.average.value[key]) is not None:
                raise ValueError(
                    f"`{key}` has the block {part.block}, which measures in a basis or with weights of its own. "
                    "`kfax.EigenbasisAdam` takes eigenvectors only: give the layer `kfax.KroneckerFactored()`, with "
                    "`kfax.set_block` for instance."
                )
        axes = axes_of(found, curvature.average.value)
        squares = {key: spectrum.values for key, spectrum in spectra_in(axes, no_bases(axes)).items()}
        return EigenbasisAdamState(
            curvature=curvature,
            is_stale=jnp.ones((), bool),
            bases=no_bases(axes),
            first=MovingAverage.zeros(to_matrices(wide(parameters))),
            second=MovingAverage.zeros(squares),
        )

    def dampings(
        self,
        damping: DampingRule | RelativeDamping,
        number: Scalar,
        l2: Scalar | dict[str, Scalar] | None,
        state: EigenbasisAdamState,
        parameters: Parameters,
        step: Counter,
    ) -> tuple[Scalar, Scalar]:
        """λ as it is: what L2 adds to the gradients is in their squares."""
        del damping, l2, state, parameters, step
        return number, nonnegative("damping", number)

    def maybe_refresh(
        self,
        state: EigenbasisAdamState,
        parameters: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        step: Counter,
    ) -> tuple[EigenbasisAdamState, Bool[Array, ""]]:
        """In full at first, and otherwise, where it is due, by a step of the power method."""
        anew = state.is_stale
        turns = is_due(step, self.period) & ~anew
        nothing = lambda state: (state, jnp.zeros((), bool))  # noqa: E731
        first = lambda: self._renew(state, parameters, anew, in_full=True)  # noqa: E731
        state, failed = cond(anywhere(anew), first, lambda: nothing(state))
        later = lambda: self._renew(state, parameters, turns, in_full=False)  # noqa: E731
        state, has_failed = cond(anywhere(turns), later, lambda: nothing(state))
        return state, failed | has_failed

    def refresh(
        self, state: EigenbasisAdamState, parameters: Parameters, damping: Scalar | Mapping[str, Scalar]
    ) -> tuple[EigenbasisAdamState, Bool[Array, ""]]:
        return self._renew(state, parameters, jnp.ones((), bool), in_full=True)

    def apply(
        self,
        state: EigenbasisAdamState,
        gradient: Parameters,
        damping: Scalar | Mapping[str, Scalar],
        is_good: Bool[Array, ""],
    ) -> tuple[EigenbasisAdamState, Parameters]:
        assert not isinstance(damping, Mapping)  # of the blocks apart: see `dampings`
        spectra = spectra_in(self._axes(state, gradient), state.bases)
        matrices = to_matrices(wide(gradient))
        squares = {key: _square(spectra[key].split(matrix)) for key, matrix in matrices.items()}
        first, second = state.first.update(matrices, self.b1), state.second.update(squares, self.b2)
        ahead = first.update(matrices, self.b1).value

        def direction(key):
            spectrum, squares = spectra[key], second.value[key]
            mean = jnp.mean(squares, axis=(-2, -1), keepdims=True)
            damped = squares + self.relative_damping.astype(squares.dtype) * mean + damping.astype(squares.dtype)
            numbers = spectrum.split(ahead[key]) * jax.lax.rsqrt(damped)
            limit = self.limit.astype(numbers.dtype)
            return spectrum.join(jnp.clip(numbers, -limit, limit)).reshape(ahead[key].shape)

        averages = select(is_good, (first, second), (state.first, state.second))
        state = eqx.tree_at(lambda s: (s.first, s.second), state, averages)
        return state, from_matrices(gradient, {key: direction(key) for key in matrices})

    def _renew(
        self, state: EigenbasisAdamState, parameters: Parameters, is_wanted: Bool[Array, ""], in_full: bool
    ) -> tuple[EigenbasisAdamState, Bool[Array, ""]]:
        axes = self._axes(state, parameters)
        new = full_bases(axes) if in_full else turned_bases(axes, state.bases)
        known = self.estimator.weight(state.curvature) > 0
        bases, failed = keep_finite(new, state.bases, known, is_wanted)
        stale = jnp.where(is_wanted, failed, state.is_stale)
        return eqx.tree_at(lambda s: (s.bases, s.is_stale), state, (bases, stale)), failed

    def _axes(self, state: EigenbasisAdamState, parameters: Parameters) -> dict[str, Product]:
        return axes_of(parts(parameters), state.curvature.average.value)


def _square(x: Array) -> Array:
    """As much as its dtype holds."""
    return jnp.minimum(x * x, jnp.finfo(x.dtype).max)
