"""Curvature that ignores what happens between layers."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .. import _linalg as linalg
from .._capture import Linearization, linearize, Reading
from .._ema import MovingAverage
from .._layers import from_matrices, Part, parts, to_matrices
from .._registry import split_parameters
from .._scalars import scalar, within_unit
from .._sources import CurvaturePropagation, CurvatureSource
from .._types import Model, Parameters, PRNGKey, Scalar, Where
from .base import CurvatureEstimator


class BlockDiagonalState(eqx.Module):
    """The state of a `BlockDiagonalCurvature`. Does not depend on the batch size.

    **Fields:**

    - `average`: of each block's statistics, by key: the path of the layer, and `/` and the operation's name if a layer
        has several. Changes with every update.
    - `inverses`: what `solve` applies, by key. Changes with every refresh.
    """

    average: MovingAverage
    inverses: dict[str, Any]


class BlockDiagonalCurvature(CurvatureEstimator):
    """One block for each tagged layer, of the kind that the layer declares; nothing between layers.

    An update runs the model forward and backward once (and as many more times backward as `source` asks for); a
    refresh costs what the blocks' inverses cost.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, sections 3 and 4.2; the running average is section 5's, without its
        initial bias.
    """

    source: CurvatureSource
    decay: Scalar
    example_axis: str | None = eqx.field(static=True)

    def __init__(
        self,
        source: CurvatureSource = CurvaturePropagation(),
        *,
        decay: ArrayLike = 0.95,
        example_axis: str | None = None,
    ):
        """**Arguments:**

        - `source`: which curvature matrix is estimated, and how.
        - `decay`: ε of the running average over updates, in (0, 1]; 1 is the plain mean.
        - `example_axis`: the `axis_name` of the `jax.vmap` over examples in `loss_fn`. Without it, the outermost
            mapped axis around a layer is taken to enumerate the examples.

        **Raises:** `ValueError` for a decay outside (0, 1].
        """
        if not isinstance(source, CurvatureSource):
            raise ValueError(f"`source` must be a curvature source, such as `kfax.ExactGGN()`, got {source!r}.")
        self.source = source
        self.decay = within_unit("decay", decay)
        self.example_axis = example_axis

    def init(self, model: Model, *, frozen: Where | None = None) -> BlockDiagonalState:
        parameters, _ = split_parameters(model, frozen)
        blocks = {key: part.block.init(part.operation.shape()) for key, part in parts(parameters).items()}
        average = MovingAverage.zeros({key: block.statistics for key, block in blocks.items()})
        return BlockDiagonalState(average, {key: block.inverse for key, block in blocks.items()})

    def linearize(
        self,
        loss_fn: Callable,
        model: Model,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        frozen: Where | None = None,
    ) -> Linearization:
        return linearize(
            loss_fn,
            model,
            batch,
            _read_statistics,
            example_axis=self.example_axis,
            frozen=frozen,
            key=key,
            model_state=model_state,
        )

    def fold(
        self, state: BlockDiagonalState, linearization: Linearization, parameters: Parameters, key: PRNGKey | None
    ) -> BlockDiagonalState:
        new = self._statistics(linearization, parts(parameters), key)
        return BlockDiagonalState(state.average.update(new, self.decay), state.inverses)

    def refresh(
        self, state: BlockDiagonalState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> BlockDiagonalState:
        """**Arguments:**

        - `state`: with the statistics to be used.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, or one for each block by key. [loss/param²]

        **Returns:** the state with new inverses. Matrices of one size, of whatever layers, are inverted in one call.
        """
        found, values = parts(parameters), state.average.value
        dampings = damping if isinstance(damping, Mapping) else dict.fromkeys(found, damping)
        scalars = {key: scalar("damping", dampings[key]) for key in found}
        matrices = {key: part.block.matrices(values[key], scalars[key]) for key, part in found.items()}
        leaves, structure = jax.tree.flatten(matrices)
        inverses = jax.tree.unflatten(structure, linalg.by_size(linalg.psd_inverse, leaves))
        refreshed, previous = {}, inverses
        for key, part in found.items():
            statistics = values[key]
            if not matrices[key]:
                # What the block computes by itself has to wait its turn.
                statistics = jax.tree.map(lambda leaf, after=previous: linalg.after(leaf, after), statistics)
            refreshed[key] = part.block.refresh(statistics, scalars[key], inverses[key])
            if not matrices[key]:
                previous = refreshed[key]
        return BlockDiagonalState(state.average, refreshed)

    def solve(self, state: BlockDiagonalState, vector: Parameters) -> Parameters:
        return _by_part(lambda key, block, v: block.solve(state.inverses[key], v), vector)

    def multiply(self, state: BlockDiagonalState, vector: Parameters) -> Parameters:
        return _by_part(lambda key, block, v: block.multiply(state.average.value[key], v), vector)

    def eigenvalues(self, state: BlockDiagonalState, parameters: Parameters) -> Float[Array, " p"]:
        found = parts(parameters)
        values = [part.block.eigenvalues(state.average.value[key]) for key, part in found.items()]
        return jnp.concatenate([value.reshape(-1) for value in values])

    def to_dense(self, state: BlockDiagonalState, parameters: Parameters) -> Float[Array, "p p"]:
        positions = to_matrices(_positions(parameters))
        leaves = jax.tree.leaves(parameters)
        size = sum(leaf.size for leaf in leaves)
        dense = jnp.zeros((size, size), jnp.result_type(*leaves))
        for key, part in parts(parameters).items():
            blocks = part.block.to_dense(state.average.value[key])
            blocks = blocks.reshape(-1, *blocks.shape[-2:])
            rows = positions[key].reshape(len(blocks), -1)
            for block, index in zip(blocks, rows, strict=True):
                dense = dense.at[index[:, None], index[None, :]].set(block.astype(dense.dtype))
        return dense

    def _statistics(
        self, linearization: Linearization, found: Mapping[str, Part], key: PRNGKey | None
    ) -> dict[str, Any]:
        """The statistics of one batch, by key."""
        losses, source = linearization.losses, self.source

        def one(index):
            recorded = linearization.observe(source.cotangents(losses, index, key))
            moments = {
                key: part.block.second_moment(part.operation.shape(), recorded[key].cotangents)
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
        return {
            key: part.block.statistics(
                part.operation.shape(), recorded[key].inputs, moments[key], weights, num_examples
            )
            for key, part in found.items()
        }


def _read_statistics(part: Part, num_examples: int) -> Reading:
    block, shape = part.block, part.operation.shape()

    def statistic(operation, use):
        return block.record(shape, operation, use)

    return Reading(block.slot(shape, num_examples), statistic, block.is_sum)


def _by_part(function: Callable, vector: Parameters) -> Parameters:
    found, matrices = parts(vector), to_matrices(vector)
    return from_matrices(vector, {key: function(key, part.block, matrices[key]) for key, part in found.items()})


def _positions(parameters: Parameters) -> Parameters:
    """Where each number stands in the raveled parameters."""
    leaves, structure = jax.tree.flatten(parameters)
    ends = np.cumsum([leaf.size for leaf in leaves])
    indices = [jnp.arange(end - leaf.size, end).reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, indices)
