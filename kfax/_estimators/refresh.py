"""A refresh: the inverses of all blocks, computed together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._blocks import Block, Inverse
from .._math import linalg
from .._math.types import Scalar
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
    parts: dict[tuple[str, int], tuple[Block, MatrixShape]] = {}
    arguments = {}
    for key, (block, shape) in kinds.items():
        if key in alone:
            continue
        for i, (start, stop) in enumerate(_ranges(shape, placement.num_devices)):
            stack = (stop - start, *shape.stack[1:]) if shape.stack else ()
            parts[key, i] = block, dataclasses.replace(shape, stack=stack)
            some = statistics[key]
            if shape.stack:
                some = jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], some)
            arguments[key, i] = some, dampings[key]

    def run(given):
        own = {key: parts[key] for key in given}
        return inverses_of(own, {k: v[0] for k, v in given.items()}, {k: v[1] for k, v in given.items()})

    if parts:
        costs = {key: block.refresh_flops(shape) for key, (block, shape) in parts.items()}
        found = placement.run(run, costs, arguments)
        for key in [key for key in kinds if key not in alone]:
            pieces = [found[part] for part in parts if part[0] == key]
            inverses[key] = jax.tree.map(_joined, *pieces)
    return {key: inverses[key] for key in kinds}


def _ranges(shape: MatrixShape, number: int) -> list[tuple[int, int]]:
    """The first axis of a stack in a number of parts, as equal as possible."""
    if not shape.stack:
        return [(0, 1)]
    length = shape.stack[0]
    ends = [length * i // min(number, length) for i in range(min(number, length) + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _joined(*pieces: Any) -> Any:
    """The parts of a stack; of a number that all layers share, such as λ, the first."""
    return jnp.concatenate(pieces) if pieces[0].ndim else pieces[0]


def factorize(function: Callable, matrices: Mapping[Any, tuple]) -> dict[Any, tuple]:
    """Applies a factorization to all matrices at once."""
    flat = [matrix for several in matrices.values() for matrix in several]
    results = iter(linalg.by_size(function, flat))
    return {key: tuple(next(results) for _ in several) for key, several in matrices.items()}
