"""Meshes with explicit axes, which `jax.make_mesh` makes by default."""

import abc
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from .tree import is_traced
from .types import ArrayTree, PyTree


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Tree = TypeVar("_Tree")


class Sharded(eqx.Module):
    """Arrays that are sharded in one way, wherever they are."""

    @property
    @abc.abstractmethod
    def spec(self) -> PartitionSpec:
        """In which."""


def on_automatic_axes(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The same function, to which explicit axes of its arguments' mesh are automatic ones.

    With explicit axes, the sharding of each array is part of its type. JAX refuses operations whose result could be
    sharded in several ways, such as a product that contracts the axis of the examples, unless they say in which. With
    automatic axes the compiler decides. Where the result, or a part of it, has the structure and the shapes of an
    argument, it is sharded as that is; all else is replicated. Where arguments are on a mesh with automatic axes, what
    does not depend on them (zeros, numbers) is replicated too, so that a function of the result is compiled once.
    """

    @functools.wraps(function)
    def automatic(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        arrays, rest = eqx.partition((args, kwargs), eqx.is_array)
        mesh = _explicit_mesh(arrays)
        if mesh is None:
            return _onto_mesh(function(*args, **kwargs), arrays)
        axis_types = {name: AxisType.Auto for name in _explicit_axes(mesh)}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update_axis_types(axis_types)):
            args, kwargs = eqx.combine(jax.sharding.reshard(arrays, PartitionSpec()), rest)
            try:
                result, others = eqx.partition(function(*args, **kwargs), eqx.is_array)
            except ValueError as error:
                if "Auto" in str(error):  # an axis type, as JAX speaks of it
                    error.add_note(_WITHIN)
                raise
        known = [*arrays[0], *arrays[1].values()]
        return eqx.combine(jax.tree.map(_place, result, _shardings(result, known, mesh)), others)

    return automatic


_WITHIN = (
    "kfax runs `loss_fn` with automatic mesh axes. Arrays that it closes over must come in the batch or be NumPy "
    "arrays, and what needs explicit axes (`out_sharding=`, `reshard`) goes into `jax.sharding.explicit_axes`."
)


def as_around(x: _Tree) -> _Tree:
    """What a function closes over, with explicit axes where it is called within `jax.sharding.explicit_axes`."""
    if not _explicit_axes(jax.sharding.get_abstract_mesh()):
        return x
    arrays, rest = eqx.partition(x, eqx.is_array)
    return eqx.combine(jax.sharding.reshard(arrays, PartitionSpec()), rest)


def has_explicit_axes(x: PyTree) -> bool:
    """Whether any array is on a mesh with explicit axes."""
    return _explicit_mesh(eqx.filter(x, eqx.is_array)) is not None


def _explicit_mesh(arrays: ArrayTree) -> Any:
    """The mesh of an array that is on one with explicit axes; the abstract one if all such arrays are traced."""
    found = None
    for leaf in jax.tree.leaves(arrays):
        mesh = jax.typeof(leaf).sharding.mesh
        if _explicit_axes(mesh):
            if not is_traced(leaf):
                return leaf.sharding.mesh
            found = mesh
    return found


def _onto_mesh(result: _Result, arguments: ArrayTree) -> _Result:
    """The result, with arrays that are on one device by default replicated on the mesh that the arguments are on."""
    if is_traced((arguments, result)):
        return result
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)]
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    if not meshes:
        return result
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    free = lambda x: eqx.is_array(x) and not getattr(x, "committed", True)  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if free(x) else x, result)


def _explicit_axes(mesh: Any) -> list[str]:
    return [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]


def _shardings(arrays: ArrayTree, known: list[ArrayTree], mesh: Any) -> PyTree:
    """That of the first of the known PyTrees which is like these arrays; otherwise, of each part of them by itself."""

    def sharding_of(leaf):
        return NamedSharding(mesh, jax.typeof(leaf).sharding.spec)

    if isinstance(arrays, Sharded):
        return jax.tree.map(lambda _: NamedSharding(mesh, arrays.spec), arrays)
    for tree in known:
        if jax.tree.structure(tree) == jax.tree.structure(arrays) and _shapes(tree) == _shapes(arrays):
            return jax.tree.map(sharding_of, tree)
    if eqx.is_array(arrays):
        return NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda part: _shardings(part, known, mesh), arrays, is_leaf=lambda node: node is not arrays)


def _place(array: Array, sharding: NamedSharding) -> Array:
    """The array with another sharding. What is mapped by `jax.vmap` knows the abstract mesh only, in JAX 0.9."""
    if is_traced(array) or isinstance(sharding.mesh, AbstractMesh):
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh.abstract_mesh, sharding.spec))
    return jax.device_put(array, sharding)


def _shapes(arrays: ArrayTree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(arrays)]
