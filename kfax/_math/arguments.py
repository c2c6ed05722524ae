"""Arguments that a user gives, other than numbers and schedules, checked."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .types import PRNGKey


def flag(name: str, value: Any) -> bool:
    """`True` or `False`, and nothing that is merely true or false."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be `True` or `False`, got {_described(value)}.")
    return bool(value)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is no less than another."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number, at least {least}, got {_described(value)}.")
    return value


def function(name: str, value: Any, example: str) -> Callable:
    """Something that can be called, and is no class."""
    if isinstance(value, type) or not callable(value):
        raise ValueError(f"`{name}` must be a function, as in `{example}`, got {_described(value)}.")
    return value


def selection(name: str, value: Any) -> Callable:
    """A function of the model that returns nodes of it."""
    if isinstance(value, type | eqx.Module) or not callable(value):
        raise ValueError(
            f"{name} must be a function of the model, as in `lambda model: model.layers[0]`, got {_described(value)}."
        )
    return value


def array(name: str, value: Any, dtype: Any = None) -> Array:
    """An array of what can be made one. `name` has its backticks, and may say of what the argument is one."""
    try:
        if isinstance(value, str):  # which NumPy would parse
            raise TypeError(value)
        return jnp.asarray(value, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}.") from error


def single_key(value: Any) -> PRNGKey:
    """One key for random numbers."""
    try:
        jax.eval_shape(jax.random.split, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`key` must be a single JAX key, such as `jax.random.key(0)`, got {value!r}.") from error
    return value


def _described(value: Any) -> str:
    return f"an array of shape {value.shape}" if eqx.is_array(value) else repr(value)
