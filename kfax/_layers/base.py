"""The contract between a layer and the rest of the library, and finding layers in a model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, ArrayLike, Shaped

from .._blocks import Block
from .._math.types import Model, Parameters, PyTree
from .._operations import Operation
from .._slot import Hidden, observe, Slot


Blocks: TypeAlias = Block | dict[str, Block]
Slots: TypeAlias = dict[str, tuple[Slot | Hidden, ...]] | None


class TaggedLayer(eqx.Module):
    """A layer together with the curvature blocks of its parameters.

    It is called as the layer itself is, and computes the same. In its call it passes what it observes through
    `observe`; `operations` says what that is. Attributes that it does not have are those of the layer.

    **Fields:**

    - `layer`: what is wrapped.
    - `block`: how its curvature is approximated: one block for all operations, or one for each by name. Has no
        arrays, so that a tagged model has the array leaves of the original.
    - `slots`: `None`, except while kfax runs the layer: then those in which it is observed, by operation.
    """

    layer: AbstractVar[Any]
    block: AbstractVar[Blocks]
    slots: AbstractVar[Slots]

    @abc.abstractmethod
    def operations(self) -> Mapping[str, Operation]:
        """What the layer does with its parameters, each trained array in one operation; `{"": ...}` if it is one.

        Arrays of the layer are to be passed on as they are, without computing on them: they may be `None`, for a
        parameter that is frozen or absent, and shapes or numbers in place of arrays.
        """

    def observe(self, y: PyTree, x: PyTree, name: str = "", *, context: PyTree = None) -> PyTree:
        """Returns `y`, and lets an estimator see it as the output of an operation, and `x` as its input.

        **Arguments:**

        - `y`: what the operation returned: an array of one call, without batch axes: those come from `jax.vmap`. Go on
            with what is returned in its place.
        - `x`: what the operation was applied to.
        - `name`: of the operation.
        - `context`: arrays that belong to the layer, if the operation's gradient depends on them.

        **Raises:** `ValueError` if there is no operation of this name.
        """
        if self.slots is None:
            return y
        if name not in self.operations():
            raise ValueError(
                f"{type(self).__name__} observes an operation named {name!r}, but its operations are "
                f"{sorted(self.operations())}."
            )
        for slot in self.slots.get(name, ()):
            y = observe(y, x, slot, context)
        return y

    def block_of(self, name: str) -> Block:
        """The block of an operation."""
        return self.block[name] if isinstance(self.block, dict) else self.block

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "layer":
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.layer, name)

    def __check_init__(self) -> None:
        operations = self.operations()
        if not isinstance(operations, dict) or not all(isinstance(op, Operation) for op in operations.values()):
            raise ValueError(
                f"`operations` of {type(self).__name__} must return a dictionary of operations, such as "
                f"`{{'': kfax.Dense(weight, bias)}}`, but it returned {operations!r}."
            )
        names = set(operations)
        blocks = self.block if isinstance(self.block, dict) else dict.fromkeys(names, self.block)
        if not all(isinstance(block, Block) for block in blocks.values()):
            raise ValueError(f"`block` must be a block, such as `kfax.KroneckerFactored()`, got {self.block!r}.")
        if set(blocks) != names:
            raise ValueError(
                f"`block` of {type(self).__name__} must be one block, or a dictionary with a block for each of "
                f"{sorted(names)}, got one for each of {sorted(blocks)}."
            )


def check_wraps(tagged: TaggedLayer, *types: type) -> None:
    if not isinstance(tagged.layer, types):
        names = " or ".join(f"`equinox.nn.{t.__name__}`" for t in types)
        raise ValueError(f"`{type(tagged).__name__}` wraps an {names}, got {type(tagged.layer).__name__}.")


@dataclasses.dataclass(frozen=True)
class Part:
    """An operation of a tagged layer of a model.

    **Fields:**

    - `path`: of the layer in the model.
    - `name`: of the operation in the layer.
    - `operation`: with the arrays that are trained.
    - `block`: its curvature block.
    """

    path: str
    name: str
    operation: Operation
    block: Block

    @property
    def key(self) -> str:
        """Path and name in one."""
        return f"{self.path}/{self.name}" if self.name else self.path


def is_tagged(node: Any) -> bool:
    return isinstance(node, TaggedLayer)


def tagged_layers(tree: Model) -> dict[str, TaggedLayer]:
    """The tagged layers of a model (or of a tree like it) by path, in the order of its leaves."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tagged)
    return {jax.tree_util.keystr(path): node for path, node in nodes if is_tagged(node)}


def layer_parts(path: str, layer: TaggedLayer) -> list[Part]:
    """The operations of one layer; without those whose parameters are all frozen."""
    try:
        operations = layer.operations().items()
    except Exception as error:  # whatever comes of computing on what stands in for arrays
        raise ValueError(
            f"`operations` of {type(layer).__name__}, at `{path}`, must pass the arrays of the layer on as they are, "
            "without computing on them. (For a weight that is stored as `(inputs, outputs)` there is "
            "`kfax.Dense(weight, bias, inputs_first=True)`.)"
        ) from error
    return [Part(path, name, op, layer.block_of(name)) for name, op in operations if jax.tree.leaves(op)]


def parts(tree: Model) -> dict[str, Part]:
    """The operations of all tagged layers of a parameter tree by key, in the order of its leaves."""
    found = [part for path, layer in tagged_layers(tree).items() for part in layer_parts(path, layer)]
    return {part.key: part for part in found}


def unlisted(layer: TaggedLayer) -> list[str]:
    """The paths of arrays of a layer that are not in exactly one of its operations."""
    leaves = jax.tree_util.tree_leaves_with_path(layer)
    _, structure = jax.tree.flatten(layer)
    numbers = jax.tree.unflatten(structure, range(len(leaves)))
    listed = [number for part in layer_parts("", numbers) for number in jax.tree.leaves(part.operation)]
    return [jax.tree_util.keystr(path) for i, (path, _) in enumerate(leaves) if listed.count(i) != 1]


def replace_layers(tree: Model, layers: Mapping[str, TaggedLayer]) -> Model:
    """The tree with new tagged layers at the given paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: layers.get(jax.tree_util.keystr(path), node), tree, is_leaf=is_tagged
    )


def fill_slots(model: Model, slots: Mapping[tuple[str, str], tuple[Slot, ...]]) -> Model:
    """The model with slots filled for operations, given by path and name; those of all others are empty, not `None`.

    So a layer computes the same in whatever way, whether it is observed or not, and XLA runs it once for both. Only
    those of stacked layers become leaves of it, which `jax.vmap` and `jax.lax.scan` take apart with the layers.
    """
    layers = tagged_layers(model)
    by_path: dict[str, dict[str, tuple[Slot, ...]]] = {}
    for (path, name), filled in slots.items():
        by_path.setdefault(path, {})[name] = filled

    def fill(layer, filled):
        held = {
            name: tuple(slot if slot.is_stacked else Hidden(slot) for slot in each) for name, each in filled.items()
        }
        return _with_slots(layer, held)

    return replace_layers(model, {path: fill(layer, by_path.get(path, {})) for path, layer in layers.items()})


def empty_slots(model: Model) -> Model:
    """The model as it was before its slots were filled."""
    return jax.tree.map(
        lambda node: _with_slots(node, None) if is_tagged(node) and node.slots is not None else node,
        model,
        is_leaf=is_tagged,
    )


def _with_slots(layer: TaggedLayer, slots: Slots) -> TaggedLayer:
    return eqx.tree_at(lambda tagged: tagged.slots, layer, slots, is_leaf=lambda node: node is layer.slots)


def masked(module: Model, mask: ArrayLike) -> Model:
    """The module (a tagged layer, or one that contains some), of which only calls with a true mask are to count.

    For positions that are mere padding: `jax.vmap(lambda x, present: kfax.masked(self.mlp, present)(x))(xs, mask)`.
    The module computes what it did, but inputs and output cotangents of its layers at masked positions enter no
    statistic. What is computed there must have no effect on the loss, or [`kfax.check`][] will object.

    **Arguments:**

    - `module`: tagged or not. Without tagged layers in it, or outside an estimator, it is returned as it is.
    - `mask`: one boolean, true where the call counts.

    **Returns:** the module, for one call.

    **Raises:** `ValueError` for a mask that is not one boolean.
    """
    if not eqx.is_array_like(mask):
        raise ValueError(f"`kfax.masked` takes a module and one boolean, got {type(mask).__name__}.")
    present = jnp.asarray(mask)
    if present.dtype != jnp.bool_ or present.ndim != 0:
        raise ValueError(
            f"`kfax.masked` takes one boolean, got {present.dtype} of shape {present.shape}. For several positions map "
            "over them: `jax.vmap(lambda x, m: kfax.masked(layer, m)(x))(xs, mask)`."
        )

    def mark(node):
        if not is_tagged(node) or node.slots is None:
            return node
        slots = {name: tuple(slot.masked(present) for slot in filled) for name, filled in node.slots.items()}
        return _with_slots(node, slots)

    return jax.tree.map(mark, module, is_leaf=is_tagged)


def to_matrices(tree: Parameters) -> dict[str, Shaped[Array, "..."]]:
    """The matrix V of each operation of a model: of its parameters, its gradient, a direction.

    The matrices are what blocks act on. For a dense layer `V = [W b]`; what it is for others is said where they are
    described, in [`kfax.TaggedConv`][] for instance.

    **Arguments:**

    - `tree`: a PyTree like `kfax.parameters_of(model)`.

    **Returns:** by key (the path of the layer, and `/` and the operation's name if it has several, as
    [`kfax.coverage`][] prints them) an array `(*stack, *groups, d_g, d_a)`.

    **Raises:** `ValueError` if there is no tagged layer.
    """
    found = parts(tree)
    if not found:
        raise ValueError(
            "There is no tagged layer here, and so no matrix. Vectors are like `kfax.parameters_of(model)` of a model "
            "that was given to `kfax.tag`."
        )
    return {key: part.operation.to_matrix() for key, part in found.items()}


def from_matrices(tree: Parameters, matrices: Mapping[str, Shaped[Array, "..."]]) -> Parameters:
    """The inverse of [`kfax.to_matrices`][]: a tree with those matrices in it.

    **Arguments:**

    - `tree`: a PyTree like `kfax.parameters_of(model)`, which says where the numbers of a matrix belong, and of which
        dtype they are.
    - `matrices`: a matrix for each key.

    **Returns:** a PyTree like `tree`.

    **Raises:** `ValueError` if keys or shapes are not those of `tree`.
    """
    if not isinstance(matrices, Mapping):
        raise ValueError(f"`matrices` must be a dictionary, as of `kfax.to_matrices`, got {type(matrices).__name__}.")
    shapes = {key: part.operation.shape() for key, part in parts(tree).items()}
    expected = {key: (*shape.leading, shape.d_g, shape.d_a) for key, shape in shapes.items()}
    found = {key: jnp.shape(matrix) for key, matrix in matrices.items()}
    if found != expected:
        raise ValueError(f"`matrices` must have the keys and shapes {expected}, got {found}.")
    new = {}
    for path, layer in tagged_layers(tree).items():
        leaves, structure = jax.tree.flatten(layer)
        # An operation's leaves are leaves of the layer: which ones shows in a layer of numbers.
        numbers = jax.tree.unflatten(structure, range(len(leaves)))
        numbered = {part.key: part.operation for part in layer_parts(path, numbers)}
        for part in layer_parts(path, layer):
            changed = part.operation.from_matrix(matrices[part.key])
            for number, leaf in zip(jax.tree.leaves(numbered[part.key]), jax.tree.leaves(changed), strict=True):
                leaves[number] = leaf.astype(leaves[number].dtype)
        new[path] = jax.tree.unflatten(structure, leaves)
    return replace_layers(tree, new)
