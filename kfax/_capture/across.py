"""Losses of a batch that is split over the devices of a `jax.shard_map`."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._math.arguments import loss_function
from .._math.tree import tie
from .._math.types import ArrayTree, Counter, PRNGKey, Scalar


_Tree = TypeVar("_Tree")


class Across(eqx.Module):
    """A `loss_fn` of which each device has some of the examples. See `across`."""

    loss_fn: Callable
    axis_name: str = eqx.field(static=True)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.loss_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.loss_fn(*args, **kwargs)


def across(loss_fn: Callable, axis_name: str) -> Across:
    """A `loss_fn` for use inside `jax.shard_map`, where each device has its own part of the batch.

    The objective is the mean over the examples of all devices along a mesh axis. Whatever is given this function
    ([`kfax.Optimizer`][] and its presets, `update` of an estimator) takes the means of loss, gradient, statistics and
    quadratic model over the axis, each device's weighted as its examples are, and returns the same on all of them.
    Random numbers differ between devices. What `loss_fn` returns besides losses (a model state, aux) stays each
    device's own, and batch normalization is over each device's examples, unless `loss_fn` itself averages along the
    axis.

    Outside of `jax.shard_map` batches need only be sharded, and no such function: see [many devices](../scaling.md).

    **Arguments:**

    - `loss_fn`: as for [`kfax.Optimizer`][].
    - `axis_name`: of the mesh axis over which the examples are split.

    **Returns:** a `loss_fn`.

    **Raises:** `ValueError` for an `axis_name` that is no name.
    """
    if not isinstance(axis_name, str):
        raise ValueError(f"`axis_name` must be the name of a mesh axis, such as 'data', got {axis_name!r}.")
    return Across(loss_function(loss_fn), axis_name)


def on_each(loss_fn: Callable, tree: _Tree) -> _Tree:
    """Arrays as those of each device, so that derivatives in them are its own and not summed over the axis."""
    if not isinstance(loss_fn, Across):
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(tie(arrays, _index(loss_fn)), rest)


def _index(loss_fn: Across) -> Counter:
    """Of this device along the axis."""
    try:
        return jax.lax.axis_index(loss_fn.axis_name)
    except NameError as error:
        raise ValueError(
            f"A `loss_fn` made by `kfax.across` was called where there is no axis `{loss_fn.axis_name}`: call `init`, "
            "`step` and all else that takes it inside `jax.shard_map`, over a mesh with this axis."
        ) from error


def own_key(loss_fn: Callable, key: PRNGKey) -> PRNGKey:
    """A key of each device."""
    if not isinstance(loss_fn, Across):
        return key
    return jax.random.fold_in(key, _index(loss_fn))


def mean_across(loss_fn: Callable, means: ArrayTree, weight: Scalar) -> tuple[ArrayTree, Scalar]:
    """Means over the examples of all devices, from those of each and from how much they count."""
    if not isinstance(loss_fn, Across):
        return means, weight
    total = jax.lax.psum(weight, loss_fn.axis_name)
    share = weight / jnp.where(total == 0, 1, total)

    def mean(x):
        return jax.lax.psum(share.astype(x.dtype) * x, loss_fn.axis_name)

    return jax.tree.map(mean, means), total
