"""The exact curvature matrix, formed."""

from collections.abc import Collection, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float

from .._blocks import check_inversion, Cholesky, immovable, Inverse, Inversion, Product
from .._capture import check_values, Linearization, linearize, Problem
from .._layers import any_parameters_of
from .._losses import Loss
from .._math import linalg
from .._math.arguments import whole_number
from .._math.moving_average import MovingAverage
from .._math.scalars import within_unit
from .._math.tree import all_finite, anywhere, cond, select
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .base import CurvatureEstimator, inverse_of, operator_of, total_weight
from .damping import damping_by_parameter
from .eigendecomposition import DenseEigendecomposition
from .examples import rows_of_examples
from .products import (
    check_layout,
    check_matrix,
    check_state,
    compare_layouts,
    dense,
    Hessian,
    Layout,
    layout_of,
    linear_map,
)
from .sources import CurvatureSource, ExactGGN


class ExplicitExactState(eqx.Module):
    """The state of an `ExplicitExactCurvature`.

    **Fields:**

    - `average`: of the matrix, `(p, p)`. Changes with every update.
    - `inverse`: what `solve` applies. Changes with every refresh.
    - `layout`: the structure of the parameters, and their shapes.
    """

    average: MovingAverage
    inverse: Inverse
    layout: Layout = eqx.field(static=True)


class ExplicitExactBatch(eqx.Module):
    """The matrix of one batch, and whose it is."""

    average: MovingAverage
    layout: Layout = eqx.field(static=True)


class ExplicitExactCurvature(CurvatureEstimator):
    r"""The exact curvature matrix as a dense array: for small models, demonstrations and tests.

    $$C = \tfrac1N \sum_n J_n^\top H_n J_n$$

    with J the derivative of all outputs in the parameters, H what the source says (estimated, if it draws random
    numbers), and N examples; or the Hessian of the whole objective. Batch normalization and whatever else mixes
    examples is differentiated through, as are derivatives of the model within the loss.

    Of a source of K cotangents the matrix is made from N K gradients of examples, with `2 N K P²` flops, in parts: no
    more numbers of the Jacobian are held at a time than the matrix has, or than 4 million. For that the batch is taken
    apart. Arrays that have as many rows as there are examples have them along axis 0; or, if none has, all arrays are
    of sets of examples, which follow one another in the outputs in the order in which the arrays stand in the batch (of
    a dictionary, in that of its keys). At each update a sum of those gradients with random signs is compared with that
    of the whole batch. If it differs by more than rounding, because examples see each other or the batch is put
    together in another way, the matrix is made by products: a pass forward and one backward for each of the P
    parameters. So is that of a [`kfax.Hessian`][] or of a loss without a factor, and where a batch cannot be taken
    apart. It is the same matrix in any case.

    Products of the model are made at the highest precision. The model may be untagged. The state takes memory for
    `2 P²` numbers, a refresh about `2 P³` flops.
    """

    source: CurvatureSource | Hessian
    decay: Scalar
    inversion: Inversion
    max_dim: int = eqx.field(static=True)

    def __init__(
        self,
        source: CurvatureSource | Hessian = ExactGGN(),
        *,
        decay: ArrayLike = 0.95,
        inversion: Inversion = Cholesky(),
        max_dim: int = 10_000,
    ):
        """**Arguments:**

        - `source`: which curvature matrix is computed, or estimated: any curvature source, or [`kfax.Hessian`][]`()`.
        - `decay`: ε of the running average over updates, in (0, 1]; 1 is the plain mean.
        - `inversion`: [`kfax.Cholesky`][]`()`, or [`kfax.Eigh`][]`()` for a damping that changes without a refresh,
            and for a Hessian that is indefinite.
        - `max_dim`: the largest number of parameters that is accepted.

        **Raises:** `ValueError` for values out of their range.
        """
        self.source = check_matrix(source)
        self.decay = within_unit("decay", decay)
        self.inversion = check_inversion(inversion)
        self.max_dim = whole_number("max_dim", max_dim, 0)

    def init(self, model: Model, *, frozen: Where | None = None) -> ExplicitExactState:
        parameters = any_parameters_of(model, frozen)
        flat = jax.eval_shape(lambda: ravel_pytree(parameters)[0])
        if flat.size > self.max_dim:
            gigabytes = flat.size**2 * flat.dtype.itemsize / 1e9
            raise ValueError(
                f"The matrix of {flat.size:,} parameters would take {gigabytes:,.1f} GB, and as much again "
                "for its inverse. Use `kfax.BlockDiagonalCurvature()`, or products with the same matrix from "
                "`kfax.ImplicitExactCurvature()`, or, if there is the memory, "
                f"`kfax.ExplicitExactCurvature(max_dim={flat.size})`."
            )
        matrix = jnp.zeros((flat.size, flat.size), jnp.promote_types(flat.dtype, jnp.float32))
        eye = jnp.eye(flat.size, dtype=matrix.dtype)
        result = (jnp.zeros_like(matrix[0]), eye) if self.inversion.diagonalizes else eye
        inverse = self.inversion.finish(self._product(matrix), jnp.ones(()), (result,))
        return ExplicitExactState(MovingAverage.zeros(matrix), immovable(inverse), layout_of(parameters))

    def check(self, problem: Problem) -> None:
        check_values(problem)

    def linearize(self, problem: Problem, state: ExplicitExactState) -> Linearization:
        return linearize(problem)

    def measure(self, linearization: Linearization, key: PRNGKey | None) -> ExplicitExactBatch:
        problem, losses = linearization.problem, linearization.losses
        # Its errors are to be those of the dtype, and the two ways to compare up to rounding.
        with jax.default_matmul_precision("highest"):
            matrix = self._matrix(problem, losses, key)
        return ExplicitExactBatch(MovingAverage(matrix, total_weight(losses)), layout_of(problem.parameters))

    def fold(self, state: ExplicitExactState, measured: ExplicitExactBatch) -> ExplicitExactState:
        compare_layouts(measured.layout, check_state(state, ExplicitExactState).layout)
        average = state.average.update(measured.average.value, self.decay, measured.average.weight)
        return ExplicitExactState(average, state.inverse, state.layout)

    def fold_finite(
        self, state: ExplicitExactState, measured: ExplicitExactBatch, is_good: Bool[Array, ""]
    ) -> tuple[ExplicitExactState, Bool[Array, ""]]:
        folded = self.fold(state, measured)
        finite = all_finite(folded.average)
        return select(is_good & finite, folded, state), ~finite

    def weight(self, state: ExplicitExactState) -> Scalar:
        return state.average.weight

    def nothing(self, state: ExplicitExactState) -> ExplicitExactBatch:
        return ExplicitExactBatch(MovingAverage.zeros(state.average.value), state.layout)

    def add(self, measured: ExplicitExactBatch, more: ExplicitExactBatch) -> ExplicitExactBatch:
        average = measured.average.update(more.average.value, jnp.ones(()), more.average.weight)
        return ExplicitExactBatch(average, measured.layout)

    def refresh(
        self, state: ExplicitExactState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> ExplicitExactState:
        """**Arguments:**

        - `state`: with the matrix to be used.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, or one for each block by key, as for [`kfax.BlockDiagonalCurvature`][]. [loss/param²]

        **Returns:** the state with a new inverse.
        """
        check_layout(parameters, check_state(state, ExplicitExactState).layout)
        by_parameter = ravel_pytree(damping_by_parameter(parameters, damping))[0].astype(state.average.value.dtype)
        # What all parameters have in common may change by `redamp`.
        common = jnp.min(by_parameter)
        product = self._product(state.average.value + jnp.diag(by_parameter - common))
        function = linalg.eigh if self.inversion.diagonalizes else linalg.psd_inverse
        results = linalg.by_size(function, self.inversion.matrices(product, common))
        return ExplicitExactState(state.average, self.inversion.finish(product, common, tuple(results)), state.layout)

    def refresh_finite(
        self,
        state: ExplicitExactState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[ExplicitExactState, Bool[Array, ""]]:
        del only
        refreshed = self.refresh(state, parameters, damping)
        finite = all_finite(refreshed.inverse) & (self.weight(state) > 0)
        return select(finite & is_wanted, refreshed, state), ~finite & is_wanted

    def redamp(
        self, state: ExplicitExactState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> ExplicitExactState:
        """**Arguments:**

        - `state`: after a refresh.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, or one for each block by key: then their smallest counts, and by how much others exceed it is
            as of the last refresh. [loss/param²]

        **Returns:** the state with another damping if the inversion is [`kfax.Eigh`][], or else the same one.
        """
        check_layout(parameters, check_state(state, ExplicitExactState).layout)
        common = jnp.min(ravel_pytree(damping_by_parameter(parameters, damping))[0])
        return ExplicitExactState(state.average, state.inverse.redamp(common), state.layout)

    def decompose(self, state: ExplicitExactState, parameters: Parameters) -> DenseEigendecomposition:
        check_layout(parameters, check_state(state, ExplicitExactState).layout)
        product = self._product(state.average.value)
        return DenseEigendecomposition({"": product.spectrum((linalg.eigh(product.right),))}, state.layout)

    def power(
        self, state: ExplicitExactState, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0
    ) -> Parameters:
        return self.decompose(state, vector).power(vector, exponent, damping)

    def eigenvalues(self, state: ExplicitExactState, parameters: Parameters) -> Float[Array, " p"]:
        return self.decompose(state, parameters).eigenvalues()

    def solve(self, state: ExplicitExactState, vector: Parameters) -> Parameters:
        check_layout(vector, check_state(state, ExplicitExactState).layout)
        flat, unravel = ravel_pytree(vector)
        return unravel(state.inverse.solve(flat))

    def multiply(self, state: ExplicitExactState, vector: Parameters) -> Parameters:
        check_layout(vector, check_state(state, ExplicitExactState).layout)
        flat, unravel = ravel_pytree(vector)
        return unravel(self._product(state.average.value).multiply(flat))

    def diagonal(self, state: ExplicitExactState, parameters: Parameters) -> Parameters:
        check_layout(parameters, check_state(state, ExplicitExactState).layout)
        flat, unravel = ravel_pytree(parameters)
        return unravel(jnp.diagonal(state.average.value).astype(flat.dtype))

    def to_dense(self, state: ExplicitExactState, parameters: Parameters) -> Float[Array, "p p"]:
        check_layout(parameters, check_state(state, ExplicitExactState).layout)
        return state.average.value

    def as_operator(
        self, state: ExplicitExactState, parameters: Parameters, damping: ArrayLike = 0.0
    ) -> lx.AbstractLinearOperator:
        tag = lx.symmetric_tag if isinstance(self.source, Hessian) else lx.positive_semidefinite_tag
        by_parameter = damping_by_parameter(parameters, damping)
        return operator_of(lambda v: self.multiply(state, v), parameters, by_parameter, tag)

    def as_preconditioner(self, state: ExplicitExactState, parameters: Parameters) -> lx.AbstractLinearOperator:
        return inverse_of(lambda v: self.solve(state, v), parameters)

    def _matrix(self, problem: Problem, losses: tuple[Loss, ...], key: PRNGKey | None) -> Float[Array, "p p"]:
        """The matrix of one batch: from the gradients of examples, or else by products."""
        size = sum(leaf.size for leaf in jax.tree.leaves(problem.parameters))

        def by_products():
            matrix = dense(linear_map(self.source, problem, key), problem.parameters)
            return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))

        rows = None if isinstance(self.source, Hessian) else rows_of_examples(self.source, problem, losses, key)
        if rows is None:
            return by_products()

        def add(total, rows, numbers):
            del numbers
            flat = rows.reshape(-1, size)
            return total + linalg.matmul(flat.T, flat)

        matrix = jnp.zeros((size, size), jnp.result_type(jnp.float32, *jax.tree.leaves(problem.parameters)))
        at_a_time = max(size**2, _MIN_NUMBERS) // (rows.width * size)
        matrix, is_right = rows.checked_fold(add, matrix, max(at_a_time, 1))
        return cond(anywhere(~is_right), by_products, lambda: matrix)

    def _product(self, matrix: Float[Array, "p p"]) -> Product:
        return Product(None, matrix, 0, is_psd=not isinstance(self.source, Hessian))


# So many numbers of the Jacobian are held at a time in any case: 32 MB in float64.
_MIN_NUMBERS = 2**22
