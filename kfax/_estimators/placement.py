"""Work shared out among devices, and what each of them keeps of it."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Shaped

from .._blocks import Groups
from .._math.mesh import Sharded
from .._math.types import PyTree


class Kept(Sharded):
    """What devices keep, each the results for its own keys: a row of numbers for each device, sharded over them.

    **Fields:**

    - `rows`: the numbers.
    - `groups`: the keys of each device; the last one stands for all others as well.
    - `likes`: for each of these groups the structure, the shapes and the dtypes of its dictionary of results.
    - `axes`: of the mesh, over which rows are sharded.
    """

    rows: Shaped[Array, "devices numbers"]
    groups: Groups = eqx.field(static=True)
    likes: tuple[tuple[Any, tuple[jax.ShapeDtypeStruct, ...]], ...] = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(self.axes)

    def of_group(self, index: int, row: Shaped[Array, " numbers"]) -> dict[Any, Any]:
        """The dictionary that a row is of, on a device of this group."""
        structure, leaves = self.likes[index]
        pieces = jnp.split(row, np.cumsum([leaf.size for leaf in leaves]))
        arrays = [x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in zip(pieces, leaves, strict=False)]
        return jax.tree.unflatten(structure, arrays)


class Placement(eqx.Module):
    """Which devices compute inverses: each block is inverted on one of them, and its inverse sent to all others.

    Blocks go to devices by their cost, the costliest first, each to the device with the least to do so far. A stack of
    layers is split into as many parts as there are devices. What is sent, once in every refresh, are the inverses, in
    one all-gather (or one sum, where some devices have much more of them than others). Without a placement every device
    inverts every block, and nothing is sent. For inverses that stay where they are see [`kfax.PlacedCurvature`][].

    ??? cite "Source"
        Osawa et al. 2019, arXiv:1811.12019, section 3 (factors inverted in parallel); Pauloski et al. 2021,
        arXiv:2107.01739 (KAISA), whose setting of least communication in every step this is.
    """

    mesh: Mesh = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, mesh: Mesh, axes: str | tuple[str, ...] = "data"):
        """**Arguments:**

        - `mesh`: on which model, state and batch are.
        - `axes`: the axis, or several, along whose devices the work is shared out. Others repeat it.

        **Raises:** `ValueError` for an axis that the mesh does not have.
        """
        if not isinstance(mesh, Mesh):
            raise ValueError(f"`mesh` must be a mesh of devices, such as `jax.make_mesh((4,), 'data')`, got {mesh!r}.")
        self.mesh = mesh
        names = (axes,) if isinstance(axes, str) else axes
        if not (isinstance(names, tuple | list) and names and len(set(names)) == len(names)):
            raise ValueError(
                f"`axes` must be the name of an axis of the mesh, or several different ones, got {axes!r}."
            )
        self.axes = tuple(names)
        if not set(names) <= set(mesh.axis_names):
            raise ValueError(f"`axes` must be among those of the mesh, {mesh.axis_names}, got {axes!r}.")

    @property
    def num_devices(self) -> int:
        """How many devices share the work."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    def run(
        self,
        function: Callable[..., tuple[dict[Any, Any], Bool[Array, ""] | bool]],
        groups: Groups,
        given: Mapping[Any, PyTree],
        *own: Kept,
    ) -> tuple[Kept, Bool[Array, ""]]:
        """Runs a function of dictionaries, which has a result for each key, with some of the keys on each device.

        **Arguments:**

        - `function`: from dictionaries with the keys of one device, of what is given and of what it keeps, to results
            by key, and whether something is true.
        - `groups`: the keys of each device.
        - `given`: by key, what all devices have.
        - `own`: what each device keeps, of the same groups.

        **Returns:** what each device keeps of the results, and whether something is true on any of them.
        """

        def results(index, given, rows):
            mine = [kept.of_group(index, row) for kept, row in zip(own, rows, strict=True)]
            return function({key: given[key] for key in groups[index]}, *mine)

        one_row = [jax.ShapeDtypeStruct(kept.rows.shape[1:], kept.rows.dtype) for kept in own]
        shapes = [jax.eval_shape(functools.partial(results, i), dict(given), one_row)[0] for i in range(len(groups))]
        likes = tuple((jax.tree.structure(each), tuple(map(_like, jax.tree.leaves(each)))) for each in shapes)
        length = max(sum(leaf.size for leaf in leaves) for _, leaves in likes)
        dtype = jnp.result_type(*jax.tree.leaves(shapes))

        def branch(index, given, rows):
            found, flag = results(index, given, rows)
            numbers = [leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(found)]
            numbers = jnp.concatenate([*numbers, jnp.zeros(0, dtype)])
            return jnp.pad(numbers, (0, length - numbers.size))[None], jnp.asarray(flag)[None]

        def mine(given, rows):
            branches = [functools.partial(branch, i) for i in range(len(groups))]
            return jax.lax.switch(jax.lax.axis_index(self.axes), branches, given, [row[0] for row in rows])

        split, everywhere = PartitionSpec(self.axes), PartitionSpec()
        # Branches differ in whether their results depend on the device, which JAX would check.
        shard = functools.partial(jax.shard_map, mesh=self._mesh(), check_vma=False)
        shared = shard(mine, in_specs=(everywhere, split), out_specs=split)
        rows, flags = jax.jit(shared)(dict(given), [kept.rows for kept in own])
        return Kept(rows, groups, likes, self.axes), jnp.any(flags)

    def gather(self, kept: Kept) -> dict[Any, Any]:
        """What all devices keep, on all of them.

        Rows are gathered, each as long as the longest, or summed, each in a place of its own, if less is sent so.
        """
        lengths = [sum(leaf.size for leaf in leaves) for _, leaves in kept.likes]
        if kept.rows.size <= 2 * sum(lengths):
            rows = jax.lax.with_sharding_constraint(kept.rows, NamedSharding(self._mesh(), PartitionSpec()))
        else:
            rows = jnp.split(self._summed(kept.rows, lengths), np.cumsum(lengths))
        found = {}
        for index in range(len(kept.groups)):
            found |= kept.of_group(index, rows[index])
        return found

    def _summed(self, rows: Shaped[Array, "devices numbers"], lengths: list[int]) -> Shaped[Array, " all"]:
        """The rows one after the other, without what they are padded with."""
        starts = np.cumsum([0, *lengths])

        def mine(row):
            group = jnp.minimum(jax.lax.axis_index(self.axes), len(lengths) - 1)
            numbers = jnp.where(jnp.arange(row.shape[1]) < jnp.asarray(lengths)[group], row[0], 0)
            place = jnp.zeros(starts[-1] + row.shape[1], row.dtype)
            place = jax.lax.dynamic_update_slice(place, numbers, (jnp.asarray(starts)[group],))
            return jax.lax.psum(place[: starts[-1]], self.axes)

        everywhere = PartitionSpec()
        shared = jax.shard_map(mine, mesh=self._mesh(), in_specs=PartitionSpec(self.axes), out_specs=everywhere)
        return jax.jit(shared)(rows)

    def _mesh(self) -> Mesh:
        """The mesh, its axes of the types that are in force: automatic ones within kfax."""
        current = jax.sharding.get_abstract_mesh()
        if not current.empty and (current.axis_names != self.mesh.axis_names or current.manual_axes):
            raise ValueError(
                f"A `kfax.Placement` on a mesh with the axes {self.mesh.axis_names} was used where another mesh is in "
                f"force, with {current.axis_names}, or inside `jax.shard_map`, which it calls itself. Shard the batch "
                "over the placement's mesh instead, and leave `jax.shard_map` out, or the placement."
            )
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names) if current.empty else current.axis_types
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)


def _like(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Without what may differ between programs, such as a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
