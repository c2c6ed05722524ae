"""A refresh: the inverses of all blocks, computed together."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._blocks import costs_of, groups_of, Inverse, is_costly, Kinds, pieces_of
from .._math import linalg
from .._math.types import PyTree, Scalar
from .placement import Placement


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
    alone = {key: kind for key, kind in kinds.items() if not is_costly(*kind)}
    inverses = inverses_of(alone, statistics, dampings)
    pieces = pieces_of({key: kind for key, kind in kinds.items() if key not in alone}, placement.num_devices)
    if pieces:

        def run(given):
            statistics, dampings = ({key: pair[i] for key, pair in given.items()} for i in range(2))
            own = {key: (pieces[key].block, pieces[key].shape) for key in given}
            return inverses_of(own, statistics, dampings), jnp.zeros((), bool)

        given = {key: (piece.of(statistics[key[0]]), dampings[key[0]]) for key, piece in pieces.items()}
        kept, _ = placement.run(run, groups_of(costs_of(pieces), placement.num_devices), given)
        inverses |= whole(placement.gather(kept))
    return {key: inverses[key] for key in kinds}


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
