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
    return jax.lax.map(lambda vector: estimator.solve(state, vector), vectors, batch_size=AT_ONCE)


def dots(x: Parameters, y: Parameters) -> Float[Array, " q"]:
    """The inner product of each pair, in at least float32."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    dtype = jnp.result_type(jnp.float32, *(a for pair in pairs for a in pair))
    sums = [jnp.sum((a.astype(dtype) * b.astype(dtype)).reshape(len(a), -1), axis=1) for a, b in pairs]
    return jnp.sum(jnp.stack(sums), axis=0)


def check_stacked(name: str, vectors: Parameters, parameters: Parameters) -> None:
    """Raises an error unless all leaves are those of the parameters with one leading axis."""
    leaves, expected = jax.tree.leaves(vectors), jax.tree.leaves(parameters)
    is_like = jax.tree.structure(vectors) == jax.tree.structure(parameters)
    if not is_like or any(jnp.shape(x)[1:] != y.shape or jnp.ndim(x) == 0 for x, y in zip(leaves, expected)):
        raise ValueError(
            f"`{name}` must be a PyTree like `kfax.parameters_of(model)` (with the same `frozen=`), of which each array "
            "has a leading axis for the queries, as `gradients` returns it. Of a single vector: "
            "`jax.tree.map(lambda x: x[None], vector)`."
        )
    if len({len(x) for x in leaves}) > 1:
        raise ValueError(f"All arrays of `{name}` must have the same number of queries on axis 0.")
