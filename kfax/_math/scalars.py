"""Numbers and schedules that a user gives, checked."""

from typing import Any

import jax
import jax.numpy as jnp

from .tree import is_traced
from .types import Counter, Scalar, Schedule


def not_a_class(name: str, value: Any) -> Any:
    """What was given, which must be an object: a class is callable, as a schedule is."""
    if isinstance(value, type):
        raise ValueError(f"`{name}` must be an object, not a class: write `kfax.{value.__name__}(...)`.")
    return value


def scalar(name: str, value: Any) -> Scalar:
    """A floating-point scalar array, so that a new value does not mean a new trace."""
    try:
        if isinstance(value, str):  # which NumPy would parse
            raise TypeError(value)
        array = jnp.asarray(value, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, or a schedule (a function from the step to a number), got {value!r}."
        ) from error
    if array.ndim != 0:
        raise ValueError(
            f"`{name}` must be a single number, got an array of shape {array.shape}. To try several at once, map over "
            "them by `equinox.filter_vmap`, around all that depends on them."
        )
    return array


def positive(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be positive if its value can be known."""
    array = scalar(name, value)
    if not is_traced(array) and not float(array) > 0:
        advice = (
            " Damping keeps the inverse of a singular curvature finite; for as little as is safe in float32 try 1e-8 "
            "times the largest curvature."
        )
        raise ValueError(f"`{name}` must be positive, got {value}.{advice if name in ('damping', 'initial') else ''}")
    return array


def nonnegative(name: str, value: Any) -> Scalar:
    """A scalar array, checked not to be negative if its value can be known."""
    array = scalar(name, value)
    if not is_traced(array) and not float(array) >= 0:
        raise ValueError(f"`{name}` must not be negative, got {value}.")
    return array


def within_closed_unit(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be in [0, 1] if its value can be known."""
    array = scalar(name, value)
    if not is_traced(array) and not 0 <= float(array) <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
    return array


def within_unit(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be in (0, 1] if its value can be known."""
    array = scalar(name, value)
    if not is_traced(array) and not 0 < float(array) <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
    return array


def scheduled(name: str, schedule: Schedule, step: Counter) -> Scalar:
    """What a schedule says for a step."""
    try:
        value = jnp.asarray(schedule(step), jnp.result_type(float))
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"The schedule for `{name}` asks for the value of the step, as by `if`, which is not known while it is "
            "compiled. Choose by `jnp.where(step < 100, 0.1, 0.01)`, or take a schedule of optax."
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"The schedule for `{name}` must return a number for a step.") from error
    if value.ndim != 0:
        raise ValueError(
            f"The schedule for `{name}` must return a single number for a step, but it returned an array of shape "
            f"{value.shape}. Return a scalar, as the schedules of optax do."
        )
    return value
