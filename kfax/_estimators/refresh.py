"""A refresh: the inverses of all blocks, computed together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._blocks import Block, Inverse
from .._math import linalg
from .._math.types import PyTree, Scalar
from .._operations import MatrixShape
from .placement import Placement


Kinds: TypeAlias = Mapping[Any, tuple[Block, MatrixShape]]


def inverses_of(kinds: Kinds, statistics: Mapping[Any, Any], dampings: Mapping[Any, Scalar]) -> dict[Any, Inverse]:
    """The inverses of blocks, by key. Matrices of one size, of whatever blocks, are inverted in one call."""
    inverses = {}
    for function, diagonalizes in ((linalg.psd_inverse, False), (linalg.eigh, True)):
        chosen = {key: kind for key, kind in kinds.items() if kind[0].diagonalizes is diagonalizes}
        matrices = {
            key: block.matrices(shape, statistics[key], dampings[key]) for key, (block, shape) in chosen.items()
        }
        results = factorize(function, matrices)
        for key, (block, shape) in chosen.items():
            inverses[key] = block.refresh(shape, statistics[key], dampings[key], results[key])
    return {key: inverses[key] for key in kinds}


def placed_inverses_of(
    placement: Placement, kinds: Kinds, statistics: Mapping[str, Any], dampings: Mapping[str, Scalar]
) -> dict[str, Inverse]:
    """The same, each block on one device, and stacks of layers on several. Diagonal ones are inverted everywhere."""
    alone = {key: kind for key, kind in kinds.items() if kind[0].refresh_flops(kind[1]) <= kind[1].num_parameters}
    inverses = inverses_of(alone, statistics, dampings)
    pieces = pieces_of({key: kind for key, kind in kinds.items() if key not in alone}, placement.num_devices)
    if pieces:

        def run(given):
            statistics, dampings = ({key: pair[i] for key, pair in given.items()} for i in range(2))
            own = {key: (pieces[key].block, pieces[key].shape) for key in given}
            return inverses_of(own, statistics, dampings), jnp.zeros((), bool)

        given = {key: (piece.of(statistics[key[0]]), dampings[key[0]]) for key, piece in pieces.items()}
        kept, _ = placement.run(run, placement.groups(costs_of(pieces)), given)
        inverses |= whole(placement.gather(kept))
    return {key: inverses[key] for key in kinds}


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


def whole(pieces: Mapping[tuple[str, int], PyTree]) -> dict[str, PyTree]:
    """What belongs to blocks, from what belongs to their parts."""
    found: dict[str, list] = {}
    for key, _ in sorted(pieces):
        found.setdefault(key, [])
        found[key].append(pieces[key, len(found[key])])

    def join(first, *others):  # of a number that all layers share, such as λ, the first
        return jnp.concatenate([first, *others]) if first.ndim and others else first

    return {key: jax.tree.map(join, *parts) for key, parts in found.items()}


def factorize(function: Callable, matrices: Mapping[Any, tuple]) -> dict[Any, tuple]:
    """Applies a factorization to all matrices at once."""
    flat = [matrix for several in matrices.values() for matrix in several]
    results = iter(linalg.by_size(function, flat))
    return {key: tuple(next(results) for _ in several) for key, several in matrices.items()}
