"""Layers with an elementwise scale and shift: normalizations, and PReLU."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._blocks import UnitWise
from .._operations import Operation, ScaleAndShift
from .base import Blocks, check_wraps, Slots, TaggedLayer


class TaggedNorm(TaggedLayer):
    """An `equinox.nn.LayerNorm`, `RMSNorm` or `GroupNorm` whose curvature is estimated.

    Scale and shift of each feature (channel) are a row of its matrix `V`, `(features, 2)`. The default block is exact
    for each feature, a 2x2 matrix.
    """

    layer: eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.GroupNorm
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.GroupNorm, *, block: Blocks = UnitWise()):
        """**Arguments:**

        - `layer`: the normalization to wrap.
        - `block`: how its curvature is approximated: [`kfax.UnitWise`][], [`kfax.Diagonal`][] or [`kfax.Full`][].

        **Raises:** `ValueError` for anything that is not such a normalization or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm)

    def __call__(self, x: Array, *args: Any, key: PRNGKeyArray | None = None) -> Any:
        """As the layer itself."""
        return _observed_norm(self, x, *args, key=key)

    def operations(self) -> dict[str, Operation]:
        shape = getattr(self.layer, "shape", None)  # a GroupNorm has one scale for each channel
        return {"": ScaleAndShift(self.layer.weight, self.layer.bias, 1 if shape is None else len(shape))}


class TaggedBatchNorm(TaggedLayer, eqx.nn.StatefulLayer):
    """An `equinox.nn.BatchNorm` whose curvature is estimated; its state is threaded as ever.

    As [`kfax.TaggedNorm`][]. A batch normalization couples the examples of a batch. Its own scale and shift do not, but
    those of earlier layers reach the loss also through the other examples' normalization, which per-example
    curvature leaves out.
    """

    layer: eqx.nn.BatchNorm
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.BatchNorm, *, block: Blocks = UnitWise()):
        """**Arguments:**

        - `layer`: the normalization to wrap.
        - `block`: how its curvature is approximated: [`kfax.UnitWise`][], [`kfax.Diagonal`][] or [`kfax.Full`][].

        **Raises:** `ValueError` for anything that is not a batch normalization or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.BatchNorm)

    def __call__(
        self, x: Array, state: eqx.nn.State, *, key: PRNGKeyArray | None = None, inference: bool | None = None
    ) -> tuple[Array, eqx.nn.State]:
        """As `equinox.nn.BatchNorm`: from `(channels, *spatial)` to the same, and the new state."""
        return _observed_norm(self, x, state, key=key, inference=inference)

    def operations(self) -> dict[str, Operation]:
        return {"": ScaleAndShift(self.layer.weight, self.layer.bias)}


class TaggedPReLU(TaggedLayer):
    """An `equinox.nn.PReLU` whose curvature is estimated.

    The slopes, however many there are, are the scale of the negative part of the input. To have it stacked by
    `equinox.filter_vmap`, tag it inside the function that is mapped.
    """

    layer: eqx.nn.PReLU
    block: Blocks
    slots: Slots
    num_axes: int = eqx.field(static=True)

    def __init__(self, layer: eqx.nn.PReLU, *, block: Blocks = UnitWise()):
        """**Arguments:**

        - `layer`: the activation to wrap.
        - `block`: how its curvature is approximated: [`kfax.UnitWise`][] (which is diagonal here), or
            [`kfax.Full`][].

        **Raises:** `ValueError` for anything that is not a PReLU or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.PReLU)
        self.num_axes = layer.negative_slope.ndim

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.PReLU`, elementwise."""
        y = self.layer(x)
        if self.slots is None:
            return y
        # Slopes are broadcast along the first axes of the input: these are put last.
        extra = y.ndim - self.num_axes
        first, last = tuple(range(extra)), tuple(range(-extra, 0))
        y, negative = (
            jnp.moveaxis(array, first, last) for array in (y, jnp.broadcast_to(jnp.where(x >= 0, 0, x), y.shape))
        )
        return jnp.moveaxis(self.observe(y, negative), last, first)

    def operations(self) -> dict[str, Operation]:
        return {"": ScaleAndShift(self.layer.negative_slope, None, self.num_axes)}


def _observed_norm(tagged: TaggedLayer, x: Array, *args: Any, **options: Any) -> Any:
    """Calls a normalization, and observes its scale and shift of what it is without them."""
    if tagged.slots is None:
        return tagged.layer(x, *args, **options)
    # A state can be used once; a copy of the tree is another one.
    out = tagged.layer(x, *jax.tree.map(lambda leaf: leaf, args), **options)
    plain = tagged.layer
    if plain.weight is not None:
        plain = eqx.tree_at(lambda norm: norm.weight, plain, jnp.ones_like(plain.weight))
    if plain.bias is not None:
        plain = eqx.tree_at(lambda norm: norm.bias, plain, jnp.zeros_like(plain.bias))
    normalized = plain(x, *args, **options)
    if isinstance(out, tuple):
        return tagged.observe(out[0], normalized[0]), *out[1:]
    return tagged.observe(out, normalized)
