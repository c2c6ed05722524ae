"""Whatever a module does."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._math.types import ArrayTree, PyTree
from .base import MatrixShape, Operation


class Invocation(eqx.Module):
    """How to run a module again: the context of an `Arbitrary` operation.

    **Fields:**

    - `arrays`: all arrays of the module, as a PyTree in which the operation's parameters have their places.
    - `function`: `(arrays, x) -> y`, without what is not differentiable of y.
    """

    arrays: ArrayTree
    function: Callable = eqx.field(static=True)


class Arbitrary(Operation):
    """Any differentiable function of parameters and inputs: V is one row with all the parameters.

    Its gradients are those of the function, which is run again for each position of each example.

    **Fields:**

    - `parameters`: any PyTree of arrays, with `None` in place of what is frozen.
    - `stack`: leading axes that all parameters have in common, beyond those of one module.
    """

    parameters: PyTree
    stack: tuple[int, ...] = eqx.field(static=True, default=())

    def shape(self) -> MatrixShape:
        leaves = jax.tree.leaves(self.parameters)
        size = sum(math.prod(leaf.shape[len(self.stack) :]) for leaf in leaves)
        return MatrixShape(self.stack, 1, size, False, jnp.result_type(*(leaf.dtype for leaf in leaves)))

    def to_matrix(self) -> Shaped[Array, "*stack 1 d_a"]:
        rows = [leaf.reshape(*self.stack, -1) for leaf in jax.tree.leaves(self.parameters)]
        return jnp.concatenate(rows, axis=-1)[..., None, :]

    def from_matrix(self, matrix: Float[Array, "*stack 1 d_a"]) -> "Arbitrary":
        leaves, structure = jax.tree.flatten(self.parameters)
        new, start = [], 0
        for leaf in leaves:
            size = math.prod(leaf.shape[len(self.stack) :])
            new.append(matrix[..., 0, start : start + size].reshape(leaf.shape).astype(leaf.dtype))
            start += size
        return Arbitrary(jax.tree.unflatten(structure, new), self.stack)

    def gradient(self, x: ArrayTree, dy: ArrayTree, context: Invocation) -> Float[Array, "1 d_a"]:
        is_none = lambda leaf: leaf is None  # noqa: E731
        trained = jax.tree.map(
            lambda mine, array: None if mine is None else array, self.parameters, context.arrays, is_leaf=is_none
        )

        def run(parameters):
            arrays = eqx.combine(parameters, context.arrays)
            # Of the cotangents, for there may be no inputs.
            return jax.vmap(lambda x: context.function(arrays, x), axis_size=len(jax.tree.leaves(dy)[0]))(x)

        _, pullback = jax.vjp(run, trained)
        rows = [leaf.reshape(-1) for leaf in jax.tree.leaves(pullback(dy)[0])]
        return jnp.concatenate(rows)[None, :]

    def of_tangents(self) -> None:
        raise ValueError(
            "A loss contains a derivative of this module's output, which is another function of its parameters. A "
            "`kfax.TaggedModule` is differentiated by its parameters only: tag the layers within it instead."
        )
