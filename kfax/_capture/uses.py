"""Whether a layer is used once, as far as a program tells."""

import math
from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var


def count_uses(program: ClosedJaxpr, inputs: Sequence[int]) -> list[float]:
    """How often a program observes each of some of its inputs, which are values of slots; infinity for who knows.

    An input that goes into a loop, or into anything else that is not known to run once, counts as infinity.
    """
    return [_count(program.jaxpr, program.jaxpr.invars[i]) for i in inputs]


def _count(program: Jaxpr, variable: Var) -> float:
    readers = [eqn for eqn in program.eqns if any(x is variable for x in eqn.invars)]
    is_result = any(x is variable for x in program.outvars)
    return math.inf if is_result else sum((_count_in(eqn, variable) for eqn in readers), 0.0)


def _count_in(eqn: JaxprEqn, variable: Var) -> float:
    name = eqn.primitive.name
    if name == "cond":
        programs, operands = eqn.params["branches"], eqn.invars[1:]
    elif name in _RUN_ONCE:
        programs, operands = [eqn.params.get(_RUN_ONCE[name])], eqn.invars
    else:
        return math.inf
    total = 0.0
    for each in programs:
        inner = each.jaxpr if isinstance(each, ClosedJaxpr) else each
        if not isinstance(inner, Jaxpr) or len(inner.invars) != len(operands):
            return math.inf
        places = [place for place, x in zip(inner.invars, operands, strict=True) if x is variable]
        total += sum(_count(inner, place) for place in places)
    if name == "custom_jvp_call":
        # That of `observe` reads nothing. One of a user may do what it likes when it is differentiated.
        return 1.0 if total == 0 else math.inf
    return total


# By name, and where they have their program. A name that JAX changes makes a layer's statistics costlier, not wrong.
_RUN_ONCE = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr"}
