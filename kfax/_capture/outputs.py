"""The model's outputs linearized in its parameters: products with the Jacobian and its transpose."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from .._losses import Loss
from .._math.tree import is_traced
from .._math.types import Parameters, PyTree
from .across import on_each
from .linearize import Cotangents, explained, Problem


class Outputs(eqx.Module):
    """A model linearized at its parameters on one batch, from parameters to the losses' outputs.

    **Fields:**

    - `losses`: of the batch.
    - `pull`: `u -> Jᵀu`.
    - `push`: `v -> Jv`.
    """

    losses: tuple[Loss, ...]
    pull: Callable[[Cotangents], Parameters]
    push: Callable[[Parameters], Cotangents]


def linearize_outputs(problem: Problem) -> Outputs:
    """Runs the model forward with empty slots.

    Both directions come from one linearization: the backward one is the transpose of the forward one. Of a model that
    has no forward mode, such as one with a `jax.custom_vjp` function, it is the other way around.
    """
    parameters, rest = on_each(problem.loss_fn, problem.parameters), []

    def outputs(parameters):
        losses = problem.evaluate(parameters).losses
        arrays, others = eqx.partition(losses, eqx.is_array)
        rest.append(others)
        return tuple(loss.outputs for loss in losses), arrays

    pull, push, arrays = _forwards(outputs, parameters) or _backwards(outputs, parameters)
    losses = eqx.combine(arrays, rest[-1])

    def pushed(vector):
        _check_like("`vector` must be a PyTree like `kfax.parameters_of(model)`", vector, parameters)
        with explained(_PUSH):
            return push(on_each(problem.loss_fn, vector))

    def pulled(vectors):
        _check_like("`vectors` must be a tuple of the outputs of each loss", vectors, tuple(o.outputs for o in losses))
        return pull(vectors)

    # In a compiled program it is traced once for several vectors; outside of one it would be compiled for each batch.
    pushed = jax.jit(pushed) if is_traced(problem) else pushed
    return Outputs(losses, pulled, pushed)


def _check_like(rule: str, found: PyTree, expected: PyTree) -> None:
    shapes, others = (jax.tree.map(jnp.shape, tree) for tree in (expected, found))
    if shapes != others:
        raise ValueError(f"{rule}, with its arrays' shapes, got {type(found).__name__}.")


def _forwards(outputs: Callable, parameters: Parameters) -> tuple[Callable, Callable, PyTree] | None:
    """Both directions, and what else is returned, by forward mode; `None` if there is none."""
    try:
        _, push, arrays = jax.linearize(outputs, parameters, has_aux=True)
        has_rule = _mentions("custom_lin", jax.make_jaxpr(push)(parameters).jaxpr)
    except Exception as error:
        if any(words in str(error) for words in _WITHOUT_FORWARD_MODE):
            return None
        raise
    return None if has_rule else (lambda u: jax.linear_transpose(push, parameters)(u)[0], push, arrays)


def _backwards(outputs: Callable, parameters: Parameters) -> tuple[Callable, Callable, PyTree]:
    """The same by reverse mode, and by the transpose of its backward pass."""
    values, backward, arrays = jax.vjp(outputs, parameters, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, values)
    pull = lambda u: backward(u)[0]  # noqa: E731
    return pull, lambda v: jax.vjp(pull, zeros)[1](v)[0], arrays


def _mentions(name: str, jaxpr: Jaxpr) -> bool:
    """Whether a primitive is somewhere in a program: what stands for a rule of reverse mode is an error only if run."""
    inner = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=_is_program)
    programs = [getattr(each, "jaxpr", each) for each in inner if _is_program(each)]
    return any(eqn.primitive.name == name for eqn in jaxpr.eqns) or any(_mentions(name, each) for each in programs)


def _is_program(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


_ONLY_BACKWARD = (
    "Products with the Jacobian, which `kfax.QuadraticModel`, `kfax.full_batch` and the exact estimators need, cannot "
    "be had of this model: its backward pass has a `while_loop` (that of diffrax's default adjoint has). Give the "
    "solver another adjoint, such as `diffrax.DirectAdjoint()`, or choose learning rate and momentum by numbers or "
    "schedules, as `kfax.stochastic` does."
)

# By what JAX says of it: of forward mode through a function without.
_WITHOUT_FORWARD_MODE = ("forward-mode", "custom_lin", "call_hi_primitive")
_PUSH = {"while_loop": _ONLY_BACKWARD}
