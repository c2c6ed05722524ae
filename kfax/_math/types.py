"""Names for the shapes and callables that recur in signatures."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Float, Int, Key, UInt32


Scalar: TypeAlias = Float[Array, ""]
Counter: TypeAlias = Int[Array, ""]
Schedule: TypeAlias = Callable[[Any], Any]
PRNGKey: TypeAlias = Key[Array, ""] | UInt32[Array, "2"]

# To type checkers jaxtyping's own `PyTree` is unknown, which would make unknown whatever has to do with it.
PyTree: TypeAlias = Any
ArrayTree: TypeAlias = Any  # a PyTree of arrays
# A model, or something of a model's structure: its gradient, a direction, a filter.
Model: TypeAlias = PyTree
Parameters: TypeAlias = PyTree
# Selects nodes of a model, as the `where` of `equinox.tree_at` does.
Where: TypeAlias = Callable[[Any], Any]
