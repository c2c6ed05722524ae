"""What each of several devices keeps, computes and sends, in each of the ways to share out curvature."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._blocks import BlockState, costs_of, Groups, groups_of, is_costly, Kinds, Piece, pieces_of
from .._math.types import PyTree


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """What one of several devices keeps, computes and sends, where each has a part of the batch and all parameters.

    Bytes that are summed or gathered are the size of the result, as it stands in the compiled program. Of what is
    summed over n devices each sends 2 (n - 1) / n, of what is gathered (n - 1) / n, by a ring.

    **Fields:**

    - `setting`: `"replicated"`; `"Placement"` for a [`kfax.BlockDiagonalCurvature`][] with a [`kfax.Placement`][] of
        all devices; `"PlacedCurvature"` for a [`kfax.PlacedCurvature`][].
    - `num_devices`: n.
    - `parameter_bytes`: of what is trained. The velocity takes as many.
    - `statistics_bytes`, `inverse_bytes`: of curvature state: the most that a device keeps.
    - `gradient_summed`: bytes that are summed over all devices, in each step.
    - `statistics_summed`: the same in each update of the statistics; one number less for each matrix of a Kronecker
        block, in how many positions it is used, where that is no matter of weights and masks.
    - `inverses_gathered`: bytes that are gathered in a refresh of all blocks, an equally long row from each device; or
        twice the bytes of all rows, if that is less: then these are summed.
    - `solution_gathered`: the same in each step, of preconditioned gradients.
    - `refresh_flops`, `solve_flops`: the most that a device computes, in a refresh and in a step.
    """

    setting: str
    num_devices: int
    parameter_bytes: int
    statistics_bytes: int
    inverse_bytes: int
    gradient_summed: int
    statistics_summed: int
    inverses_gathered: int
    solution_gathered: int
    refresh_flops: int
    solve_flops: int

    @property
    def state_bytes(self) -> int:
        """Parameters, velocity, statistics and inverses together."""
        return 2 * self.parameter_bytes + self.statistics_bytes + self.inverse_bytes

    @property
    def sent_per_step(self) -> int:
        """Bytes that a device sends in a step that neither takes statistics nor refreshes."""
        return self._sent(self.gradient_summed, self.solution_gathered)

    @property
    def sent_per_update(self) -> int:
        """Bytes that it sends, besides, in an update of the statistics."""
        return self._sent(self.statistics_summed, 0)

    @property
    def sent_per_refresh(self) -> int:
        """Bytes that it sends, besides, in a refresh of all blocks."""
        return self._sent(0, self.inverses_gathered)

    def _sent(self, summed: int, gathered: int) -> int:
        return (2 * summed + gathered) * (self.num_devices - 1) // self.num_devices


def device_rows(kinds: Kinds, number: int) -> tuple[DeviceRow, ...]:
    """A row for each setting, of blocks by key."""
    kinds = dict(kinds)
    states = {kind: jax.eval_shape(lambda kind=kind: kind[0].init(kind[1])) for kind in set(kinds.values())}
    parameters = _bytes([jax.ShapeDtypeStruct((s.num_parameters,), s.dtype) for _, s in kinds.values()])
    statistics = _bytes([states[kind].statistics for kind in kinds.values()])
    replicated = DeviceRow(
        setting="replicated",
        num_devices=number,
        parameter_bytes=parameters,
        statistics_bytes=statistics,
        inverse_bytes=_bytes([states[kind].inverse for kind in kinds.values()]),
        gradient_summed=parameters,
        statistics_summed=statistics,
        inverses_gathered=0,
        solution_gathered=0,
        refresh_flops=sum(block.refresh_flops(shape) for block, shape in kinds.values()),
        solve_flops=sum(block.solve_flops(shape) for block, shape in kinds.values()),
    )
    return replicated, _with_placement(replicated, kinds, number), _placed(replicated, kinds, number)


def _with_placement(replicated: DeviceRow, kinds: Kinds, number: int) -> DeviceRow:
    """Diagonals are inverted everywhere, all others on one device each."""
    share = _Share.of({key: kind for key, kind in kinds.items() if is_costly(*kind)}, number)
    everywhere = sum(block.refresh_flops(shape) for block, shape in kinds.values() if not is_costly(block, shape))
    return dataclasses.replace(
        replicated,
        setting="Placement",
        inverses_gathered=share.gathered_bytes({key: state.inverse for key, state in share.states.items()}),
        refresh_flops=everywhere + share.most(costs_of(share.pieces)),
    )


def _placed(replicated: DeviceRow, kinds: Kinds, number: int) -> DeviceRow:
    share = _Share.of(kinds, number)
    shapes = {key: piece.shape for key, piece in share.pieces.items()}
    solution = {key: jax.ShapeDtypeStruct((shape.num_parameters,), shape.dtype) for key, shape in shapes.items()}
    return dataclasses.replace(
        replicated,
        setting="PlacedCurvature",
        statistics_bytes=share.most_bytes({key: state.statistics for key, state in share.states.items()}),
        inverse_bytes=share.most_bytes({key: state.inverse for key, state in share.states.items()}),
        solution_gathered=share.gathered_bytes(solution),
        refresh_flops=share.most(costs_of(share.pieces)),
        solve_flops=share.most({key: piece.block.solve_flops(piece.shape) for key, piece in share.pieces.items()}),
    )


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which pieces go to which device, and their shapes."""

    number: int
    pieces: Mapping[Any, Piece]
    groups: Groups
    states: Mapping[Any, BlockState]

    @staticmethod
    def of(kinds: Kinds, number: int) -> "_Share":
        pieces = pieces_of(kinds, number)
        distinct = {(piece.block, piece.shape) for piece in pieces.values()}
        known = {kind: jax.eval_shape(lambda kind=kind: kind[0].init(kind[1])) for kind in distinct}
        states = {key: known[piece.block, piece.shape] for key, piece in pieces.items()}
        return _Share(number, pieces, groups_of(costs_of(pieces), number), states)

    def most(self, numbers: Mapping[Any, int]) -> int:
        return max(sum(numbers[key] for key in group) for group in self.groups)

    def most_bytes(self, shapes: Mapping[Any, PyTree]) -> int:
        """Of a row of numbers of one dtype, each as long as the longest."""
        return self.most(_sizes(shapes)) * _itemsize(shapes)

    def gathered_bytes(self, shapes: Mapping[Any, PyTree]) -> int:
        """Of all rows; or twice the bytes of what is in them, in a sum."""
        sizes = _sizes(shapes)
        return min(self.number * self.most(sizes), 2 * sum(sizes.values())) * _itemsize(shapes)


def _sizes(shapes: Mapping[Any, PyTree]) -> dict[Any, int]:
    return {key: sum(leaf.size for leaf in jax.tree.leaves(tree)) for key, tree in shapes.items()}


def _itemsize(shapes: Mapping[Any, PyTree]) -> int:
    leaves = jax.tree.leaves(dict(shapes))
    return jnp.result_type(*leaves).itemsize if leaves else 0


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
