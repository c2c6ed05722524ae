"""The work of a refresh shared out among devices."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


class Placement(eqx.Module):
    """Which devices compute inverses: each block is inverted on one of them, and its inverse sent to all others.

    Blocks go to devices by their cost, the costliest first, each to the device with the least to do so far. A stack of
    layers is split into as many parts as there are devices. What is sent, once in every refresh, are the inverses, in
    one all-gather. Without a placement every device inverts every block, and nothing is sent.

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
            raise ValueError(
                f"`mesh` must be a mesh of devices, such as `jax.make_mesh((4,), ('data',))`, got {mesh!r}."
            )
        self.mesh = mesh
        self.axes = (axes,) if isinstance(axes, str) else tuple(axes)
        missing = [name for name in self.axes if name not in mesh.axis_names]
        if missing or not self.axes:
            raise ValueError(f"`axes` must be among those of the mesh, {mesh.axis_names}, got {axes!r}.")

    @property
    def num_devices(self) -> int:
        """How many devices share the work."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    def groups(self, costs: Mapping[Any, int]) -> list[list[Any]]:
        """What each device has to do, given what everything costs."""
        found, totals = [[] for _ in range(self.num_devices)], [0] * self.num_devices
        for key in sorted(costs, key=lambda key: -costs[key]):  # of equal ones the first to come
            least = totals.index(min(totals))
            found[least].append(key)
            totals[least] += costs[key]
        return found

    def run(self, function: Callable[[dict], dict], costs: Mapping[Any, int], arguments: Mapping[Any, Any]) -> dict:
        """Runs a function of dictionaries, which has a result for each key, with some of the keys on each device.

        **Arguments:**

        - `function`: from arguments to results, by key.
        - `costs`: of each key.
        - `arguments`: by key, PyTrees of arrays.

        **Returns:** the results by key, on all devices.
        """
        groups = [{key: arguments[key] for key in keys} for keys in self.groups(costs)]
        groups = sorted(groups, key=lambda group: not group)
        del groups[1 + sum(map(bool, groups)) :]  # one stands for all without work
        shapes = [jax.eval_shape(function, group) for group in groups]
        length = max(sum(leaf.size for leaf in jax.tree.leaves(each)) for each in shapes)
        dtype = jnp.result_type(*jax.tree.leaves(shapes))

        def row(keys, given):
            results = function({key: given[key] for key in keys})
            numbers = [leaf.reshape(-1).astype(dtype) for leaf in jax.tree.leaves(results)]
            numbers = jnp.concatenate([*numbers, jnp.zeros(0, dtype)])
            return jnp.pad(numbers, (0, length - numbers.size))[None]

        def mine(given):
            index = jax.lax.axis_index(self.axes)  # beyond the last one, all have nothing to do
            return jax.lax.switch(index, [functools.partial(row, tuple(group)) for group in groups], given)

        mesh = self._mesh()
        split = PartitionSpec(self.axes)
        rows = jax.shard_map(mine, mesh=mesh, in_specs=PartitionSpec(), out_specs=split)(dict(arguments))
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec()))
        found = {}
        for numbers, like in zip(rows, shapes, strict=False):
            found |= _unpack(numbers, like)
        return found

    def _mesh(self) -> Any:
        """The mesh in force, if there is one, whose axes are automatic within kfax; or else this one."""
        current = jax.sharding.get_abstract_mesh()
        if not current.empty:
            return current
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        return Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)


def _unpack(numbers: Float[Array, " numbers"], like: Any) -> Any:
    """The PyTree whose numbers these are, and maybe more of them."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = jnp.split(numbers, ends)
    arrays = [x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in zip(pieces, leaves, strict=False)]
    return jax.tree.unflatten(structure, arrays)
