"""Numbers and schedules that a user gives, checked.

What is known to be out of its range is an error. Within `jit` it cannot be: a number that is not known becomes NaN if
it is out of its range or not finite, and whoever uses it asks `are_valid`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .tree import is_traced
from .types import Counter, PyTree, Scalar, Schedule


def not_a_class(name: str, value: Any) -> Any:
    """What was given, which must be an object: a class is callable, as a schedule is."""
    if isinstance(value, type):
        raise ValueError(f"`{name}` must be an object, not a class: write `kfax.{value.__name__}(...)`.")
    return value


def number_or_schedule(name: str, value: Any, check: Callable[[str, Any], Scalar]) -> Scalar | Schedule:
    """A schedule as it is; a number checked by one of the functions below."""
    return value if callable(not_a_class(name, value)) else check(name, value)


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


def finite(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be neither NaN nor infinite."""
    return _checked(name, value, lambda x: x == x, "be finite")


def positive(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be positive and finite."""
    advice = (
        " Damping keeps the inverse of a singular curvature finite; for as little as is safe in float32 try 1e-8 times "
        "the largest curvature."
    )
    return _checked(
        name, value, lambda x: x > 0, "be positive and finite", advice if name in ("damping", "initial") else ""
    )


def positive_or_infinite(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be positive; infinity stands for no limit."""
    return _checked(name, value, lambda x: x > 0, "be positive", may_be_infinite=True)


def nonnegative(name: str, value: Any) -> Scalar:
    """A scalar array, checked not to be negative, and to be finite."""
    return _checked(name, value, lambda x: x >= 0, "not be negative or infinite")


def at_least_one(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be finite and not below 1."""
    return _checked(name, value, lambda x: x >= 1, "be at least 1, and finite")


def within_closed_unit(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be in [0, 1]."""
    return _checked(name, value, lambda x: (x >= 0) & (x <= 1), "be in [0, 1]")


def within_unit(name: str, value: Any) -> Scalar:
    """A scalar array, checked to be in (0, 1]."""
    return _checked(name, value, lambda x: (x > 0) & (x <= 1), "be in (0, 1]")


def _checked(
    name: str,
    value: Any,
    is_in_range: Callable[[Any], Any],
    rule: str,
    advice: str = "",
    may_be_infinite: bool = False,
) -> Scalar:
    """A scalar array that is finite and in its range: an error if the value is known not to be, or else NaN."""
    array = scalar(name, value)
    if is_traced(value):
        return jnp.where((may_be_infinite | jnp.isfinite(array)) & is_in_range(array), array, jnp.nan)
    with np.errstate(over="ignore"):
        number = np.asarray(value).astype(array.dtype)  # `array` itself may be traced
    if not ((may_be_infinite | np.isfinite(number)) & is_in_range(number)):
        raise ValueError(f"`{name}` must {rule}, got {value}.{advice}")
    return array


def scheduled(name: str, schedule: Schedule, step: Counter, check: Callable[[str, Any], Scalar]) -> Scalar:
    """What a schedule says for a step, checked by one of the functions above."""
    try:
        found = schedule(step)
        value = jnp.asarray(found, jnp.result_type(float))
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
    return check(name, found)  # which may be known where `value` is traced


def are_valid(settings: PyTree) -> Bool[Array, ""]:
    """Whether none of the numbers among some settings was out of its range: NaN stands for those that were."""
    numbers = jax.tree.leaves(eqx.filter(settings, eqx.is_inexact_array))
    return ~jnp.any(jnp.stack([jnp.any(jnp.isnan(number)) for number in numbers]))
