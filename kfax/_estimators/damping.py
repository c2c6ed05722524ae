"""A damping for everything, or one for each block."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .._layers import from_matrices, to_matrices
from .._math.scalars import nonnegative
from .._math.types import Parameters, Scalar


def damping_by_parameter(parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]) -> Parameters:
    """λ of every parameter, in at least float32."""
    parameters = wide(parameters)
    if isinstance(damping, Mapping):
        matrices = to_matrices(parameters)
        dampings = damping_by_key(tuple(matrices), damping)
        return from_matrices(parameters, {k: jnp.full_like(m, dampings[k]) for k, m in matrices.items()})
    by = nonnegative("damping", damping)
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, by), parameters)


def damping_by_key(keys: Collection[str], damping: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, Scalar]:
    """λ of every block."""
    if not isinstance(damping, Mapping):
        return dict.fromkeys(keys, nonnegative("damping", damping))
    if set(damping) != set(keys):
        raise ValueError(f"`damping` must be a number, or have one for each of {list(keys)}, got {list(damping)}.")
    return {key: nonnegative("damping", damping[key]) for key in keys}


def wide(vector: Parameters) -> Parameters:
    """In at least float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), arrays_of(vector))


def arrays_of(vector: Parameters) -> Parameters:
    """A vector, checked to be one of arrays."""
    leaves = jax.tree.leaves(vector)
    if not all(hasattr(leaf, "astype") for leaf in leaves):
        names = sorted({type(leaf).__name__ for leaf in leaves if not hasattr(leaf, "astype")})
        raise ValueError(f"A vector must be a PyTree of arrays like `kfax.parameters_of(model)`, got {names} in it.")
    return vector
