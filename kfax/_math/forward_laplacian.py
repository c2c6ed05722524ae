"""Values, first derivatives and Laplacians of a function in one pass forward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, Literal
from jaxtyping import Array, Float

from .arguments import function as function_of
from .types import PyTree


class _Triple(eqx.Module):
    """What depends on x: a value, its derivatives along the coordinates of x, and the sum of the second ones."""

    value: Array
    jacobian: Float[Array, "d ..."]
    laplacian: Array


def forward_laplacian(function: Callable[[Array], PyTree]) -> Callable[[Array], tuple[PyTree, PyTree, PyTree]]:
    r"""Value, Jacobian and Laplacian $\sum_i \partial_i^2 f$ of a function of one example, each computed once.

    Nested derivatives, `jnp.trace(jax.hessian(f)(x))` or `jax.jvp` of `jax.jvp` along each coordinate, make the first
    derivatives twice and the second ones one by one. Here all three go forward through the function together: what is
    linear is applied to each of them, and of anything else the second derivatives are taken at once: 3 to 6 times as
    fast, with its gradient, for tanh networks of 2 and 5 inputs. What is computed by a loop (`jax.lax.scan`,
    `while_loop`), a `cond` or under `jax.checkpoint` gets the nested derivatives of that as a whole: right as well, but
    no faster.

    In a `loss_fn` layers are observed as with `jax.jvp`, in d + 2 uses for d coordinates.

    **Arguments:**

    - `function`: of an array of real floating-point numbers, which returns an array or a PyTree of such.

    **Returns:** a function of an array x, of any shape, that returns value, Jacobian (with the axes of x after those of
    the value, as `jax.jacfwd` has them) and Laplacian (in the shape of the value).

    **Raises:** `TypeError` for an x that is no array of real floating-point numbers.

    ??? cite "Source"
        Li et al. 2024, arXiv:2307.08214 (Forward Laplacian).
    """

    function_of("function", function, "lambda x: jnp.sum(x**2)")

    @functools.wraps(function)
    def derivatives(x):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`kfax.forward_laplacian` differentiates by real floating-point numbers, got {x.dtype}.")
        program, shapes = jax.make_jaxpr(function, return_shape=True)(x)
        unit = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
        results = _run(program.jaxpr, program.consts, [_Triple(x, unit, jnp.zeros_like(x))])
        triples = [_as_triple(result, x.size) for result in results]
        jacobians = [jnp.moveaxis(t.jacobian, 0, -1).reshape(*t.value.shape, *x.shape) for t in triples]
        structure = jax.tree.structure(shapes)
        fields = [t.value for t in triples], jacobians, [t.laplacian for t in triples]
        return tuple(jax.tree.unflatten(structure, field) for field in fields)

    return derivatives


def _as_triple(x: Any, size: int) -> _Triple:
    return x if isinstance(x, _Triple) else _Triple(x, jnp.zeros((size, *jnp.shape(x))), jnp.zeros_like(x))


def _run(program: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Runs a program on numbers and triples."""
    known = dict(zip([*program.constvars, *program.invars], [*constants, *arguments], strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else known[x]

    for eqn in program.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):
            results = _run(inner.jaxpr, inner.consts, [read(x) for x in eqn.invars])
        else:
            inputs = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, Literal)))
            alone = program.replace(constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn])
            apply = _apply_to_each if eqn.primitive.name in _OF_ONE_NUMBER and len(inputs) == 1 else _apply
            results = apply(jaxpr_as_fun(ClosedJaxpr(alone, [])), [read(x) for x in inputs])
        known |= zip(eqn.outvars, results, strict=True)
    return [read(x) for x in program.outvars]


# What takes each number by itself: then the second derivatives are needed only once for all coordinates. An operation
# that is not listed is differentiated no less rightly.
_OF_ONE_NUMBER = frozenset(
    "acos acosh asin asinh atan atanh cbrt cos cosh erf erfc exp exp2 expm1 integer_pow lgamma log log1p logistic "
    "rsqrt sin sinh sqrt square tan tanh".split()
)


def _apply_to_each(operation: Callable[..., list[Array]], inputs: list[Any]) -> list[Any]:
    """A function of single numbers: f, f' ∇x and f' Δx + f'' |∇x|²."""
    [x] = inputs
    if not isinstance(x, _Triple):
        return operation(x)
    ones = jnp.ones_like(x.value)

    def slope(value):
        return jax.jvp(lambda value: operation(value)[0], (value,), (ones,))[1]

    [result] = operation(x.value)
    first, second = jax.jvp(slope, (x.value,), (ones,))
    squared = jnp.sum(jnp.square(x.jacobian), axis=0)
    return [_Triple(result, first * x.jacobian, first * x.laplacian + second * squared)]


def _apply(operation: Callable[..., list[Array]], inputs: list[Any]) -> list[Any]:
    """One operation, on numbers and triples."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, _Triple)]
    if not places:
        return operation(*inputs)

    def operate(moving):
        given = dict(zip(places, moving, strict=True))
        return operation(*(given.get(i, x) for i, x in enumerate(inputs)))

    values, slopes, bends = ([getattr(inputs[i], name) for i in places] for name in ("value", "jacobian", "laplacian"))

    def along(tangents):
        return lambda values: jax.jvp(operate, (values,), (tangents,))[1]

    def twice(tangents):
        return jax.jvp(along(tangents), (values,), (tangents,))

    results, straight = jax.jvp(operate, (values,), (bends,))
    jacobians, curves = jax.vmap(twice)(slopes)

    def collect(value, jacobian, bend, curve):
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value  # of integers there are no derivatives
        return _Triple(value, jacobian, bend + jnp.sum(curve, axis=0))

    return [collect(*each) for each in zip(results, jacobians, straight, curves, strict=True)]
