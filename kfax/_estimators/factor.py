"""The factor R of the exact curvature of one batch, $C = R^T R$, with a row for each cotangent of each example."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._capture import Cotangents, linearize_outputs, Problem
from .._losses import Loss
from .._math import linalg
from .._math.tree import anywhere, combine, cond
from .._math.types import Parameters, PRNGKey
from .damping import wide
from .examples import ExampleRows, rows_of_examples
from .sources import CurvatureSource


class Factor(eqx.Module):
    r"""R, with $m = N K$ rows $q_{ni}^\top J_n / \sqrt N$; less their mean over examples if they are centered.

    **Fields:**

    - `source`, `problem`, `key`: which matrix of which batch.
    - `losses`: of the batch.
    - `is_centered`: whether the mean of the rows is subtracted.
    """

    source: CurvatureSource
    problem: Problem
    losses: tuple[Loss, ...]
    key: PRNGKey | None
    is_centered: bool = eqx.field(static=True)

    @property
    def width(self) -> int:
        """K."""
        return self.source.num_cotangents(self.losses)

    @property
    def num_examples(self) -> int:
        return self.losses[0].num_examples

    def pull(self, vector: Float[Array, " m"]) -> Parameters:
        """`Rᵀ y`, in at least float32."""
        by_example = self.center(vector).reshape(self.num_examples, -1)
        pulled = linearize_outputs(self.problem).pull(self.source.multiply_factor(self.losses, by_example, self.key))
        return combine((1 / math.sqrt(self.num_examples),), (wide(pulled),))

    def push(self, vector: Parameters) -> Float[Array, " m"]:
        """`R v`."""
        pushed = linearize_outputs(self.problem).push(vector)
        rows = self.source.multiply_factor_transpose(self.losses, pushed, self.key).reshape(-1)
        return self.center(rows) / math.sqrt(self.num_examples)

    def center(self, rows: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
        """Something for each row of R, less its part in the direction of the weighted mean, if rows are centered."""
        if not self.is_centered:
            return rows
        [loss] = self.losses
        weights = loss.example_weights()
        root = jnp.ones(loss.num_examples, rows.dtype) if weights is None else jnp.sqrt(weights)
        root = root.astype(rows.dtype) / math.sqrt(loss.num_examples)  # of length one
        by_example = rows.reshape(loss.num_examples, -1)
        return (by_example - root[:, None] * linalg.matmul(root, by_example)).reshape(rows.shape)

    def kernel(self, max_numbers: int) -> Float[Array, "m m"]:
        """`R Rᵀ`: from the gradients of examples, or else by products.

        **Arguments:**

        - `max_numbers`: how many numbers of R are held at a time.
        """
        rows = rows_of_examples(self.source, self.problem, self.losses, self.key)
        if rows is None:
            kernel = self._kernel_by_products()
        else:
            of_examples, is_right = _kernel_of(rows, max_numbers)
            kernel = cond(anywhere(~is_right), self._kernel_by_products, lambda: of_examples)
        kernel = self.center(self.center(kernel).T)
        return (kernel + kernel.T) / 2

    def _kernel_by_products(self) -> Float[Array, "m m"]:
        outputs, number = linearize_outputs(self.problem), self.num_examples

        def column(unit):
            by_example = unit.reshape(number, -1).astype(jnp.result_type(*(loss.outputs for loss in self.losses)))
            pulled = outputs.pull(self.source.multiply_factor(self.losses, by_example, self.key))
            pushed = self.source.multiply_factor_transpose(self.losses, outputs.push(pulled), self.key)
            return pushed.reshape(-1).astype(unit.dtype) / number

        eye = jnp.eye(
            number * self.width, dtype=jnp.result_type(jnp.float32, *jax.tree.leaves(self.problem.parameters))
        )
        return jax.lax.map(column, eye, batch_size=_COLUMNS_AT_ONCE)

    def coordinates(self, cotangents: Cotangents) -> tuple[Float[Array, " m"], Bool[Array, ""]]:
        """ρ with `Rᵀ ρ = Jᵀ u` for cotangents u of the outputs, and whether there is such a ρ, up to rounding.

        A least-squares problem for each example, by the eigenvectors of a matrix of K rows.
        """
        number, width = self.num_examples, self.width
        if width > _MAX_WIDTH:
            return jnp.zeros(number * width), jnp.zeros((), bool)

        def column(i):
            vectors = self.source.cotangents(self.losses, i, self.key)
            return _by_example(vectors)

        factor = jnp.moveaxis(jax.lax.map(column, jnp.arange(width)), 0, -1)  # (n, outputs, width)
        target = _by_example(cotangents)[..., None]
        values, vectors = linalg.eigh(linalg.matmul(factor.mT, factor))
        is_known = values > width * jnp.finfo(values.dtype).eps * values[:, -1:]
        inverses = jnp.where(is_known, 1 / jnp.where(is_known, values, 1), 0)[..., None]
        solution = linalg.matmul(vectors, inverses * linalg.matmul(vectors.mT, factor.mT, target))
        error = linalg.matmul(factor, solution) - target
        rows = math.sqrt(number) * solution.reshape(-1)
        centered = self.center(rows)
        tolerance = _ROUNDINGS * float(jnp.finfo(values.dtype).eps)
        is_exact = jnp.linalg.norm(error) <= tolerance * jnp.linalg.norm(target)
        return centered, is_exact & (jnp.linalg.norm(centered - rows) <= tolerance * jnp.linalg.norm(rows))


def _kernel_of(rows: ExampleRows, max_numbers: int) -> tuple[Float[Array, "m m"], Bool[Array, ""]]:
    """`R Rᵀ`, of R as a whole or in parts, of two of which there are no more numbers at a time than given."""
    leaves, width = jax.tree.leaves(rows.problem.parameters), rows.width
    size, dtype = sum(leaf.size for leaf in leaves), jnp.result_type(jnp.float32, *leaves)
    number = rows.losses[0].num_examples
    m = number * width

    def places(numbers):
        return (numbers[:, None] * width + jnp.arange(width)).reshape(-1)

    if m * size <= max_numbers:

        def put(total, part, numbers):
            return total.at[places(numbers)].add(part.reshape(-1, size))

        at_a_time = max(max(m * size, _FEW_NUMBERS) // (_PARTS * width * size), 1)
        whole, is_right = rows.checked_fold(put, jnp.zeros((m, size), dtype), at_a_time)
        return linalg.matmul(whole, whole.T), is_right
    at_a_time = max(max_numbers // (2 * width * size), 1)

    def add(total, part, numbers):
        part = part.reshape(-1, size)

        def multiply(products, other, others):
            return products.at[:, places(others)].add(linalg.matmul(part, other.reshape(-1, size).T))

        products = rows.fold(multiply, jnp.zeros((len(part), m), dtype), at_a_time)
        return total.at[places(numbers)].add(products)

    return rows.checked_fold(add, jnp.zeros((m, m), dtype), at_a_time)


def _by_example(vectors: Cotangents) -> Float[Array, "n o"]:
    """The outputs of all losses side by side, in at least float32."""
    dtype = jnp.result_type(jnp.float32, *vectors)
    return jnp.concatenate([vector.astype(dtype).reshape(len(vector), -1) for vector in vectors], axis=1)


_COLUMNS_AT_ONCE = 32
# What makes a part of R takes memory of its own: R as a whole is put together of so many, unless it is small.
_PARTS, _FEW_NUMBERS = 8, 2**24
# Of a few outputs coordinates are found by an eigendecomposition for each example, which grows with their third power.
_MAX_WIDTH = 64
_ROUNDINGS = 1e3
