"""Convolutions, and their transposes."""

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from .._blocks import KroneckerFactored
from .._operations import Convolution, Operation, Windows
from .base import Blocks, check_wraps, Slots, TaggedLayer


_PAD_MODES = {"ZEROS": "constant", "REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


class TaggedConv(TaggedLayer):
    """An `equinox.nn.Conv` (`Conv1d`, `Conv2d`, `Conv3d`) whose curvature is estimated.

    Each group has a matrix `V = [W b]`, of shape `(out_channels / groups, in_channels / groups x taps + 1)`, which is
    applied to every patch of the padded image. With the default block this is KFC, for any stride, padding (zeros and
    all other modes), dilation and number of groups.
    """

    layer: eqx.nn.Conv
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.Conv, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the convolution to wrap.
        - `block`: how its curvature is approximated. `kfax.KroneckerFactored(kfax.Reduce())` is cheaper, and exact
            where the patches are pooled linearly.

        **Raises:** `ValueError` for anything that is not a convolution or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.Conv)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.Conv`: from `(in_channels, *spatial)` to `(out_channels, *spatial)`."""
        return self.observe(self.layer(x, key=key), x)

    def operations(self) -> dict[str, Operation]:
        layer = self.layer
        windows = Windows(
            layer.kernel_size, layer.stride, layer.dilation, layer.padding, pad_mode=_PAD_MODES[layer.padding_mode]
        )
        return {"": Convolution(layer.weight, layer.bias, windows, layer.groups)}


class TaggedConvTranspose(TaggedLayer):
    """An `equinox.nn.ConvTranspose` (`ConvTranspose1d`, `2d`, `3d`) whose curvature is estimated.

    As [`kfax.TaggedConv`][]: a transposed convolution is a convolution of the image with zeros put between its pixels.
    """

    layer: eqx.nn.ConvTranspose
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.ConvTranspose, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the transposed convolution to wrap.
        - `block`: how its curvature is approximated.

        **Raises:** `ValueError` for anything that is not a transposed convolution or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.ConvTranspose)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.ConvTranspose`: from `(in_channels, *spatial)` to `(out_channels, *spatial)`."""
        return self.observe(self.layer(x, key=key), x)

    def operations(self) -> dict[str, Operation]:
        layer = self.layer
        padding, wrap = _padding(layer), None
        if layer.padding_mode == "CIRCULAR":
            # Whole pixels are wrapped around before zeros are put between them; what is left is cut or filled.
            pairs = list(zip(padding, layer.stride, strict=True))
            wrap = tuple((low // s, high // s) for (low, high), s in pairs)
            padding = tuple((low % s, high % s) for (low, high), s in pairs)
        strides = (1,) * layer.num_spatial_dims
        windows = Windows(layer.kernel_size, strides, layer.dilation, padding, spread=layer.stride, wrap=wrap)
        return {"": Convolution(layer.weight, layer.bias, windows, layer.groups)}


def _padding(layer: eqx.nn.ConvTranspose) -> tuple[tuple[int, int], ...]:
    """Of the spread image, such that output and input have the shapes of a convolution's input and output."""
    result = []
    dims = zip(layer.kernel_size, layer.stride, layer.dilation, layer.output_padding, strict=True)
    for i, (kernel, stride, dilation, extra) in enumerate(dims):
        reach = dilation * (kernel - 1)
        if layer.padding == "VALID":
            before = after = 0
        elif isinstance(layer.padding, str):
            total = reach - stride + extra + 1
            total, extra = max(total, 0), max(-total, 0)
            before = (total + (layer.padding == "SAME_LOWER")) // 2
            after = total - before
        else:
            before, after = layer.padding[i]
        result.append((reach - before, reach - after + extra))
    return tuple(result)
