"""Curvature whose blocks are each on one device."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._blocks import (
    costs_of,
    EigenvalueCorrected,
    FrobeniusOptimal,
    groups_of,
    immovable,
    Kinds,
    KLOptimal,
    Piece,
    pieces_of,
)
from .._capture import Linearization, linearize, Problem
from .._layers import from_matrices, parts, split_parameters, to_matrices
from .._math.mesh import on_automatic_axes
from .._math.moving_average import MovingAverage
from .._math.tree import all_finite, keep_finite, select
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .base import CurvatureEstimator, inverse_of, operator_of
from .block_curvature import BlockCurvature
from .block_diagonal import BlockDiagonalCurvature, BlockDiagonalState, read_statistics
from .damping import damping_by_key, damping_by_parameter
from .eigendecomposition import BlockEigendecomposition
from .placement import Groups, Kept, Placement
from .products import block_shapes, blocks_of, BlockShapes, check_keys, check_state
from .refresh import inverses_of, whole


class PlacedState(eqx.Module):
    """The state of a `PlacedCurvature`: rows of numbers, one for each device of the mesh, and on that one only.

    **Fields:**

    - `average`: of the statistics of each device's blocks.
    - `inverses`: of these blocks.
    - `shapes`: of each block's matrix V, by key.
    """

    average: MovingAverage
    inverses: Kept
    shapes: BlockShapes = eqx.field(static=True)


class PlacedCurvature(CurvatureEstimator):
    """A block-diagonal curvature that is kept in parts: of each block, factors and inverse are on one device only.

    It is the curvature of the [`kfax.BlockDiagonalCurvature`][] that it is made of, to rounding. The memory for factors
    and inverses, and the work of a refresh, are shared out among the devices; a stack of layers is split. Every device
    keeps as many numbers as the one with the most, so that the largest block is the limit. At an update the statistics
    of the batch are summed over all devices, as without this class, and each keeps its own. At each `solve` (and
    `multiply`, `diagonal`) the results are sent, one number for each parameter; at a refresh nothing. What takes the
    whole curvature (`to_dense`, `decompose`, `power`) gathers all of it.

    ??? cite "Source"
        Pauloski et al. 2021, arXiv:2107.01739 (KAISA), the setting of least memory; there the factors are on all
        devices.
    """

    estimator: BlockDiagonalCurvature
    placement: Placement

    def __init__(self, estimator: BlockDiagonalCurvature, placement: Placement):
        """**Arguments:**

        - `estimator`: what is estimated, and how; without a placement of its own.
        - `placement`: the devices, and the axes of their mesh along which blocks are shared out.

        **Raises:** `ValueError` for something else than that.
        """
        if not isinstance(estimator, BlockDiagonalCurvature) or not isinstance(placement, Placement):
            raise ValueError(
                "`kfax.PlacedCurvature` takes a `kfax.BlockDiagonalCurvature(...)` and a `kfax.Placement(mesh)`, got "
                f"{estimator!r} and {placement!r}."
            )
        if estimator.placement is not None:
            raise ValueError(
                "The estimator of a `kfax.PlacedCurvature` has a placement of its own, which would not be used. Write "
                "`kfax.PlacedCurvature(kfax.BlockDiagonalCurvature(), placement)`."
            )
        self.estimator, self.placement = estimator, placement

    # -- taking in batches --

    def check(self, problem: Problem) -> None:
        self.estimator.check(problem)

    def init(self, model: Model, *, frozen: Where | None = None) -> PlacedState:
        parameters, _ = split_parameters(model, frozen)
        pieces = self._pieces(parameters)
        groups = groups_of(costs_of(pieces), self.placement.num_devices)
        nothing = dict.fromkeys(pieces, np.zeros(()))

        def zeros(given):
            return {key: pieces[key].block.init(pieces[key].shape).statistics for key in given}, _NEVER

        def inverses(given):
            return {key: immovable(pieces[key].block.init(pieces[key].shape).inverse) for key in given}, _NEVER

        average, _ = self.placement.run(zeros, groups, nothing)
        kept, _ = self.placement.run(inverses, groups, nothing)
        weight = jnp.zeros((), jnp.result_type(float))
        return PlacedState(MovingAverage(average, weight), kept, block_shapes(parts(parameters)))

    def linearize(self, problem: Problem, state: PlacedState) -> Linearization:
        keys, found = [key for key, _ in check_state(state, PlacedState).shapes], parts(problem.parameters)
        check_keys(keys, found)
        # No block that can be kept in parts asks for its statistics.
        read = functools.partial(read_statistics, dict.fromkeys(keys))
        counts_uses = any(part.block.counts_uses for part in found.values())
        return linearize(problem, read, example_axis=self.estimator.example_axis, counts_uses=counts_uses)

    def measure(self, linearization: Linearization, key: PRNGKey | None) -> MovingAverage:
        return self.estimator.measure(linearization, key)

    def fold(self, state: PlacedState, measured: MovingAverage) -> PlacedState:
        check_keys([key for key, _ in state.shapes], measured.value)
        kept = self._shared_out(state.inverses.groups, measured.value)
        average = state.average.update(kept, self.estimator.decay, measured.weight)
        return PlacedState(average, state.inverses, state.shapes)

    def fold_finite(
        self, state: PlacedState, measured: MovingAverage, is_good: Bool[Array, ""]
    ) -> tuple[PlacedState, Bool[Array, ""]]:
        finite = all_finite((measured, self.estimator.decay))
        average = select(is_good & finite, self.fold(state, measured).average, state.average)
        return PlacedState(average, state.inverses, state.shapes), ~finite

    def weight(self, state: PlacedState) -> Scalar:
        return state.average.weight

    def nothing(self, state: PlacedState) -> MovingAverage:
        shapes = jax.eval_shape(lambda: whole(self.placement.gather(state.average.value)))
        return MovingAverage.zeros(shapes)

    def add(self, measured: MovingAverage, more: MovingAverage) -> MovingAverage:
        return self.estimator.add(measured, more)

    # -- what is costly --

    @on_automatic_axes
    def refresh(
        self, state: PlacedState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> PlacedState:
        def new(kinds, statistics, inverses, dampings):
            return inverses_of(kinds, statistics, dampings), _NEVER

        return self._refreshed(new, state, parameters, damping)[0]

    def refresh_finite(
        self,
        state: PlacedState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[PlacedState, Bool[Array, ""]]:
        def new(kinds, statistics, inverses, dampings):
            chosen = {key: kind for key, kind in kinds.items() if only is None or key[0] in only}
            made = inverses_of(chosen, statistics, dampings)
            kept, failed = keep_finite(made, inverses, jnp.asarray(True), True)
            return inverses | kept, failed

        known = self.weight(state) > 0
        refreshed, failed = self._refreshed(new, state, parameters, damping)
        failed |= ~known
        return select(known & is_wanted, refreshed, state), failed & is_wanted

    def redamp(
        self, state: PlacedState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> PlacedState:
        def new(kinds, statistics, inverses, dampings):
            return {key: inverse.redamp(dampings[key]) for key, inverse in inverses.items()}, _NEVER

        return self._refreshed(new, state, parameters, damping)[0]

    def decompose(self, state: PlacedState, parameters: Parameters) -> BlockEigendecomposition:
        return self.estimator.decompose(self.gathered(state), parameters)

    def power(
        self, state: PlacedState, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0
    ) -> Parameters:
        return self.estimator.power(self.gathered(state), vector, exponent, damping)

    def eigenvalues(self, state: PlacedState, parameters: Parameters) -> Float[Array, " p"]:
        return self.estimator.eigenvalues(self.gathered(state), parameters)

    # -- what is cheap --

    @on_automatic_axes
    def solve(self, state: PlacedState, vector: Parameters) -> Parameters:
        def one(piece, inverse, v):
            return inverse.solve(v)

        return self._by_block(one, check_state(state, PlacedState).inverses, state, vector)

    @on_automatic_axes
    def multiply(self, state: PlacedState, vector: Parameters) -> Parameters:
        def one(piece, statistics, v):
            return piece.block.multiply(piece.shape, statistics, v)

        return self._by_block(one, check_state(state, PlacedState).average.value, state, vector)

    @on_automatic_axes
    def diagonal(self, state: PlacedState, parameters: Parameters) -> Parameters:
        def one(piece, statistics, v):
            return piece.block.diagonal(piece.shape, statistics).reshape(v.shape).astype(v.dtype)

        return self._by_block(one, check_state(state, PlacedState).average.value, state, parameters)

    def to_dense(self, state: PlacedState, parameters: Parameters) -> Float[Array, "p p"]:
        return self.estimator.to_dense(self.gathered(state), parameters)

    def as_operator(
        self, state: PlacedState, parameters: Parameters, damping: ArrayLike = 0.0
    ) -> lx.AbstractLinearOperator:
        by_parameter = damping_by_parameter(parameters, damping)
        return operator_of(lambda v: self.multiply(state, v), parameters, by_parameter, lx.positive_semidefinite_tag)

    def as_preconditioner(self, state: PlacedState, parameters: Parameters) -> lx.AbstractLinearOperator:
        return inverse_of(lambda v: self.solve(state, v), parameters)

    # -- as a whole --

    @on_automatic_axes
    def gathered(self, state: PlacedState) -> BlockDiagonalState:
        """The state of the estimator that this one is made of, on all devices.

        **Arguments:**

        - `state`: to be gathered.

        **Returns:** the state, with all factors and inverses.
        """
        values = whole(self.placement.gather(check_state(state, PlacedState).average.value))
        average = MovingAverage(values, state.average.weight)
        return BlockDiagonalState(average, whole(self.placement.gather(state.inverses)), state.shapes)

    @on_automatic_axes
    def placed(self, state: BlockDiagonalState, parameters: Parameters) -> PlacedState:
        """The inverse of `gathered`, exact, on any number of devices: for a state from a checkpoint.

        **Arguments:**

        - `state`: of the estimator that this one is made of: on one device by default, or on the placement's mesh.
        - `parameters`: of the model.

        **Returns:** the state, in parts.

        **Raises:** `ValueError` for a state of other parameters.
        """
        blocks_of(parameters, check_state(state, BlockDiagonalState).shapes)
        groups = groups_of(costs_of(self._pieces(parameters)), self.placement.num_devices)
        average, inverses = (self._shared_out(groups, by_key) for by_key in (state.average.value, state.inverses))
        return PlacedState(MovingAverage(average, state.average.weight), inverses, state.shapes)

    def blocks(self, state: PlacedState, parameters: Parameters) -> dict[str, BlockCurvature]:
        """As those of [`kfax.BlockDiagonalCurvature`][], of the gathered state."""
        return self.estimator.blocks(self.gathered(state), parameters)

    def refresh_flops(self, parameters: Parameters) -> dict[str, int]:
        """As that of [`kfax.BlockDiagonalCurvature`][], on all devices together."""
        return self.estimator.refresh_flops(parameters)

    def _pieces(self, parameters: Parameters) -> dict[tuple[str, int], Piece]:
        kinds = {key: (part.block, part.operation.shape()) for key, part in parts(parameters).items()}
        for key, (block, _) in kinds.items():
            if isinstance(block, EigenvalueCorrected | FrobeniusOptimal | KLOptimal):
                raise ValueError(
                    f"The block of `{key}` is {block}, whose statistics take its eigenbasis or its weights, on all "
                    "devices. Give the inverses a placement instead: "
                    "`kfax.BlockDiagonalCurvature(placement=placement)`; or use `kfax.KroneckerFactored()` or "
                    "`kfax.TensorNormal()`."
                )
        return pieces_of(kinds, self.placement.num_devices)

    def _shared_out(self, groups: Groups, by_key: Mapping[str, Any]) -> Kept:
        """What all devices have of each block, in parts."""
        stacks: dict[str, list[int]] = {}
        for key, index in sorted(key for group in groups for key in group):
            stacks.setdefault(key, []).append(index)

        def some(key, index):
            number = len(stacks[key])

            def cut(x):  # not a number that all layers share
                return x[x.shape[0] * index // number : x.shape[0] * (index + 1) // number] if x.ndim else x

            return by_key[key] if number == 1 else jax.tree.map(cut, by_key[key])

        given = {(key, index): some(key, index) for key, indices in stacks.items() for index in indices}
        return self.placement.run(lambda given: (given, _NEVER), groups, given)[0]

    def _refreshed(
        self,
        new: Callable[
            [Kinds, dict[Any, Any], dict[Any, Any], dict[Any, Any]], tuple[dict[Any, Any], Bool[Array, ""] | bool]
        ],
        state: PlacedState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
    ) -> tuple[PlacedState, Bool[Array, ""]]:
        """The state with new inverses, and whether any device tells of a failure."""
        pieces, found = self._pieces(parameters), blocks_of(parameters, check_state(state, PlacedState).shapes)
        by_key = damping_by_key(tuple(found), damping)

        def run(dampings, statistics, inverses):
            kinds = {key: (pieces[key].block, pieces[key].shape) for key in dampings}
            return new(kinds, statistics, inverses, dampings)

        given, kept = {key: by_key[key[0]] for key in pieces}, state.inverses
        inverses, failed = self.placement.run(run, kept.groups, given, state.average.value, kept)
        return PlacedState(state.average, inverses, state.shapes), failed

    def _by_block(
        self, function: Callable[[Piece, Any, Array], Array], own: Kept, state: PlacedState, vector: Parameters
    ) -> Parameters:
        """A function of each block's matrix, where the block is; the results on all devices."""
        blocks_of(vector, check_state(state, PlacedState).shapes)
        pieces, matrices = self._pieces(vector), to_matrices(vector)

        def run(given, mine):
            return {key: function(pieces[key], mine[key], v) for key, v in given.items()}, _NEVER

        given = {key: piece.of(matrices[key[0]]) for key, piece in pieces.items()}
        kept, _ = self.placement.run(run, own.groups, given, own)
        return from_matrices(vector, whole(self.placement.gather(kept)))


_NEVER = False
