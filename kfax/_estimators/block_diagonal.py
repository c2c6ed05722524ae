"""Curvature that ignores what happens between layers."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._blocks import immovable, Inverse
from .._capture import check_observed, Linearization, linearize, Problem, Reading
from .._layers import from_matrices, Part, parts, split_parameters, to_matrices
from .._math import linalg
from .._math.arguments import axis_name
from .._math.mesh import on_automatic_axes
from .._math.moving_average import MovingAverage
from .._math.scalars import within_unit
from .._math.tree import all_finite, keep_finite, select
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .base import (
    check_source,
    CurvatureEstimator,
    inverse_of,
    operator_of,
    total_weight,
)
from .block_curvature import BlockCurvature
from .damping import damping_by_key, damping_by_parameter
from .eigendecomposition import BlockEigendecomposition
from .placement import Placement
from .products import block_shapes, blocks_of, BlockShapes, check_keys, check_state, chosen_of
from .refresh import factorize, inverses_of, placed_inverses_of
from .sources import column, CurvaturePropagation, CurvatureSource


class BlockDiagonalState(eqx.Module):
    """The state of a `BlockDiagonalCurvature`. Does not depend on the batch size.

    **Fields:**

    - `average`: of each block's statistics, by key: the path of the layer, and `/` and the operation's name if a layer
        has several. Changes with every update.
    - `inverses`: what `solve` applies, by key. Changes with every refresh.
    - `shapes`: of each block's matrix V, by key.
    """

    average: MovingAverage
    inverses: dict[str, Inverse]
    shapes: BlockShapes = eqx.field(static=True)


class BlockDiagonalCurvature(CurvatureEstimator):
    """One block for each tagged layer, of the kind that the layer declares; nothing between layers.

    An update runs the model forward once and backward as many times as `source` asks for (within a step, the forward
    pass is that of the gradient); a refresh costs what the blocks' inverses cost.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, sections 3 and 4.2; the running average is section 5's, without its
        initial bias.
    """

    source: CurvatureSource
    decay: Scalar
    example_axis: str | None = eqx.field(static=True)
    placement: Placement | None

    def __init__(
        self,
        source: CurvatureSource = CurvaturePropagation(),
        *,
        decay: ArrayLike = 0.95,
        example_axis: str | None = None,
        placement: Placement | None = None,
    ):
        """**Arguments:**

        - `source`: which curvature matrix is estimated, and how.
        - `decay`: ε of the running average over updates, in (0, 1]; 1 is the plain mean.
        - `example_axis`: the `axis_name` of the `jax.vmap` over examples in `loss_fn`. Without it, the outermost
            mapped axis around a layer is taken to enumerate the examples.
        - `placement`: which devices of a mesh compute which inverses, [`kfax.Placement`][]`(mesh)` for instance; all of
            them all inverses, if not given.

        **Raises:** `ValueError` for a decay outside (0, 1], or a placement that is none.
        """
        self.source = check_source(source)
        self.decay = within_unit("decay", decay)
        self.example_axis = axis_name("example_axis", example_axis)
        if not (placement is None or isinstance(placement, Placement)):
            raise ValueError(f"`placement` must be a `kfax.Placement(mesh)` or `None`, got {placement!r}.")
        self.placement = placement

    def init(self, model: Model, *, frozen: Where | None = None) -> BlockDiagonalState:
        parameters, _ = split_parameters(model, frozen)
        found = parts(parameters)
        shapes = {key: part.operation.shape() for key, part in found.items()}
        distinct = {(part.block, shapes[key]) for key, part in found.items()}  # to trace each kind of layer once
        states = {kind: eqx.filter_eval_shape(lambda kind=kind: kind[0].init(kind[1])) for kind in distinct}
        blocks = {key: states[part.block, shapes[key]] for key, part in found.items()}
        average = MovingAverage.zeros({key: block.statistics for key, block in blocks.items()})
        inverses = {key: immovable(block.inverse) for key, block in blocks.items()}
        return BlockDiagonalState(average, inverses, block_shapes(found))

    def check(self, problem: Problem) -> None:
        check_observed(problem, self.example_axis)

    def linearize(self, problem: Problem, state: BlockDiagonalState) -> Linearization:
        found = parts(problem.parameters)
        check_keys(check_state(state, BlockDiagonalState).inverses, found)
        read = functools.partial(read_statistics, state.average.value)
        counts_uses = any(part.block.counts_uses for part in found.values())
        return linearize(problem, read, example_axis=self.example_axis, counts_uses=counts_uses)

    def measure(self, linearization: Linearization, key: PRNGKey | None) -> MovingAverage:
        found = parts(linearization.problem.parameters)
        return MovingAverage(self._statistics(linearization, found, key), total_weight(linearization.losses))

    def fold(self, state: BlockDiagonalState, measured: MovingAverage) -> BlockDiagonalState:
        check_keys(state.inverses, measured.value)
        average = state.average.update(measured.value, self.decay, measured.weight)
        return BlockDiagonalState(average, state.inverses, state.shapes)

    def fold_finite(
        self, state: BlockDiagonalState, measured: MovingAverage, is_good: Bool[Array, ""]
    ) -> tuple[BlockDiagonalState, Bool[Array, ""]]:
        finite = all_finite((measured, self.decay))
        average = select(is_good & finite, self.fold(state, measured).average, state.average)
        return BlockDiagonalState(average, state.inverses, state.shapes), ~finite

    def weight(self, state: BlockDiagonalState) -> Scalar:
        return state.average.weight

    def nothing(self, state: BlockDiagonalState) -> MovingAverage:
        return MovingAverage.zeros(state.average.value)

    def add(self, measured: MovingAverage, more: MovingAverage) -> MovingAverage:
        return measured.update(more.value, jnp.ones(()), more.weight)

    @on_automatic_axes
    def refresh(
        self,
        state: BlockDiagonalState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
    ) -> BlockDiagonalState:
        """**Arguments:**

        - `state`: with the statistics to be used.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, or one for each block by key. [loss/param²]
        - `only`: keys of the blocks to be refreshed; all if not given.

        **Returns:** the state with new inverses, and with the statistics of [`kfax.EigenvalueCorrected`][] blocks in
        their new bases, those of [`kfax.FrobeniusOptimal`][] and [`kfax.KLOptimal`][] with their new weights. Matrices
        of one size, of whatever layers, are inverted in one call.
        """
        found, dampings = _by_key(state, parameters, damping)
        values, chosen = state.average.value, chosen_of(found, only)
        kinds = {key: (part.block, part.operation.shape()) for key, part in chosen.items()}
        if self.placement is None:
            new = inverses_of(kinds, values, dampings)
        else:
            new = placed_inverses_of(self.placement, kinds, values, dampings)
        rebased = {key: block.rebase(shape, values[key], new[key]) for key, (block, shape) in kinds.items()}
        return _with(state, values | rebased, state.inverses | new)

    def blocks(self, state: BlockDiagonalState, parameters: Parameters) -> dict[str, BlockCurvature]:
        """The blocks of C one by one, to look at or to work with.

        **Arguments:**

        - `state`: with the statistics to be used.
        - `parameters`: any PyTree like the parameters; its values are not used.

        **Returns:** by key, as in [`kfax.coverage`][], a [`kfax.BlockCurvature`][].
        """
        found, values = blocks_of(parameters, check_state(state, BlockDiagonalState).shapes), state.average.value
        return {key: BlockCurvature(part.block, part.operation.shape(), values[key]) for key, part in found.items()}

    def refresh_flops(self, parameters: Parameters) -> dict[str, int]:
        """What a refresh costs, by key of the block.

        **Arguments:**

        - `parameters`: any PyTree like the parameters.

        **Returns:** floating-point operations, to leading order.
        """
        return {key: part.block.refresh_flops(part.operation.shape()) for key, part in parts(parameters).items()}

    def refresh_finite(
        self,
        state: BlockDiagonalState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[BlockDiagonalState, Bool[Array, ""]]:
        refreshed = self.refresh(state, parameters, damping, only)
        old, new = state.average.value, refreshed.average.value
        # Statistics that stayed as they were are left out: XLA would copy them.
        pairs = {key: zip(jax.tree.leaves(old[key]), jax.tree.leaves(new[key]), strict=True) for key in old}
        rebased = [key for key, leaves in pairs.items() if any(x is not y for x, y in leaves)]

        def pair(state, key):
            return state.inverses[key], state.average.value[key] if key in rebased else None

        keys = tuple(state.inverses) if only is None else only
        mine, before = ({key: pair(each, key) for key in keys} for each in (refreshed, state))
        kept, failed = keep_finite(mine, before, self.weight(state) > 0, is_wanted)
        values, inverses = old | {key: kept[key][1] for key in rebased}, {key: kept[key][0] for key in keys}
        return _with(state, values, state.inverses | inverses), failed

    def redamp(
        self, state: BlockDiagonalState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> BlockDiagonalState:
        """**Arguments:**

        - `state`: after a refresh.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, or one for each block by key. [loss/param²]

        **Returns:** the state with another damping for blocks inverted by [`kfax.Eigh`][], and for diagonal ones. All
        others keep that of the last refresh. [`kfax.EigenvalueCorrected`][] blocks get their present eigenvalues.
        """
        found, dampings = _by_key(state, parameters, damping)

        def one(key, part):
            statistics, inverse = state.average.value[key], state.inverses[key]
            return part.block.redamp(part.operation.shape(), statistics, inverse, dampings[key])

        return _with(state, state.average.value, {key: one(key, part) for key, part in found.items()})

    def restart(self, state: BlockDiagonalState, parameters: Parameters) -> BlockDiagonalState:
        """Forgets all batches, but not the eigenbases and weights that blocks measure with, nor any inverse.

        For a second pass over the same data, after a refresh. [`kfax.EigenvalueCorrected`][]: what is taken in then is
        measured in the eigenbases of all that was taken in before, so that `eigenvalues` are exactly the diagonal of
        `UᵀFU`, with F the exact blocks and U the eigenbases. [`redamp`][kfax.BlockDiagonalCurvature.redamp] lets
        `solve` have them. [`kfax.FrobeniusOptimal`][] and [`kfax.KLOptimal`][]: each further pass is one more step of
        the iteration to the best product. Other blocks gain nothing.

        **Arguments:**

        - `state`: after a refresh.
        - `parameters`: any PyTree like the parameters; its values are not used.

        **Returns:** the state, of no batch.
        """

        def of_no_example(key, part):
            block, shape = part.block, part.operation.shape()
            empty, given = block.slot(shape, 1, False), block.given(shape, state.average.value[key])
            moment = block.second_moment(shape, empty.cotangents, given)
            return block.statistics(shape, empty.inputs, moment, None, 1, given)

        found = blocks_of(parameters, check_state(state, BlockDiagonalState).shapes)
        values = {key: of_no_example(key, part) for key, part in found.items()}
        average = MovingAverage(values, jnp.zeros_like(self.weight(state)))
        return BlockDiagonalState(average, state.inverses, state.shapes)

    def decompose(self, state: BlockDiagonalState, parameters: Parameters) -> BlockEigendecomposition:
        found, values = blocks_of(parameters, check_state(state, BlockDiagonalState).shapes), state.average.value
        factors = {key: part.block.factors(part.operation.shape(), values[key]) for key, part in found.items()}
        pairs = factorize(linalg.eigh, factors)
        spectra = {
            key: part.block.spectrum(part.operation.shape(), values[key], pairs[key]) for key, part in found.items()
        }
        return BlockEigendecomposition(spectra, state.shapes)

    def power(
        self, state: BlockDiagonalState, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0
    ) -> Parameters:
        return self.decompose(state, vector).power(vector, exponent, damping)

    def eigenvalues(self, state: BlockDiagonalState, parameters: Parameters) -> Float[Array, " p"]:
        return self.decompose(state, parameters).eigenvalues()

    def solve(self, state: BlockDiagonalState, vector: Parameters) -> Parameters:
        return _by_part(lambda key, part, v: state.inverses[key].solve(v), state, vector)

    def multiply(self, state: BlockDiagonalState, vector: Parameters) -> Parameters:
        def one(key, part, v):
            return part.block.multiply(part.operation.shape(), state.average.value[key], v)

        return _by_part(one, state, vector)

    def diagonal(self, state: BlockDiagonalState, parameters: Parameters) -> Parameters:
        def one(key, part, v):
            diagonal = part.block.diagonal(part.operation.shape(), state.average.value[key])
            return diagonal.reshape(v.shape).astype(v.dtype)

        return _by_part(one, state, parameters)

    def to_dense(self, state: BlockDiagonalState, parameters: Parameters) -> Float[Array, "p p"]:
        found = blocks_of(parameters, check_state(state, BlockDiagonalState).shapes)
        positions, leaves = to_matrices(_positions(parameters)), jax.tree.leaves(parameters)
        size = sum(leaf.size for leaf in leaves)
        dense = jnp.zeros((size, size), jnp.result_type(jnp.float32, *leaves))
        for key, part in found.items():
            blocks = part.block.to_dense(part.operation.shape(), state.average.value[key])
            blocks = blocks.reshape(-1, *blocks.shape[-2:])
            rows = positions[key].reshape(len(blocks), -1)
            for block, index in zip(blocks, rows, strict=True):
                dense = dense.at[index[:, None], index[None, :]].set(block.astype(dense.dtype))
        return dense

    def as_operator(
        self, state: BlockDiagonalState, parameters: Parameters, damping: ArrayLike = 0.0
    ) -> lx.AbstractLinearOperator:
        by_parameter = damping_by_parameter(parameters, damping)
        function = lambda v: self.multiply(state, v)  # noqa: E731
        return operator_of(function, parameters, by_parameter, lx.positive_semidefinite_tag)

    def as_preconditioner(self, state: BlockDiagonalState, parameters: Parameters) -> lx.AbstractLinearOperator:
        return inverse_of(lambda v: self.solve(state, v), parameters)

    def _statistics(
        self, linearization: Linearization, found: Mapping[str, Part], key: PRNGKey | None
    ) -> dict[str, Any]:
        """The statistics of one batch, by key."""
        losses, source = linearization.losses, self.source

        def one(index):
            recorded = linearization.observe(column(source, losses, index, key))
            moments = {
                key: part.block.second_moment(
                    part.operation.shape(), recorded[key].cotangents, linearization.given[key]
                )
                for key, part in found.items()
            }
            return recorded, moments

        recorded, moments = one(jnp.zeros((), int))
        number = source.num_cotangents(losses)
        if number > 1:

            def add(total, index):
                return jax.tree.map(jnp.add, total, one(index)[1]), None

            moments, _ = jax.lax.scan(add, moments, jnp.arange(1, number))

        weights, num_examples = linearization.weights, linearization.evaluation.num_examples

        def mean(key, part):
            inputs, given = recorded[key].inputs, linearization.given[key]
            return part.block.statistics(part.operation.shape(), inputs, moments[key], weights, num_examples, given)

        return {key: mean(key, part) for key, part in found.items()}


def read_statistics(known: Mapping[str, Any], part: Part, num_examples: int, is_only: bool) -> Reading:
    """How the statistics of a part are read, given those that are known."""
    block, shape = part.block, part.operation.shape()

    def statistic(operation, use):
        return block.record(shape, operation, dataclasses.replace(use, is_only=is_only))

    zeros, given = block.slot(shape, num_examples, is_only), block.given(shape, known[part.key])
    return Reading(zeros, statistic, block.is_sum, given)


def _with(state: BlockDiagonalState, values: dict[str, Any], inverses: dict[str, Inverse]) -> BlockDiagonalState:
    """A state with other statistics and inverses, of the same batches."""
    return BlockDiagonalState(MovingAverage(values, state.average.weight), inverses, state.shapes)


def _by_key(
    state: BlockDiagonalState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
) -> tuple[dict[str, Part], dict[str, Scalar]]:
    """The parts of the parameters, and a damping for each."""
    found = blocks_of(parameters, check_state(state, BlockDiagonalState).shapes)
    return found, damping_by_key(tuple(found), damping)


def _by_part(function: Callable, state: BlockDiagonalState, vector: Parameters) -> Parameters:
    found, matrices = blocks_of(vector, check_state(state, BlockDiagonalState).shapes), to_matrices(vector)
    return from_matrices(vector, {key: function(key, part, matrices[key]) for key, part in found.items()})


def _positions(parameters: Parameters) -> Parameters:
    """Where each number stands in the raveled parameters."""
    leaves, structure = jax.tree.flatten(parameters)
    ends = np.cumsum([leaf.size for leaf in leaves])
    indices = [jnp.arange(end - leaf.size, end).reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, indices)
