"""What kfax will do with each parameter of a model, and what it will cost: known before anything runs."""

import dataclasses
import math

import equinox as eqx
import jax

from .._math.types import Model, Where
from .base import is_tagged, layer_parts, Part, TaggedLayer
from .registry import trainable
from .scale_shift import TaggedBatchNorm
from .shared import borrowed


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One operation of a tagged layer, or one parameter outside any tagged layer.

    **Fields:**

    - `path`: where it is in the model; for layers with several operations, with `/` and the operation's name.
    - `parameters`: name and shape of each array that is trained (or, in a row without a block, of the one parameter).
    - `layer`: the class of the tagged layer, or `None`.
    - `block`: the curvature block, or `"frozen"`, or `None` for a parameter that still needs one.
    - `tied`: the paths of other layers that use the same parameters, tied by `equinox.nn.Shared`.
    - `num_parameters`: how many numbers are trained here.
    - `num_bytes`: of curvature state: the averaged statistics and the inverse.
    - `update_flops`: of the statistics, for each row: each example and, but for [`kfax.Reduce`][], each position.
    - `refresh_flops`: of recomputing the inverse.
    - `solve_flops`: of preconditioning a gradient.
    """

    path: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    layer: str | None
    block: str | None
    tied: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    update_flops: int
    refresh_flops: int
    solve_flops: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The blocks of a model, as data (`rows`) and, when printed, as a table.

    **Fields:**

    - `rows`: one for each operation of a tagged layer and each parameter outside of one, in the order of
        the model's leaves.
    """

    rows: tuple[CoverageRow, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The paths of parameters that still need a block."""
        return tuple(row.path for row in self.rows if row.block is None)

    def __str__(self) -> str:
        header = ("path", "parameters", "layer", "block", "state", "update/row", "refresh", "solve")
        lines = [header, *(_cells(row) for row in self.rows)]
        totals = [
            sum(getattr(row, name) for row in self.rows)
            for name in ("num_parameters", "num_bytes", "update_flops", "refresh_flops", "solve_flops")
        ]
        lines.append(
            ("total", f"{totals[0]:,}", "", "", _si(totals[1], "B"), *(_si(total, "flop") for total in totals[2:]))
        )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = "-" * len(text[0])
        mixing = ", ".join(f"`{row.path}`" for row in self.rows if row.layer == TaggedBatchNorm.__name__)
        notes = [f"Examples see each other by {mixing}: blocks leave out what is between them."] if mixing else []
        number = sum(row.num_bytes > 0 for row in self.rows)
        if number > _MANY:
            notes.append(
                f"Each of {number} blocks adds to the time to compile a step. Equal layers are compiled once if they "
                "are stacked and run by `jax.lax.scan`."
            )
        return "\n".join(line.rstrip() for line in [text[0], rule, *text[1:-1], rule, text[-1], *notes])


_MANY = 30


def coverage(model: Model, *, frozen: Where | None = None) -> Coverage:
    """Which block each parameter of a model has, and what it costs. Computes nothing on arrays.

    **Arguments:**

    - `model`: tagged, or not yet.
    - `frozen`: as in [`kfax.tag`][].

    **Returns:** a [`kfax.Coverage`][]; print it to see a table. A parameter without a block has the block `None`.
    """
    spec = trainable(model, frozen)
    kept = eqx.filter(model, spec)
    nodes = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array), is_leaf=is_tagged)
    trained = dict(jax.tree_util.tree_leaves_with_path(kept, is_leaf=is_tagged))
    loans = borrowed(model, spec)
    rows = []
    for path, node in nodes:
        name = jax.tree_util.keystr(path)
        if not is_tagged(node):
            block = None if path in trained else "frozen"
            rows.append(_other_row(name, node, None, block))
            continue
        found = {part.key: part for part in layer_parts(name, trained[path])}
        for part in layer_parts(name, node):
            if part.key in found:
                tied = [loan.path for loan in loans if loan.owner == part.key]
                rows.append(_part_row(found[part.key], node, tied))
            else:
                rows.append(_other_row(part.key, part.operation, type(node).__name__, "frozen"))
    return Coverage(tuple(rows))


def _part_row(part: Part, layer: TaggedLayer, tied: list[str]) -> CoverageRow:
    shape, block = part.operation.shape(), part.block
    state = jax.eval_shape(lambda: block.init(shape))
    return CoverageRow(
        path=part.key,
        parameters=_arrays(part.operation),
        layer=type(layer).__name__,
        block=str(block),
        tied=tuple(tied),
        num_parameters=shape.num_parameters,
        num_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        update_flops=block.update_flops(shape),
        refresh_flops=block.refresh_flops(shape),
        solve_flops=block.solve_flops(shape),
    )


def _other_row(path: str, node, layer: str | None, block: str | None) -> CoverageRow:
    """The row of what has no block."""
    arrays = _arrays(node)
    count = 0 if block else sum(math.prod(shape) for _, shape in arrays)
    return CoverageRow(path, arrays, layer, block, (), count, 0, 0, 0, 0)


def _arrays(node) -> tuple[tuple[str, tuple[int, ...]], ...]:
    leaves = jax.tree_util.tree_leaves_with_path(node)
    return tuple((_name(jax.tree_util.keystr(path)), leaf.shape) for path, leaf in leaves)


def _name(path: str) -> str:
    return path.removeprefix(".layer").removeprefix(".parameters").lstrip(".")


def _cells(row: CoverageRow) -> tuple[str, ...]:
    parameters = " ".join(f"{name}{list(shape)}".replace(" ", "") for name, shape in row.parameters)
    costs = (_si(row.num_bytes, "B"), *(_si(n, "flop") for n in (row.update_flops, row.refresh_flops, row.solve_flops)))
    block = "NONE: `kfax.tag` the model, wrap the module, or `frozen=`" if row.block is None else row.block
    block += "".join(f", tied to {path}" for path in row.tied)
    return (row.path or "(model)", parameters, row.layer or "", block, *(costs if row.num_bytes else ("",) * 4))


def _si(value: float | int, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    prefix = prefixes[0]
    return f"{value:.3g} {prefix}{unit}"
