"""What kfax will do with each parameter of a model, and what it will cost: known before anything runs."""

import dataclasses
import math
from collections.abc import Sequence

import equinox as eqx
import jax

from .._math.arguments import whole_number
from .._math.types import Model, Where
from .base import is_tagged, layer_parts, Part, parts, TaggedLayer
from .devices import device_rows, DeviceRow
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
    - `devices`: for several devices, one for each way to share out the curvature; otherwise empty.
    """

    rows: tuple[CoverageRow, ...]
    devices: tuple[DeviceRow, ...] = ()

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
        head, *body, total = _aligned(lines)
        rule = "-" * len(head)
        mixing = ", ".join(f"`{row.path}`" for row in self.rows if row.layer == TaggedBatchNorm.__name__)
        notes = [f"Examples see each other by {mixing}: blocks leave out what is between them."] if mixing else []
        number = sum(row.num_bytes > 0 for row in self.rows)
        if number > _MANY:
            notes.append(
                f"Each of {number} blocks adds to the time to compile a step. Equal layers are compiled once if they "
                "are stacked and run by `jax.lax.scan`."
            )
        each = ["", *_devices_table(self.devices)] if self.devices else []
        return "\n".join(line.rstrip() for line in [head, rule, *body, rule, total, *notes, *each])


_MANY = 30


def coverage(model: Model, *, frozen: Where | None = None, devices: int = 1) -> Coverage:
    """Which block each parameter of a model has, and what it costs. Computes nothing on arrays.

    **Arguments:**

    - `model`: tagged, or not yet.
    - `frozen`: as in [`kfax.tag`][].
    - `devices`: on how many each batch is split. For more than one there is a second table: what each of them keeps,
        sends and computes, with and without a [`kfax.Placement`][], and with a [`kfax.PlacedCurvature`][].

    **Returns:** a [`kfax.Coverage`][]; print it to see a table. A parameter without a block has the block `None`.

    **Raises:** `ValueError` for a number of devices that is none.
    """
    whole_number("devices", devices)
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
    if devices == 1:
        return Coverage(tuple(rows))
    kinds = {key: (part.block, part.operation.shape()) for key, part in parts(kept).items()}
    return Coverage(tuple(rows), device_rows(kinds, devices))


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


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _devices_table(rows: tuple[DeviceRow, ...]) -> list[str]:
    """What a device keeps, sends and computes, by setting."""
    header = (f"each of {rows[0].num_devices} devices", "state", "sent/step", "/update", "/refresh", "refresh", "solve")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        sizes = (row.state_bytes, row.sent_per_step, row.sent_per_update, row.sent_per_refresh)
        flops = (row.refresh_flops, row.solve_flops)
        lines.append((row.setting, *(_si(size, "B") for size in sizes), *(_si(number, "flop") for number in flops)))
    head, *body = _aligned(lines)
    return [head, "-" * len(head), *body]


def _si(value: float | int, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    prefix = prefixes[0]
    return f"{value:.3g} {prefix}{unit}"
