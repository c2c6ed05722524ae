"""Comparisons, and small models."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

import kfax


# Relative to the largest number of the expected array. Looser ones state their reason where they are used.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def assert_close(actual, expected, tolerance=None):
    """Equal structure, shapes and dtypes of two PyTrees, and values up to a relative error."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        name = jax.tree_util.keystr(path)
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape, f"{name}: shape {x.shape}, expected {y.shape}"
        assert x.dtype == y.dtype, f"{name}: dtype {x.dtype}, expected {y.dtype}"
        if not np.issubdtype(x.dtype, np.floating) or x.size == 0:
            np.testing.assert_array_equal(x, y, err_msg=name)
            continue
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=name)
        bound = TOLERANCE[str(x.dtype)] if tolerance is None else tolerance
        finite = np.isfinite(y)
        error = np.max(np.abs(x[finite] - y[finite]), initial=0)
        scale = np.max(np.abs(y[finite]), initial=0)
        # Second moments of what vanishes are squares of rounding errors, far below any number that means something.
        assert error <= bound * scale + 1e-28, f"{name}: off by {error:.3g}, {error / (scale + 1e-28):.3g} relative"


def parameters(model):
    return eqx.filter(model, eqx.is_inexact_array)


def flat(tree):
    """All numbers of a PyTree in one vector."""
    return ravel_pytree(tree)[0]


def random(seed, *shape):
    """Normal numbers, the same for the same seed."""
    return jax.random.normal(jax.random.key(seed), shape)


def split(tree, mesh, axis):
    """Every array split along its longest dimension, of those that can be; with `axis=None` on all devices."""

    def put(x):
        spec = [None] * x.ndim
        sizes = [size if axis is not None and size % mesh.shape[axis] == 0 else 0 for size in x.shape]
        if any(sizes):
            spec[sizes.index(max(sizes))] = axis
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(lambda x: put(x) if eqx.is_array(x) else x, tree)


def layer_groups(model, paths):
    """For each number of the raveled parameters, which of the layers at `paths` it belongs to."""
    groups = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters(model)):
        [owner] = [i for i, prefix in enumerate(paths) if jax.tree_util.keystr(path).startswith(prefix + ".")]
        groups.append(jnp.full(leaf.size, owner))
    return jnp.concatenate(groups)


def as_it_is(rate):
    """A learning rate that is never lowered."""
    return kfax.LossConstraint(rate, jnp.inf)


def mlp(key, sizes, activation=jnp.tanh, use_bias=True, dtype=jnp.float64):
    """A plain MLP with the given layer sizes."""
    keys = jax.random.split(key, len(sizes))
    layers = []
    for i, (d_in, d_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers.append(eqx.nn.Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, key=keys[i]))
        if i < len(sizes) - 2 and activation is not None:
            layers.append(eqx.nn.Lambda(activation))
    return eqx.nn.Sequential(layers)
