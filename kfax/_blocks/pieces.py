"""Blocks shared out among devices: whole ones, and the parts of those that stand for a stack of layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

from .._math.types import PyTree
from .._operations import MatrixShape
from .base import Block


Kinds: TypeAlias = Mapping[Any, tuple[Block, MatrixShape]]
Groups: TypeAlias = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block, or some of the layers of one that stands for a stack.

    **Fields:**

    - `block`, `shape`: what it is.
    - `layers`: which of the stack, along its first axis; `None` if there is no stack.
    """

    block: Block
    shape: MatrixShape
    layers: tuple[int, int] | None

    def of(self, tree: PyTree) -> PyTree:
        """The part for these layers of arrays that lead with the axis of the stack."""
        if self.layers is None:
            return tree
        start, stop = self.layers
        return jax.tree.map(lambda x: x[start:stop], tree)


def pieces_of(kinds: Kinds, number: int) -> dict[tuple[str, int], Piece]:
    """The blocks, and stacks of them in at most so many parts, as equal as possible, by key and number of the part."""
    pieces = {}
    for key, (block, shape) in kinds.items():
        if not shape.stack:
            pieces[key, 0] = Piece(block, shape, None)
            continue
        length, *others = shape.stack
        parts = min(number, length)
        for i in range(parts):
            start, stop = length * i // parts, length * (i + 1) // parts
            part = dataclasses.replace(shape, stack=(stop - start, *others))
            pieces[key, i] = Piece(block, part, (start, stop))
    return pieces


def costs_of(pieces: Mapping[Any, Piece]) -> dict[Any, int]:
    """Of a refresh of each."""
    return {key: piece.block.refresh_flops(piece.shape) for key, piece in pieces.items()}


def is_costly(block: Block, shape: MatrixShape) -> bool:
    """Whether there is something to share out: a diagonal is inverted as fast as its inverse could be sent."""
    return block.refresh_flops(shape) > shape.num_parameters


def groups_of(costs: Mapping[Any, int], number: int) -> Groups:
    """What each of a number of devices has to do, given what everything costs: the costliest first, each to the device
    with the least so far. One group stands for all devices without work.
    """
    found, totals = [[] for _ in range(number)], [0] * number
    for key in sorted(costs, key=lambda key: -costs[key]):  # of equal ones the first to come
        least = totals.index(min(totals))
        found[least].append(key)
        totals[least] += costs[key]
    busy = [tuple(keys) for keys in found if keys]
    return (*busy, ()) if len(busy) < len(found) else tuple(busy)
