"""Parameters that `equinox.nn.Shared` gives to a second layer."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._math.types import Model, PyTree
from .._operations import FactoredOperation, Operation, Transposed
from .base import layer_parts, Part, tagged_layers


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """A use of one operation's parameters in another layer.

    **Fields:**

    - `path`, `name`: which operation uses them.
    - `owner`: the key of the operation that has them.
    - `operation`: what is done with them, as an operation on the owner's matrix.
    """

    path: str
    name: str
    owner: str
    operation: Operation


def borrowed(model: Model, trained: PyTree) -> list[Borrowed]:
    """All uses of trained parameters of tagged layers in other tagged layers, by way of `equinox.nn.Shared`.

    A layer that is shared as a whole, and is then at its second place nothing but the first one, does not count: it
    brings its slots along.

    **Raises:** `ValueError` if a parameter is used in a role that kfax cannot tell.
    """
    # Every array becomes an object of its own, so that it can be recognized wherever it turns up.
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf, model
    )
    owners = {}
    for path, layer in tagged_layers(eqx.filter(shapes, trained)).items():
        for part in _parts(path, layer):
            owners.update({id(leaf): part for leaf in jax.tree.leaves(part.operation)})
    return _borrowed_in("", shapes, owners, set(tagged_layers(shapes)))


def _borrowed_in(prefix: str, tree: Any, owners: dict[int, Part], present: set[str]) -> list[Borrowed]:
    found = []
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, eqx.nn.Shared))
    for path, node in nodes:
        if not isinstance(node, eqx.nn.Shared):
            continue
        inside, resolved = prefix + jax.tree_util.keystr(path) + ".pytree", _resolved(node)
        for inner, layer in tagged_layers(resolved).items():
            if inside + inner in present:
                for part in _parts(inside + inner, layer):
                    found += _borrowed_by(part, owners)
        found += _borrowed_in(inside, resolved, owners, present)
    return found


def _borrowed_by(part: Part, owners: dict[int, Part]) -> list[Borrowed]:
    leaves = jax.tree.leaves(part.operation)
    sources = {owners[id(leaf)].key: owners[id(leaf)] for leaf in leaves if id(leaf) in owners}
    sources.pop(part.key, None)
    found = []
    for owner in sources.values():
        own = {id(leaf) for leaf in jax.tree.leaves(owner.operation)}
        used = jax.tree.map(lambda leaf, own=own: leaf if id(leaf) in own else None, part.operation)
        found.append(Borrowed(part.path, part.name, owner.key, _in_role(used, owner, part)))
    return found


def _in_role(used: Operation, owner: Part, user: Part) -> Operation:
    """`used` as an operation on the owner's matrix: as it is, or transposed.

    Found out by having both make a matrix of the same few numbers.
    """
    if jax.tree.structure(used) == jax.tree.structure(owner.operation):
        return used
    [leaf] = jax.tree.leaves(used) if len(jax.tree.leaves(used)) == 1 else [None]
    if leaf is not None and leaf.ndim >= 2:
        dims = tuple(range(2, 2 + leaf.ndim))

        def matrix(operation):
            with jax.ensure_compile_time_eval():
                numbers = jnp.arange(math.prod(dims)).reshape(dims)
                return np.asarray(jax.tree.map(lambda x: numbers if x is leaf else None, operation).to_matrix())

        theirs, mine = matrix(owner.operation), matrix(used)
        if np.array_equal(theirs, mine):
            return used
        if isinstance(used, FactoredOperation) and np.array_equal(theirs, np.swapaxes(mine, -1, -2)):
            return Transposed(used)
    raise ValueError(
        f"`equinox.nn.Shared` gives parameters of the layer at `{owner.path}` to the layer at `{user.path}`, where "
        f"they are used in another way ({type(user.operation).__name__} instead of {type(owner.operation).__name__}). "
        "Wrap the module that uses both in `kfax.TaggedModule(module, block=...)`, or freeze it."
    )


def _parts(path: str, layer: Any) -> list[Part]:
    """The operations of a layer in which only shapes count as parameters."""
    return layer_parts(path, eqx.filter(layer, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)))


def _resolved(node: eqx.nn.Shared) -> Any:
    """The PyTree that the node stands for; without tagged layers if shapes are not enough to make it.

    A `get` that computes on arrays makes new ones, whose origin is lost. Their use goes unobserved, and `kfax.check`
    reports it.
    """
    try:
        return node()
    except (TypeError, AttributeError):
        return None
