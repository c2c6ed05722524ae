"""Sums and second moments of the patches of images, without making all of the patches."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


# Chosen by benchmarks/patch_moments.py: a lag costs a few operations of the program, hence time to compile; several
# lagged axes make many small products, that are fast only if they are not too small.
_MAX_LAGGED_KERNEL = 9
_MAX_NEXT_KERNEL = 3
_MIN_PRODUCT = 128

_EXACT = jax.lax.Precision.HIGHEST

_Taps = tuple[int, ...]
_Index = dict[tuple[_Taps, _Taps], int]  # which block belongs to a pair of taps


@dataclasses.dataclass(frozen=True)
class Axis:
    """The windows along one spatial axis. Tap i of window u is at pixel `u * stride + i * dilation - before`.

    **Fields:**

    - `kernel`, `stride`, `dilation`: as of a convolution.
    - `size`: of the image. What lies outside of it is zero.
    - `before`: where the first window starts; negative if that is inside of the image.
    - `count`: the number of windows.
    """

    kernel: int
    stride: int
    dilation: int
    size: int
    before: int
    count: int

    @property
    def reach(self) -> int:
        """From the first tap to the last."""
        return self.dilation * (self.kernel - 1)

    def membership(self) -> Bool[np.ndarray, "kernel size"]:
        """Which pixels a tap sees in some window."""
        taps, windows = np.arange(self.kernel) * self.dilation, np.arange(self.count) * self.stride
        seen = (taps[:, None] + windows - self.before)[..., None] == np.arange(self.size)
        return np.any(seen, axis=1)

    def intervals(self, lag: int) -> list[tuple[int, int]]:
        """For stride 1 and every pair of taps `(i, i + lag)`: all pixels v at tap i such that tap i + lag is inside."""
        shift = lag * self.dilation
        starts = [i * self.dilation - self.before for i in range(self.kernel - lag)]
        return [(max(s, 0), min(s + self.count, self.size - shift)) for s in starts]

    def has_lags(self) -> bool:
        """Whether pairs of taps that are equally far apart have pixels in common that all of them see."""
        if self.stride > 1 or not 1 < self.kernel <= _MAX_LAGGED_KERNEL:
            return False
        starts, stops = zip(*self.intervals(0), strict=True)
        return self.size > self.reach and max(starts) < min(stops)


def patch_sums(images: Float[Array, "..."], axes: Sequence[Axis], dtype: Any) -> Float[Array, "..."]:
    """The sum over all patches of images `(..., *spatial)`: `(..., *kernel)`.

    One product with a matrix of zeros and ones for each axis: as many multiply-adds for each pixel as the kernel has
    taps along the first axis.
    """
    for axis in axes:
        position = images.ndim - len(axes)
        seen = jnp.asarray(axis.membership(), images.dtype)
        images = jnp.tensordot(images, seen, ((position,), (1,)), precision=_EXACT, preferred_element_type=dtype)
    return images


def patch_moment(
    images: Float[Array, "n channels *spatial"],
    axes: Sequence[Axis],
    num_groups: int,
    weights: Float[Array, " n"] | None,
    dtype: Any,
) -> Float[Array, "groups d d"]:
    r"""`Σ w a aᵀ` over all patches a of each group of channels; `d` counts channels before taps.

    Pairs of taps that are the same lag apart see the same pairs of pixels, but for those near the edges of the image.
    Along an axis of stride 1, with $I_i$ the pixels that tap i sees, all of size T, and $C_\delta$ those that every
    pair $(i, i + \delta)$ has in common,

    $$A_{i, i + \delta} = \sum_{v \in I_i} x_v x_{v + \delta}^\top
        = \sum_{v \in C_\delta} x_v x_{v + \delta}^\top + \sum_{v \in I_i \setminus C_\delta} x_v x_{v + \delta}^\top$$

    where the first sum is made once for each lag and the others are cut into strips, each of which is made once.
    Nothing is subtracted, so that nothing cancels. By symmetry half of the lags are enough. Along all other axes the
    windows are made explicit, and their taps become channels.

    Cost for each pixel and pair of channels: `k Π k'²` multiply-adds, for a kernel of size k along the axis whose lags
    are used and k' along others, instead of `k² Π k'²` for explicit patches; memory for `Π k'` images. With many
    channels and small kernels the lags of further axes are used as well: `2k' - 1` replaces `k'²`, and 1 in memory.
    """
    num_channels, num_axes = images.shape[1] // num_groups, len(axes)
    size = num_channels * math.prod(axis.kernel for axis in axes)
    if not all(axis.count for axis in axes):
        return jnp.zeros((num_groups, size, size), dtype)
    lagged = _choose_lagged(axes, num_channels)
    # (groups, channels of a group, n, *spatial), where taps get in front of the channels.
    x = jnp.moveaxis(images.reshape(images.shape[0], num_groups, num_channels, *images.shape[2:]), 0, 2)
    for i in reversed(range(num_axes)):
        x = x if i in lagged else _taps_as_channels(x, axes[i], 3 + i)
    left = x if weights is None else x * weights.reshape(-1, *[1] * num_axes).astype(x.dtype)
    blocks, index = _lagged_moments(left, x, [(3 + i, axes[i]) for i in lagged], dtype, symmetric=True)

    # (groups, *lags, *lags, *others, channels, *others, channels) -> (groups, channels, *taps, channels, *taps)
    lags = [axis.kernel if i in lagged else 1 for i, axis in enumerate(axes)]
    others = [1 if i in lagged else axis.kernel for i, axis in enumerate(axes)]
    moment = _all_pairs(blocks, index, [axes[i].kernel for i in lagged])
    moment = moment.reshape(num_groups, *lags, *lags, *others, num_channels, *others, num_channels)
    rows = [(1 + i, 1 + 2 * num_axes + i) for i in range(num_axes)]
    columns = [(1 + num_axes + i, 2 + 3 * num_axes + i) for i in range(num_axes)]
    order = [0, 1 + 3 * num_axes, *itertools.chain(*rows), 2 + 4 * num_axes, *itertools.chain(*columns)]
    return jnp.transpose(moment, order).reshape(num_groups, size, size)


def _choose_lagged(axes: Sequence[Axis], num_channels: int) -> list[int]:
    """The axes whose lags are used: the one with most taps, and others as long as products stay large."""
    candidates = sorted((i for i, axis in enumerate(axes) if axis.has_lags()), key=lambda i: -axes[i].kernel)
    chosen = candidates[:1]
    for i in candidates[1:]:
        width = num_channels * math.prod(axis.kernel for j, axis in enumerate(axes) if j not in (*chosen, i))
        if axes[i].kernel <= _MAX_NEXT_KERNEL and width >= _MIN_PRODUCT:
            chosen.append(i)
    return sorted(chosen)


def _taps_as_channels(x: Array, axis: Axis, position: int) -> Array:
    """`(groups, channels, ...)` to `(groups, kernel x channels, ...)`, with windows along the axis."""
    span = axis.stride * (axis.count - 1) + 1
    config = [(0, 0, 0)] * x.ndim
    config[position] = (axis.before, span + axis.reach - axis.before - axis.size, 0)  # may cut pixels off
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    starts = range(0, axis.reach + 1, axis.dilation)
    taps = [jax.lax.slice_in_dim(x, start, start + span, axis.stride, position) for start in starts]
    return jnp.stack(taps, axis=1).reshape(x.shape[0], -1, *taps[0].shape[2:])


def _lagged_moments(
    left: Array, right: Array, axes: Sequence[tuple[int, Axis]], dtype: Any, *, symmetric: bool
) -> tuple[Float[Array, "batch blocks c c"], _Index]:
    """`Σ left rightᵀ` for pairs of taps along the given axes.

    `left` and `right` are `(batch, c, ...)`. All axes but the first two are summed over, those given (with their
    positions) in windows. Of two blocks that are transposes of each other, `symmetric` leaves out one.
    """
    if not axes:
        return _product(left, right, dtype)[:, None], {((), ()): 0}
    kernel = axes[0][1].kernel
    blocks, index, num_blocks = [], {}, 0
    for lag in range(0 if symmetric else 1 - kernel, kernel):
        sums, inner = _moments_of_lag(left, right, axes, lag, dtype, symmetric=symmetric and lag == 0)
        for i in range(kernel - abs(lag)):
            first, second = max(i, i - lag), max(i, i + lag)
            offset = num_blocks + (i * sums.shape[2] if sums.shape[1] > 1 else 0)
            index.update({((first, *p), (second, *q)): offset + block for (p, q), block in inner.items()})
        blocks.append(sums.reshape(sums.shape[0], -1, *sums.shape[3:]))
        num_blocks += blocks[-1].shape[1]
    return jnp.concatenate(blocks, axis=1), index


def _moments_of_lag(
    left: Array, right: Array, axes: Sequence[tuple[int, Axis]], lag: int, dtype: Any, *, symmetric: bool
) -> tuple[Float[Array, "batch pairs blocks c c"], _Index]:
    """As `_lagged_moments`, for pairs `(i, i + lag)` along the first axis: one for all if they see the same pixels."""
    (position, axis), *rest = axes
    intervals = axis.intervals(abs(lag))
    pairs = (left, max(-lag, 0) * axis.dilation), (right, max(lag, 0) * axis.dilation)
    starts, stops = zip(*intervals, strict=True)
    start, stop = max(starts), min(stops)
    common = [jax.lax.slice_in_dim(x, start + s, stop + s, axis=position) for x, s in pairs]
    sums, index = _lagged_moments(common[0], common[1], rest, dtype, symmetric=symmetric)
    sums = sums[:, None]
    edges = [(a, b) for a, b in ((min(starts), start), (stop, max(stops))) if a < b]
    if not edges:
        return sums, index
    # The edges are cut into strips of one width, such that every interval consists of whole strips.
    width = math.gcd(*(start - a for a in starts), *(b - stop for b in stops))
    pieces = [_strips(x, [(a + s, b + s) for a, b in edges], width, position) for x, s in pairs]
    strips, _ = _lagged_moments(pieces[0], pieces[1], rest, dtype, symmetric=symmetric)
    strips = strips.reshape(sums.shape[0], -1, *sums.shape[2:])
    points = [point for a, b in edges for point in range(a, b, width)]
    seen = np.array([[True, *(a <= point < b for point in points)] for a, b in intervals])
    sums = jnp.concatenate([sums, strips], axis=1)
    return jnp.einsum("is,bspcd->bipcd", jnp.asarray(seen, sums.dtype), sums, precision=_EXACT), index


def _strips(x: Array, edges: Sequence[tuple[int, int]], width: int, position: int) -> Array:
    """`(batch, ...)` to `(batch x strips, ...)`, where the axis at `position` keeps `width` pixels."""
    x = jnp.concatenate([jax.lax.slice_in_dim(x, a, b, axis=position) for a, b in edges], axis=position)
    x = x.reshape(*x.shape[:position], -1, width, *x.shape[position + 1 :])
    return jnp.moveaxis(x, position, 1).reshape(-1, *x.shape[1:position], *x.shape[position + 1 :])


def _product(left: Array, right: Array, dtype: Any) -> Float[Array, "batch c c"]:
    """`Σ left rightᵀ` over all axes but the first two."""
    left, right = left.reshape(*left.shape[:2], -1), right.reshape(*right.shape[:2], -1)
    return jax.lax.dot_general(left, right, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)


def _all_pairs(blocks: Float[Array, "groups blocks c c"], index: _Index, lags: Sequence[int]) -> Array:
    """`(groups, taps, taps, c, c)`, with the blocks that were left out."""
    num_taps = math.prod(lags)
    table = np.full((num_taps, num_taps), -1)
    for (first, second), block in index.items():
        table[np.ravel_multi_index(first, lags), np.ravel_multi_index(second, lags)] = block
    table = np.where(table < 0, table.T + blocks.shape[1], table)
    return jnp.concatenate([blocks, jnp.swapaxes(blocks, -1, -2)], axis=1)[:, table]
