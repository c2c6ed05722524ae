"""The exact curvature of one batch, inverted in the space of its examples."""

from collections.abc import Collection, Mapping
from typing import cast, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Bool, Float

from .._blocks import check_inversion, Cholesky, immovable, Inverse, Inversion, Product
from .._capture import check_values, Linearization, linearize, Problem
from .._layers import any_parameters_of
from .._math import linalg
from .._math.arguments import flag, whole_number
from .._math.mesh import on_automatic_axes
from .._math.scalars import finite, nonnegative
from .._math.tree import all_finite, combine, select, zeros_like
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .base import check_source, inverse_of, narrow, operator_of
from .damping import damping_by_parameter, wide
from .eigendecomposition import Eigendecomposition
from .factor import Factor
from .last_batch import check_seen, LastBatchCurvature
from .products import check_state, dense
from .sources import CurvatureSource, ExactGGN


class SampleSpaceBatch(eqx.Module):
    """What a `SampleSpaceCurvature` knows of a batch.

    **Fields:**

    - `problem`, `key`: model and batch, and a key for the source.
    - `kernel`: $R R^\\top$, `(m, m)`, with m rows of all examples. [loss/param²]
    - `coordinates`: ρ with $R^\\top \\rho = g$, `(m,)`; zeros if there are none.
    - `gradient`: g, that of the losses through their outputs; zeros if it has no coordinates.
    """

    problem: Problem
    key: PRNGKey | None
    kernel: Float[Array, "m m"]
    coordinates: Float[Array, " m"]
    gradient: Parameters


class SampleSpaceState(eqx.Module):
    """The state of a `SampleSpaceCurvature`.

    **Fields:**

    - `batch`: the last one; `None` before the first update.
    - `inverse`: of $R R^\\top + \\lambda I$. Everything is mapped to zero between an update and the next refresh.
    - `damping`: λ as of the last refresh.
    """

    batch: SampleSpaceBatch | None
    inverse: Inverse | None
    damping: Scalar


class SampleSpaceCurvature(LastBatchCurvature):
    r"""The exact curvature matrix of the last batch, inverted in the space of its examples.

    $$C = R^\top R, \qquad (C + \lambda I)^{-1} R^\top = R^\top (R R^\top + \lambda I)^{-1}, \qquad
    (C + \lambda I)^{-1} v = \tfrac1\lambda \big(v - R^\top (R R^\top + \lambda I)^{-1} R v\big)$$

    R has m = N K rows $q_{ni}^\top J_n / \sqrt N$, with the source's K cotangents of each of N examples: for the exact
    GGN as many as an example has outputs. For m below the number of parameters P. It is the method of MinSR, of
    energy natural gradients in the Woodbury form (ENGD-W), and, with [`kfax.ProjectedMomentum`][], SPRING.

    The gradient of the losses has the form $R^\top \rho$, and takes the first way to `solve`. What is left of a vector
    (an L2 term, a penalty, a velocity) takes the second, which loses as many digits of it as $s / \lambda$ has, for
    eigenvalues s. So does all of a gradient whose ρ is not known: of a random source, of more than 64 cotangents, or
    where weights or targets depend on the parameters. With `Cholesky()` λ is at least `8 m ε` times the mean
    eigenvalue of the kernel, as for blocks.

    R is not kept. An update makes the kernel $R R^\top$ from the gradients of examples, as
    [`kfax.ExplicitExactCurvature`][] does, with `2 m² P` flops; or, where examples see each other, by m products. If R
    has more than `max_numbers` numbers it is made in parts, for each of which all others are made anew; two of them
    together have no more numbers than that. The pass that makes a part takes memory of its own: about as much again for
    dense layers, and half as much if R is made as a whole. The state has `2 m²` numbers, the batch and the parameters.
    A `solve` takes one product with R and one with its transpose: a pass forward and one backward. Models may be
    untagged. The state holds the batch, so that its structure changes at the first update: a step is compiled twice.

    ??? cite "Source"
        Chen & Heyl 2024, arXiv:2302.01941 (MinSR); Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190, section 3
        (SPRING); Guzmán-Cordero et al. 2025, arXiv:2505.12149 (ENGD-W). Differs: centered rows are not regularized in
        the direction of the mean, in which they have nothing.
    """

    source: CurvatureSource
    inversion: Inversion
    centered: bool = eqx.field(static=True)
    max_numbers: int = eqx.field(static=True)

    def __init__(
        self,
        source: CurvatureSource = ExactGGN(),
        *,
        inversion: Inversion = Cholesky(),
        centered: bool = False,
        max_numbers: int = 2**26,
    ):
        """**Arguments:**

        - `source`: which matrix: [`kfax.ExactGGN`][], or any other curvature source.
        - `inversion`: of the kernel: [`kfax.Cholesky`][]`()`, or [`kfax.Eigh`][]`()` for a damping that changes without
            a refresh, and for a very small one.
        - `centered`: whether the (weighted) mean of the rows over examples is subtracted from them: then C is a
            covariance. For wavefunctions and other distributions that are not normalized.
        - `max_numbers`: how many numbers of R are held at a time; those of two examples in any case. By default 256
            MB in float32. Less memory takes more time.

        **Raises:** `ValueError` for something else than that.
        """
        self.source = check_source(source)
        self.inversion = check_inversion(inversion)
        self.centered = flag("centered", centered)
        self.max_numbers = whole_number("max_numbers", max_numbers)

    # -- taking in batches --

    def init(self, model: Model, *, frozen: Where | None = None) -> SampleSpaceState:
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(any_parameters_of(model, frozen)))
        return SampleSpaceState(None, None, jnp.asarray(jnp.inf, dtype))

    def check(self, problem: Problem) -> None:
        check_values(problem)

    def linearize(self, problem: Problem, state: SampleSpaceState) -> Linearization:
        return linearize(problem)

    def measure(self, linearization: Linearization, key: PRNGKey | None) -> SampleSpaceBatch:
        problem, losses = linearization.problem, linearization.losses
        if self.centered and len(losses) > 1:
            raise ValueError("`centered` rows are those of one loss, whose weights they have: return a single one.")
        factor = Factor(self.source, problem, losses, key, self.centered)
        cotangents = tuple(loss.outputs for loss in linearization.of_value()[0])
        with jax.default_matmul_precision("highest"):
            kernel = factor.kernel(self.max_numbers)
            rows, is_explained = factor.coordinates(cotangents)
        gradient = linearization.pullback(linearization.at_outputs(cotangents))[0]
        gradient = jax.tree.map(lambda x: jnp.where(is_explained, x, 0), gradient)
        rows = jnp.where(is_explained, rows, 0).astype(kernel.dtype)
        return SampleSpaceBatch(problem, key, kernel, rows, gradient)

    def fold(self, state: SampleSpaceState, measured: SampleSpaceBatch) -> SampleSpaceState:
        size, dtype = measured.kernel.shape, measured.kernel.dtype
        damping = jnp.asarray(jnp.inf, check_state(state, SampleSpaceState).damping.dtype)
        result = (jnp.zeros(size[:1], dtype), jnp.eye(*size, dtype=dtype)) if self.inversion.diagonalizes else None
        results = (jnp.eye(*size, dtype=dtype) if result is None else result,)
        inverse = self.inversion.finish(Product(None, measured.kernel, 0), jnp.ones(()), results)
        return SampleSpaceState(measured, immovable(inverse), damping)

    def fold_finite(
        self, state: SampleSpaceState, measured: SampleSpaceBatch, is_good: Bool[Array, ""]
    ) -> tuple[SampleSpaceState, Bool[Array, ""]]:
        del is_good  # there is no other batch that could be kept: the step is not taken
        return self.fold(state, measured), ~all_finite(measured.kernel)

    def weight(self, state: SampleSpaceState) -> Scalar:
        return jnp.asarray(0.0 if state.batch is None else 1.0)

    def refresh(
        self, state: SampleSpaceState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> SampleSpaceState:
        """**Arguments:**

        - `state`: after an update.
        - `parameters`: any PyTree like the parameters; its values are not used.
        - `damping`: λ, one number. [loss/param²]

        **Returns:** the state with a new inverse.

        **Raises:** `ValueError` for a damping that is not the same for all blocks.
        """
        kernel = _batch(state, parameters).kernel
        number = _one(damping).astype(kernel.dtype)
        if not self.inversion.diagonalizes:
            least = linalg.least_damping(len(kernel), kernel.dtype)
            number = jnp.maximum(number, least * jnp.trace(kernel) / len(kernel))
        product = Product(None, kernel, 0)
        function = linalg.eigh if self.inversion.diagonalizes else linalg.psd_inverse
        results = linalg.by_size(function, self.inversion.matrices(product, number))
        return SampleSpaceState(state.batch, self.inversion.finish(product, number, tuple(results)), number)

    def refresh_finite(
        self,
        state: SampleSpaceState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[SampleSpaceState, Bool[Array, ""]]:
        del only
        refreshed = self.refresh(state, parameters, damping)
        is_finite = all_finite((refreshed.inverse, refreshed.damping))
        inverse = select(is_finite & is_wanted, refreshed.inverse, state.inverse)
        number = jnp.where(is_finite & is_wanted, refreshed.damping, state.damping)
        return SampleSpaceState(state.batch, inverse, number), ~is_finite & is_wanted

    def redamp(
        self, state: SampleSpaceState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> SampleSpaceState:
        """The state with another damping if the inversion is [`kfax.Eigh`][] and there is an inverse, or the same."""
        state, number = check_state(state, SampleSpaceState), _one(damping)
        if state.inverse is None or not self.inversion.diagonalizes:
            return state
        number = jnp.where(jnp.isfinite(state.damping), number.astype(state.damping.dtype), state.damping)
        return SampleSpaceState(state.batch, state.inverse.redamp(number), number)

    # -- what is asked of it --

    @on_automatic_axes
    def solve(self, state: SampleSpaceState, vector: Parameters) -> Parameters:
        state = check_state(state, SampleSpaceState)
        if state.batch is None or state.inverse is None:
            return zeros_like(vector)
        batch = _batch(state, vector)
        factor = self._factor(batch)
        rest = combine((1, -1), (wide(vector), wide(batch.gradient)))
        with jax.default_matmul_precision("highest"):
            pushed = factor.push(narrow(rest, vector)).astype(batch.kernel.dtype)
            right = batch.coordinates - pushed / state.damping
            inner = state.inverse.solve(right)
            # An inverse that was formed loses twice as many digits as its condition number has: once more for the rest.
            known = jnp.where(jnp.isfinite(state.damping), state.damping, 0)  # infinite before the first refresh
            inner += state.inverse.solve(right - linalg.matmul(batch.kernel, inner) - known * inner)
            return narrow(combine((1 / state.damping, 1), (rest, factor.pull(inner))), vector)

    @on_automatic_axes
    def multiply(self, state: SampleSpaceState, vector: Parameters) -> Parameters:
        factor = self._factor(_batch(state, vector))
        with jax.default_matmul_precision("highest"):
            return narrow(factor.pull(factor.push(vector)), vector)

    @on_automatic_axes
    def power(
        self, state: SampleSpaceState, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0
    ) -> Parameters:
        batch, by, p = _batch(state, vector), nonnegative("damping", damping), finite("exponent", exponent)
        values, vectors = linalg.eigh(batch.kernel)
        by, p = by.astype(values.dtype), p.astype(values.dtype)
        # Of s below rounding errors the kernel knows nothing: there C is zero.
        is_known = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
        values = jnp.where(is_known, values, 1)
        factors = jnp.where(is_known, ((values + by) ** p - by**p) / values, 0)
        factor = self._factor(batch)
        with jax.default_matmul_precision("highest"):
            inner = linalg.matmul(vectors, (factors * linalg.matmul(factor.push(vector), vectors)))
            return narrow(combine((by**p, 1), (wide(vector), factor.pull(inner))), vector)

    def eigenvalues(self, state: SampleSpaceState, parameters: Parameters) -> Float[Array, " p"]:
        values = jnp.maximum(linalg.eigh(_batch(state, parameters).kernel)[0], 0)
        size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
        return jnp.pad(values[-size:], (0, max(size - len(values), 0)))

    def to_dense(self, state: SampleSpaceState, parameters: Parameters) -> Float[Array, "p p"]:
        """C as a matrix, by as many products as there are parameters."""
        return dense(lambda v: self.multiply(state, v), parameters)

    def as_operator(
        self, state: SampleSpaceState, parameters: Parameters, damping: ArrayLike = 0.0
    ) -> lx.AbstractLinearOperator:
        by_parameter = damping_by_parameter(parameters, damping)
        return operator_of(lambda v: self.multiply(state, v), parameters, by_parameter, lx.positive_semidefinite_tag)

    def as_preconditioner(self, state: SampleSpaceState, parameters: Parameters) -> lx.AbstractLinearOperator:
        return inverse_of(lambda v: self.solve(state, v), parameters)

    def decompose(self, state: SampleSpaceState, parameters: Parameters) -> Eigendecomposition:
        _refuse("An eigendecomposition")

    def diagonal(self, state: SampleSpaceState, parameters: Parameters) -> Parameters:
        _refuse("The diagonal")

    def _factor(self, batch: SampleSpaceBatch) -> Factor:
        problem = batch.problem
        losses = problem.evaluate(problem.parameters).losses
        return Factor(self.source, problem, losses, batch.key, self.centered)


def _batch(state: SampleSpaceState, *vectors: Parameters) -> SampleSpaceBatch:
    """The batch, on which vectors must be like the parameters."""
    batch = check_state(state, SampleSpaceState).batch
    check_seen(None if batch is None else batch.problem, *vectors)
    return cast(SampleSpaceBatch, batch)


def _one(damping: ArrayLike | Mapping[str, ArrayLike]) -> Scalar:
    if isinstance(damping, Mapping):
        raise ValueError(
            "`SampleSpaceCurvature` has one damping for all parameters: give `l2` a number, without `where`."
        )
    return nonnegative("damping", damping)


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"{what} of a matrix as large as the parameters is not what `SampleSpaceCurvature` is for. Use "
        "`kfax.ExplicitExactCurvature` (for few parameters) or `kfax.BlockDiagonalCurvature`."
    )
