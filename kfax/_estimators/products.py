"""Exact curvature of one batch, as linear maps of vectors like the parameters."""

import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._capture import linearize_outputs, Problem
from .._layers import Part, parts
from .._math.mesh import has_explicit_axes, on_automatic_axes
from .._math.tree import combine
from .._math.types import Parameters, PRNGKey
from .damping import arrays_of
from .sources import CurvatureSource


class Hessian(eqx.Module):
    """The matrix of second derivatives of everything that `loss_fn` returns, penalties included. It may be indefinite.

    The L2 term of an optimizer is not in it. Not a source of cotangents, so that only the exact estimators take it.
    """


def check_matrix(source: CurvatureSource | Hessian) -> CurvatureSource | Hessian:
    if not isinstance(source, CurvatureSource | Hessian):
        raise ValueError(
            f"`source` must be a curvature source, or `kfax.Hessian()`; such as `kfax.ExactGGN()`, got {source!r}."
        )
    return source


def linear_map(
    source: CurvatureSource | Hessian, problem: Problem, key: PRNGKey | None
) -> Callable[[Parameters], Parameters]:
    """`v -> C v`, with what does not depend on v computed at once.

    On a mesh with explicit axes it is computed for each v anew: what is kept of automatic axes cannot leave them.
    """
    if has_explicit_axes(problem):
        return functools.partial(_multiply, source, problem, key)
    layout = layout_of(problem.parameters)

    def checked(vector):
        check_layout(vector, layout)
        return vector

    if isinstance(source, Hessian):

        def value(parameters):
            return problem.evaluate(parameters).value()

        product = jax.linearize(jax.grad(value), problem.parameters)[1]
        return lambda vector: product(checked(vector))
    outputs = linearize_outputs(problem)

    def multiply(vector):
        product = source.multiply(outputs.losses, outputs.push(checked(vector)), key)
        return combine((1 / outputs.losses[0].num_examples,), (outputs.pull(product),))

    return multiply


@on_automatic_axes
def _multiply(
    source: CurvatureSource | Hessian, problem: Problem, key: PRNGKey | None, vector: Parameters
) -> Parameters:
    return linear_map(source, problem, key)(vector)


_State = TypeVar("_State")


VECTORS = (
    "Vectors are like `kfax.parameters_of(model)`, or `kfax.parameters_of(model, frozen=...)` if `update` was given "
    "`frozen=`."
)


Layout: TypeAlias = tuple[Hashable, tuple[tuple[int, ...], ...]]


def layout_of(vector: Parameters) -> Layout:
    """The structure of a PyTree and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(vector)
    return structure, tuple(jnp.shape(leaf) for leaf in leaves)


def check_layout(vector: Parameters, layout: Layout) -> None:
    compare_layouts(layout_of(vector), layout)


def compare_layouts(found: Layout, expected: Layout) -> None:
    if found != expected:
        raise ValueError(f"A vector has not the structure and shapes of the parameters. {VECTORS}")


BlockShapes: TypeAlias = tuple[tuple[str, tuple[int, int]], ...]


def block_shapes(found: Mapping[str, Part]) -> BlockShapes:
    """The shape of the matrix of each part, without stack axes, over which a caller may map."""
    shapes = {key: part.operation.shape() for key, part in found.items()}
    return tuple((key, (shape.d_g, shape.d_a)) for key, shape in shapes.items())


def blocks_of(vector: Parameters, expected: BlockShapes) -> dict[str, Part]:
    """The parts of a vector, which must have these matrices and nothing else."""
    found = parts(vector)
    shapes = block_shapes(found)
    if dict(shapes) != dict(expected):
        raise ValueError(f"A vector has the blocks {dict(shapes)}, the state {dict(expected)}. {VECTORS}")
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(vector))
    if size != sum(part.operation.shape().num_parameters for part in found.values()):
        raise ValueError(f"A vector has arrays that belong to no block. {VECTORS}")
    return found


def check_keys(known: Collection[str], found: Collection[str]) -> None:
    """Raises an error if what was found has other blocks than a state."""
    if set(found) != set(known):
        raise ValueError(f"A vector has the blocks {list(found)}, the state {list(known)}. {VECTORS}")


def chosen_of(found: dict[str, Part], only: Collection[str] | None) -> dict[str, Part]:
    """The parts of these keys; all if none are given."""
    if only is None:
        return found
    keys = only if isinstance(only, Collection) and not isinstance(only, str) else [None]
    if not all(isinstance(key, str) and key in found for key in keys):
        raise ValueError(f"`only` must be a list of keys of blocks, which are {list(found)}, got {only!r}.")
    return {key: found[key] for key in only}


def check_state(state: Any, kind: type[_State]) -> _State:
    """The state, of the kind that an estimator's methods take."""
    if not isinstance(state, kind):
        raise ValueError(
            f"`state` must be a `kfax.{kind.__name__}`, as of the `init` and `update` of the estimator, got "
            f"{type(state).__name__}."
        )
    return state


def dense(multiply: Callable[[Parameters], Parameters], like: Parameters) -> Float[Array, "p p"]:
    """The matrix of a linear map, column by column, in a loop that is compiled once."""
    flat, unravel = ravel_pytree(arrays_of(like))

    def column(unit):
        return ravel_pytree(multiply(unravel(unit)))[0]

    columns = jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype), batch_size=_COLUMNS_AT_ONCE)
    return (columns + columns.T) / 2


# Enough for the matrix units to be busy, few enough for a large batch to fit in memory.
_COLUMNS_AT_ONCE = 32
