"""Convolution: multiplication of every patch of an image by one matrix."""

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .base import append_bias, FactoredOperation, MatrixShape, widen
from .patch_moments import Axis, patch_moment, patch_sums


class Windows(eqx.Module):
    """Which patches of an image a convolution sees, for any number of spatial dimensions.

    **Fields:**

    - `kernel`: the number of taps along each dimension.
    - `stride`: from one patch to the next.
    - `dilation`: from one tap to the next.
    - `spread`: from one pixel to the next when the image is spread out with zeros in between, as by a transposed
        convolution.
    - `padding`: `(before, after)` for each dimension, after spreading; may be negative.
    - `pad_mode`: of `jax.numpy.pad`.
    - `wrap`: `(before, after)` for each dimension, of circular padding before spreading.
    """

    kernel: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    dilation: tuple[int, ...] = eqx.field(static=True)
    padding: tuple[tuple[int, int], ...] | str = eqx.field(static=True)
    pad_mode: str = eqx.field(static=True, default="constant")
    spread: tuple[int, ...] | None = eqx.field(static=True, default=None)
    wrap: tuple[tuple[int, int], ...] | None = eqx.field(static=True, default=None)

    def pad(self, images: Array) -> Array:
        """`(..., *spatial)` with everything that any patch contains."""
        images, padding = self._wrapped(images)
        none = [(0, 0)] * (images.ndim - len(self.kernel))
        if self.pad_mode != "constant":
            return jnp.pad(images, [*none, *padding], mode=self.pad_mode)
        interior = [0] * len(self.kernel) if self.spread is None else [s - 1 for s in self.spread]
        config = [(lo, hi, inner) for (lo, hi), inner in zip(padding, interior, strict=True)]
        return jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0)] * len(none) + config)

    def axes(self, images: Array) -> tuple[Array, list[Axis]]:
        """The images, padded unless by zeros around them, and how the patches lie in them."""
        padded = jax.eval_shape(self.pad, images).shape[-len(self.kernel) :]
        counts = self.num_patches(padded)
        if self.pad_mode == "constant" and self.spread is None:
            images, padding = self._wrapped(images)
            before = [lo for lo, _ in padding]
        else:
            images, before = self.pad(images), [0] * len(self.kernel)
        sizes = images.shape[-len(self.kernel) :]
        numbers = zip(self.kernel, self.stride, self.dilation, sizes, before, counts, strict=True)
        return images, [Axis(*each) for each in numbers]

    def _wrapped(self, images: Array) -> tuple[Array, Any]:
        """The images after circular padding, and the padding that remains."""
        lead = images.ndim - len(self.kernel)
        if self.wrap is not None:
            images = jnp.pad(images, [(0, 0)] * lead + list(self.wrap), mode="wrap")
        if isinstance(self.padding, str):
            extent = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
            return images, jax.lax.padtype_to_pads(images.shape[lead:], extent, self.stride, self.padding)
        return images, self.padding

    def num_patches(self, padded: tuple[int, ...]) -> tuple[int, ...]:
        """How many patches there are along each dimension of a padded image."""
        sizes = zip(padded, self.kernel, self.dilation, self.stride, strict=True)
        return tuple(max((size - d * (k - 1) - 1) // s + 1, 0) for size, k, d, s in sizes)

    def patches(self, images: Array) -> Float[Array, "... taps channels patches"]:
        """All patches of images `(..., channels, *spatial)`, by tap in row-major order."""
        num_dims = len(self.kernel)
        padded = self.pad(images)
        lead = padded.ndim - num_dims
        counts = self.num_patches(padded.shape[lead:])
        taps = []
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            start = [t * d for t, d in zip(tap, self.dilation, strict=True)]
            stop = [b + s * (c - 1) + 1 for b, s, c in zip(start, self.stride, counts, strict=True)]
            shown = jax.lax.slice(
                padded, [0] * lead + start, [*padded.shape[:lead], *stop], [1] * lead + list(self.stride)
            )
            taps.append(shown.reshape(*shown.shape[:lead], -1))
        return jnp.stack(taps, axis=-3)


class Convolution(FactoredOperation):
    """`y = W * x + b` for an image x, `(channels, *spatial)`, with any stride, padding, dilation and groups.

    Each group is a matrix `V = [W b]`, of shape `(outputs / groups, channels / groups x taps + 1)`, that is applied to
    every patch.

    **Fields:**

    - `weight`: W, `(*stack, outputs, channels / groups, *kernel)`, or `None` if it is frozen.
    - `bias`: b, `(*stack, outputs, 1, ...)`, or `None` if there is none or it is frozen.
    - `windows`: the patches.
    - `num_groups`: how many.
    """

    weight: Any
    bias: Any
    windows: Windows = eqx.field(static=True)
    num_groups: int = eqx.field(static=True, default=1)

    def shape(self) -> MatrixShape:
        num_dims = len(self.windows.kernel)
        if self.weight is not None:
            *stack, outputs, channels = self.weight.shape[: self.weight.ndim - num_dims]
            inputs, dtype = channels * math.prod(self.windows.kernel), self.weight.dtype
        else:
            *stack, outputs = self.bias.shape[: self.bias.ndim - num_dims]
            inputs, dtype = 0, self.bias.dtype
        outputs = outputs // self.num_groups
        return MatrixShape(tuple(stack), outputs, inputs, self.bias is not None, dtype, groups=self._groups)

    def to_matrix(self) -> Shaped[Array, "*leading d_g d_a"]:
        shape = self.shape()
        columns = []
        if self.weight is not None:
            columns.append(self.weight.reshape(*shape.leading, shape.d_g, shape.num_inputs))
        if self.bias is not None:
            columns.append(self.bias.reshape(*shape.leading, shape.d_g, 1))
        return jnp.concatenate(columns, axis=-1)

    def from_matrix(self, matrix: Float[Array, "*leading d_g d_a"]) -> "Convolution":
        num_inputs = self.shape().num_inputs
        weight = None if self.weight is None else matrix[..., :num_inputs].reshape(self.weight.shape)
        bias = None if self.bias is None else matrix[..., -1].reshape(self.bias.shape)
        return Convolution(weight, bias, self.windows, self.num_groups)

    def gradient(self, x: Array, dy: Array, context: Any) -> Float[Array, "*groups d_g d_a"]:
        x, dy = widen(x), widen(dy)
        g = self.cotangents(dy[None])[..., 0, :, :]
        columns = []
        if self.weight is not None:
            a = self._rows(x[None])[..., 0, :, :]
            columns.append(jnp.swapaxes(g, -1, -2) @ a)
        if self.bias is not None:
            columns.append(jnp.sum(g, axis=-2)[..., None])
        return jnp.concatenate(columns, axis=-1)

    def of_tangents(self) -> "Convolution | None":
        return None if self.weight is None else Convolution(self.weight, None, self.windows, self.num_groups)

    def num_positions(self, x: Array) -> int:
        num_dims = len(self.windows.kernel)
        padded = jax.eval_shape(self.windows.pad, x).shape
        return math.prod(self.windows.num_patches(padded[len(padded) - num_dims :]))

    def input_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        moment = self._patch_moment(x, weights, dtype, diagonal=diagonal)
        if self.bias is None:
            return moment
        sums = jnp.sum(self.input_sums(x, weights, dtype), axis=-2)
        count = jnp.asarray(math.prod(x.shape[:2]) if weights is None else jnp.sum(weights, dtype=dtype))
        return append_bias(moment, sums, count * self.num_positions(x), diagonal=diagonal)

    def _patch_moment(self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any, *, diagonal: bool) -> Array:
        """Without the constant 1 of a bias."""
        num_inputs = self.shape().num_inputs
        if self.weight is None:
            return jnp.zeros((*self._groups, *[0] * (1 if diagonal else 2)), dtype)
        images, axes = self.windows.axes(x.reshape(-1, *x.shape[2:]))
        weights = None if weights is None else weights.reshape(-1)
        if not diagonal:
            moment = patch_moment(images, axes, self.num_groups, weights, dtype)
            return moment.reshape(*self._groups, num_inputs, num_inputs)
        squares = _weighted_sum(jnp.square(images.astype(dtype)), weights, 0)
        return patch_sums(squares, axes, dtype).reshape(*self._groups, num_inputs)

    def input_sums(
        self, x: Array, weights: Float[Array, "n p"] | None, dtype: Any
    ) -> Float[Array, "*groups n num_inputs"]:
        num_inputs = self.shape().num_inputs
        if self.weight is None:
            return jnp.zeros((*self._groups, x.shape[0], 0), dtype)
        images, axes = self.windows.axes(_weighted_sum(x.astype(dtype), weights, 1))
        sums = patch_sums(images, axes, dtype).reshape(x.shape[0], *self._groups, num_inputs)
        return jnp.moveaxis(sums, 1, 0) if self._groups else sums

    def inputs(self, x: Array) -> Float[Array, "*groups n r d_a"]:
        rows = self._rows(x)
        return rows if self.bias is None else jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, 1)], constant_values=1)

    def cotangents(self, dy: Array) -> Float[Array, "*groups n r d_g"]:
        n, p, outputs = dy.shape[:3]
        g = dy.reshape(n, p, *self._groups, outputs // self.num_groups, -1)
        if self._groups:
            g = jnp.moveaxis(g, 2, 0)
        return jnp.moveaxis(g, -1, -2).reshape(*self._groups, n, -1, outputs // self.num_groups)

    @property
    def _groups(self) -> tuple[int, ...]:
        return (self.num_groups,) if self.num_groups > 1 else ()

    def _rows(self, x: Array) -> Float[Array, "*groups n r num_inputs"]:
        """All patches, with channels before taps as in the weight."""
        n, p, channels = x.shape[:3]
        if self.weight is None:
            return jnp.zeros((*self._groups, n, p * self.num_positions(x), 0), x.dtype)
        patches = self.windows.patches(x)  # (n, p, taps, channels, patches)
        patches = patches.reshape(n, p, patches.shape[2], *self._groups, channels // self.num_groups, -1)
        if self._groups:
            patches = jnp.moveaxis(patches, 3, 0)
        # (*groups, n, p, taps, channels, patches) -> (*groups, n, p, patches, channels, taps)
        patches = jnp.swapaxes(patches, -1, -3)
        return patches.reshape(*self._groups, n, -1, patches.shape[-1] * patches.shape[-2])


def _weighted_sum(x: Array, weights: Array | None, axis: int) -> Array:
    """Over one axis, with weights for all axes up to it."""
    if weights is not None:
        x = x * weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim)).astype(x.dtype)
    return jnp.sum(x, axis=axis)
