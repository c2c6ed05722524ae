"""Batches and parameters for a structure: ordinary ones, and those that are at an edge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import networks
import numpy as np
from cases import ALL_LOSSES


KINDS = (
    *("normal", "equal", "zeros", "duplicates", "huge", "tiny", "constant", "outlier", "one-weight", "no-weight"),
    *("masked-throughout", "nothing-present", "flag-off", "zero-parameters", "large-parameters", "not-a-number"),
)
# Of numbers of this size a curvature or an update may overflow or be lost in rounding: then nothing is to be changed.
EXTREME = ("huge", "outlier", "large-parameters", "not-a-number", "no-weight", "masked-throughout")


def make_batch(structure, kind, seed):
    """The batch, with all numbers from NumPy."""
    rng = np.random.default_rng(seed)
    n, t, d = structure.num_examples, structure.num_positions, networks.D
    x = rng.standard_normal((n, t, d))
    last = 2 * networks.NUM_OUTPUTS if structure.loss == "gaussian_nll" else networks.NUM_OUTPUTS
    shape = (n, t, last) if structure.per_position else (n, last)
    y = np.array(ALL_LOSSES[structure.loss].targets(jax.random.key(seed), shape))
    weights = rng.uniform(0.2, 2.0, n)
    mask = rng.random((n, t) if structure.per_position else n) < 0.8
    mask.reshape(-1)[0] = True
    present, keep = rng.random((n, t)) < 0.7, rng.random(n) < 0.6
    present[0, 0] = keep[0] = True
    rows = [x, y, weights, mask, present, keep]
    if kind == "equal":
        mask[:], present[:], keep[:] = True, True, True
        for array in rows:
            array[:] = array[:1]
    elif kind == "duplicates":
        for array in rows:
            array[n // 2 :] = array[: n - n // 2]
    elif kind == "constant":
        x[..., :-1] = 1.0
    elif kind == "outlier":
        x[0] *= 1e6
    elif kind == "not-a-number":
        x[0, 0, 0] = np.nan
    elif kind in ("zeros", "huge", "tiny"):
        x *= {"zeros": 0.0, "huge": 1e10, "tiny": 1e-10}[kind]
    weights *= {"no-weight": 0.0, "one-weight": np.arange(n) == 0}.get(kind, 1.0)
    if kind == "masked-throughout":
        mask[:] = False
    if kind == "nothing-present":
        present[:] = keep[:] = False
    batch = {"x": x, "y": y, "weights": weights, "mask": mask, "present": present, "keep": keep}
    if structure.layout == "second-axis":
        batch["x"] = np.swapaxes(x, 0, 1)
    batch = {name: jnp.asarray(_narrow(structure, array)) for name, array in batch.items()}
    return batch | {"flag": jnp.full(n, kind != "flag-off")}  # for each example, so that batches can be split


def make_parameters(structure, kind, network, seed):
    """The network with other numbers."""
    rng = np.random.default_rng(seed)
    scale = {"zero-parameters": 0.0, "large-parameters": 1e4}.get(kind, 0.6)

    def draw(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, network)


def perturbed(structure, tree, seed):
    """Every number changed by about its rounding."""
    rng, eps = np.random.default_rng(seed), 4 * np.finfo(structure.dtype).eps

    def change(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jnp.asarray(np.asarray(leaf, np.float64) * (1 + eps * rng.choice([-1, 1], leaf.shape)))

    return jax.tree.map(change, tree)


def _narrow(structure, array):
    return array.astype(structure.dtype) if np.issubdtype(array.dtype, np.floating) else array
