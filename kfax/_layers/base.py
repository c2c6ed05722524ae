"""The contract between a layer and the rest of the library, and finding layers in a model."""

import abc
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from equinox import AbstractVar
from jaxtyping import Array, Float, Shaped

from .._blocks import Block, MatrixShape, Rows
from .._fold import Slot
from .._types import Model, Parameters


class TaggedLayer(eqx.Module):
    """A layer together with the curvature block of its parameters.

    It is called as the layer itself is, and computes the same. In its call it passes what it observes through
    [`kfax.observe`][]. Its other methods say how its parameters form one matrix V and what the rows of the two
    factors are; they are called on the layer with everything but the parameters that are trained replaced by `None`,
    so that a frozen parameter drops out of V by itself.

    **Fields:**

    - `layer`: what is wrapped.
    - `block`: how its curvature is approximated. Has no arrays, so that a tagged model has the array leaves of the
        original.
    - `slot`: `None`, except while an estimator observes the layer.
    """

    layer: AbstractVar[Any]
    block: AbstractVar[Block]
    slot: AbstractVar[Slot | None]

    @abc.abstractmethod
    def shape(self) -> MatrixShape:
        """The shape of V."""

    @abc.abstractmethod
    def rows(self, x: Array, dy: Array) -> Rows:
        """The rows of the factors, from observed inputs `(n, p, *x.shape)` and output cotangents `(n, p, *y.shape)`.

        Arrays of `self.layer` may be shapes without values here.
        """

    @abc.abstractmethod
    def to_matrix(self) -> Shaped[Array, "*stack d_g d_a"]:
        """V, from the parameters (or whatever stands in their places, such as their gradient)."""

    @abc.abstractmethod
    def from_matrix(self, matrix: Float[Array, "*stack d_g d_a"]) -> "TaggedLayer":
        """The layer with its parameters replaced by those in a matrix like V."""


def is_tagged(node: Any) -> bool:
    return isinstance(node, TaggedLayer)


def tagged_layers(tree: Model) -> dict[str, TaggedLayer]:
    """The tagged layers of a model (or of a tree like it) by path, in the order of its leaves.

    A layer without any parameter in `tree`, because all are frozen, is left out.
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tagged)
    return {jax.tree_util.keystr(path): node for path, node in nodes if is_tagged(node) and jax.tree.leaves(node.layer)}


def replace_layers(tree: Model, layers: Mapping[str, TaggedLayer]) -> Model:
    """The tree with new tagged layers at the given paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: layers.get(jax.tree_util.keystr(path), node), tree, is_leaf=is_tagged
    )


def fill_slots(model: Model, slots: Mapping[str, Slot]) -> Model:
    """The model with slots filled for the layers at the given paths."""
    layers = tagged_layers(model)

    def fill(layer, slot):
        return eqx.tree_at(lambda tagged: tagged.slot, layer, slot, is_leaf=lambda x: x is None)

    return replace_layers(model, {path: fill(layers[path], slot) for path, slot in slots.items()})


def to_matrices(tree: Parameters) -> dict[str, Shaped[Array, "..."]]:
    """The matrix V of each layer of a parameter tree."""
    return {path: layer.to_matrix() for path, layer in tagged_layers(tree).items()}


def from_matrices(tree: Parameters, matrices: Mapping[str, Float[Array, "..."]]) -> Parameters:
    """The parameter tree with those matrices in it."""
    layers = tagged_layers(tree)
    return replace_layers(tree, {path: layers[path].from_matrix(matrix) for path, matrix in matrices.items()})
