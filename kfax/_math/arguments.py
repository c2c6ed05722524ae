"""Arguments that a user gives, other than numbers and schedules, checked."""

import inspect
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


def function(name: str, value: Any, example: str, count: int = 1) -> Callable:
    """Something that can be called with so many arguments, and is no class."""
    if not _takes(value, count):
        raise ValueError(f"`{name}` must be a function, as in `{example}`, got {_described(value)}.")
    return value


def loss_function(value: Any) -> Callable:
    """A function of model and batch."""
    if not _takes(value, 2):
        raise ValueError(
            f"`loss_fn` must be a function of model and batch, got {type(value).__name__}. It is called as "
            "`loss_fn(model, batch)`."
        )
    return value


def _takes(function: Any, count: int) -> bool:
    """Whether something, which is no class, can be called with so many arguments, and perhaps others by name."""
    if isinstance(function, type) or not callable(function):
        return False
    try:
        inspect.signature(function).bind_partial(*range(count))
    except TypeError:
        return False
    except ValueError:  # nothing is known of some functions that are written in C
        return True
    return True


def axis_name(name: str, value: Any) -> str | None:
    """The name of an axis, or none."""
    if not (value is None or isinstance(value, str)):
        raise ValueError(
            f"`{name}` must be the `axis_name` of a `jax.vmap`, such as 'batch', or `None`, got {_described(value)}."
        )
    return value


def frozen_nodes(value: Any) -> Callable | None:
    """A function of the model that returns what is not trained, or none."""
    return None if value is None else selection("`frozen`", value)


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


def sequence(name: str, value: Any) -> list[Any]:
    """A list of something, and not of nothing."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"`{name}` must be a list of at least one, got {_described(value)}.")
    return list(value)


def shaped(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """An array of a shape that is known."""
    if not eqx.is_array(value) or value.shape != shape:
        raise ValueError(f"`{name}` must be an array of shape {shape}, got {_described(value)}.")
    return value


def single_key(value: Any) -> PRNGKey:
    """One key for random numbers."""
    try:
        jax.eval_shape(jax.random.split, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`key` must be a single JAX key, such as `jax.random.key(0)`, got {value!r}.") from error
    return value


def _described(value: Any) -> str:
    return f"an array of shape {value.shape}" if eqx.is_array(value) else repr(value)
