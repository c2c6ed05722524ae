"""Vectors like the parameters, several of them in one PyTree: each leaf has a leading axis that enumerates them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._estimators import CurvatureEstimator
from .._math.types import Parameters


# Enough for the matrix units to be busy, few enough for what an iterative solver keeps of a batch.
AT_ONCE = 32


def solve_each(estimator: CurvatureEstimator, state: Any, vectors: Parameters) -> Parameters:
    """`(C + λI)⁻¹ v` of each of them."""
    check_stack("queries", vectors)
    return jax.lax.map(lambda vector: estimator.solve(state, vector), vectors, batch_size=AT_ONCE)


def dots(x: Parameters, y: Parameters) -> Float[Array, " q"]:
    """The inner product of each pair, in at least float32."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    dtype = jnp.result_type(jnp.float32, *(a for pair in pairs for a in pair))
    sums = [jnp.sum((a.astype(dtype) * b.astype(dtype)).reshape(len(a), -1), axis=1) for a, b in pairs]
    return jnp.sum(jnp.stack(sums), axis=0)


def check_stack(name: str, vectors: Parameters, like: Parameters | None = None) -> None:
    """Raises an error unless all arrays have the same leading axis, and are otherwise those of a vector `like` them."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(vectors)]
    is_stack = len({shape[:1] for shape in shapes}) == 1 and shapes[0] != ()
    if like is not None:
        is_like = jax.tree.structure(vectors) == jax.tree.structure(like)
        is_stack = is_stack and is_like and [shape[1:] for shape in shapes] == [x.shape for x in jax.tree.leaves(like)]
    if not is_stack:
        raise ValueError(
            f"`{name}` must be a PyTree like `kfax.parameters_of(model)` (or `kfax.parameters_of(model, frozen=...)`), "
            "of which each array has one more axis, the first, for the queries. Of a single vector it is "
            "`jax.tree.map(lambda x: x[None], vector)`."
        )
