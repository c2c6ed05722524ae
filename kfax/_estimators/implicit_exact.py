"""Products with the exact curvature matrix, which is never formed."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._capture import check_values, Cotangents, Linearization, linearize, linearize_outputs, Outputs, Problem
from .._layers import any_parameters_of
from .._math.arguments import sequence, shaped
from .._math.mesh import on_automatic_axes
from .._math.tree import combine, inner_products, norm, select, zeros_like
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .base import CurvatureEstimator, division_by, narrow, operator_of
from .damping import damping_by_parameter, wide
from .eigendecomposition import Eigendecomposition
from .last_batch import check_seen, LastBatchCurvature
from .products import check_layout, check_matrix, check_state, dense, Hessian, layout_of, linear_map
from .sources import CurvatureSource, ExactGGN


class ImplicitExactState(eqx.Module):
    """The state of an `ImplicitExactCurvature`: a batch, to be run again for every product.

    **Fields:**

    - `problem`: model and batch of the last update; `None` before the first one.
    - `key`: for the source.
    - `damping`: λ of every parameter, as of the last refresh.
    - `preconditioner`: the state of the preconditioner.
    """

    problem: Problem | None
    key: PRNGKey | None
    damping: Parameters
    preconditioner: Any


class ImplicitExactBatch(eqx.Module):
    """A batch for an `ImplicitExactCurvature`, and what its preconditioner measured on it."""

    problem: Problem
    key: PRNGKey | None
    preconditioner: Any


class ImplicitExactCurvature(LastBatchCurvature):
    r"""The exact curvature matrix of the last batch, by its action on vectors.

    $$C = \tfrac1N \sum_n J_n^\top H_n J_n$$

    with J the derivative of all outputs in the parameters, H what the source says, and N examples; or the Hessian of
    the whole objective. Nothing is approximated: batch normalization and whatever else mixes examples is
    differentiated through, as are derivatives of the model within the loss.

    A product takes one pass forward and one backward, after a linearization that `as_operator` makes once and the
    other methods at each call. Of a model without forward mode a product with J is the transpose of the backward pass.
    Under `jit` a linearization is shared with whatever else runs the model at the same parameters.

    ??? cite "Source"
        Schraudolph 2002, doi:10.1162/08997660260028683; Martens 2010, "Deep learning via Hessian-free optimization",
        for the preconditioned solve.
    """

    source: CurvatureSource | Hessian
    preconditioner: CurvatureEstimator | None
    solver: lx.AbstractLinearSolver

    def __init__(
        self,
        source: CurvatureSource | Hessian = ExactGGN(),
        *,
        preconditioner: CurvatureEstimator | None = None,
        solver: lx.AbstractLinearSolver = lx.CG(rtol=1e-5, atol=1e-5),
    ):
        """**Arguments:**

        - `source`: which matrix: [`kfax.ExactGGN`][], [`kfax.ExactFisher`][], [`kfax.EmpiricalFisher`][],
            [`kfax.Hessian`][], or one that is sampled, whose samples are then those of the key of the last update.
        - `preconditioner`: an estimator, such as [`kfax.BlockDiagonalCurvature`][]`()`, whose inverse speeds up
            `solve`. It takes in the same batches.
        - `solver`: what `solve` uses, with its tolerances, which are for a right-hand side of norm 1. Those of
            `lineax.CG` bound each entry of the residual, and of the last change of the solution.

        **Raises:** `ValueError` for something else than that.
        """
        self.source = check_matrix(source)
        if not (preconditioner is None or isinstance(preconditioner, CurvatureEstimator)):
            raise ValueError(
                "`preconditioner` must be an estimator, such as `kfax.BlockDiagonalCurvature()`, got "
                f"{preconditioner!r}."
            )
        if not isinstance(solver, lx.AbstractLinearSolver):
            raise ValueError(f"`solver` must be a solver of lineax, such as `lineax.CG(1e-5, 1e-5)`, got {solver!r}.")
        self.preconditioner = preconditioner
        self.solver = solver

    # -- taking in batches --

    def init(self, model: Model, *, frozen: Where | None = None) -> ImplicitExactState:
        inner = None if self.preconditioner is None else self.preconditioner.init(model, frozen=frozen)
        return ImplicitExactState(None, None, zeros_like(wide(any_parameters_of(model, frozen))), inner)

    def check(self, problem: Problem) -> None:
        check_values(problem) if self.preconditioner is None else self.preconditioner.check(problem)

    def linearize(self, problem: Problem, state: ImplicitExactState) -> Linearization:
        inner = self.preconditioner
        return linearize(problem) if inner is None else inner.linearize(problem, state.preconditioner)

    def measure(self, linearization: Linearization, key: PRNGKey | None) -> ImplicitExactBatch:
        inner = None if self.preconditioner is None else self.preconditioner.measure(linearization, key)
        return ImplicitExactBatch(linearization.problem, key, inner)

    def fold(self, state: ImplicitExactState, measured: ImplicitExactBatch) -> ImplicitExactState:
        inner = check_state(state, ImplicitExactState).preconditioner
        if self.preconditioner is not None:
            inner = self.preconditioner.fold(inner, measured.preconditioner)
        return ImplicitExactState(measured.problem, measured.key, state.damping, inner)

    def fold_finite(
        self, state: ImplicitExactState, measured: ImplicitExactBatch, is_good: Bool[Array, ""]
    ) -> tuple[ImplicitExactState, Bool[Array, ""]]:
        inner, failed = state.preconditioner, jnp.zeros((), bool)
        if self.preconditioner is not None:
            inner, failed = self.preconditioner.fold_finite(inner, measured.preconditioner, is_good)
        return ImplicitExactState(measured.problem, measured.key, state.damping, inner), failed

    def weight(self, state: ImplicitExactState) -> Scalar:
        return jnp.asarray(0.0 if state.problem is None else 1.0)

    def refresh(
        self, state: ImplicitExactState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> ImplicitExactState:
        """**Arguments:**

        - `state`: after an update.
        - `parameters`: any PyTree like the parameters.
        - `damping`: λ, or one for each block by key, as for [`kfax.BlockDiagonalCurvature`][]. [loss/param²]

        **Returns:** the state with this damping, and the preconditioner refreshed.
        """
        inner = check_state(state, ImplicitExactState).preconditioner
        if self.preconditioner is not None:
            inner = self.preconditioner.refresh(inner, parameters, damping)
        return ImplicitExactState(state.problem, state.key, _dampings(state, parameters, damping), inner)

    def refresh_finite(
        self,
        state: ImplicitExactState,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[ImplicitExactState, Bool[Array, ""]]:
        inner, failed = state.preconditioner, jnp.zeros((), bool)
        if self.preconditioner is not None:
            inner, failed = self.preconditioner.refresh_finite(inner, parameters, damping, only, is_wanted)
        damping = select(jnp.asarray(is_wanted), _dampings(state, parameters, damping), state.damping)
        return ImplicitExactState(state.problem, state.key, damping, inner), failed

    def redamp(
        self, state: ImplicitExactState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
    ) -> ImplicitExactState:
        """As `refresh`, but without a refresh of the preconditioner."""
        inner = check_state(state, ImplicitExactState).preconditioner
        if self.preconditioner is not None:
            inner = self.preconditioner.redamp(inner, parameters, damping)
        return ImplicitExactState(state.problem, state.key, _dampings(state, parameters, damping), inner)

    # -- products --

    def multiply(self, state: ImplicitExactState, vector: Parameters) -> Parameters:
        return linear_map(self.source, _problem(state, vector), state.key)(vector)

    @on_automatic_axes
    def gram(self, state: ImplicitExactState, vectors: Sequence[Parameters]) -> Float[Array, "k k"]:
        r"""All the quadratic forms $v_i^\top C v_j$.

        **Arguments:**

        - `state`: after an update.
        - `vectors`: k PyTrees like the parameters.

        **Returns:** the symmetric matrix, in the dtype of the losses (at least float32). For a source of cotangents it
        costs a forward pass for each vector, and no backward pass.
        """
        problem = _problem(state, *sequence("vectors", vectors))
        if isinstance(self.source, Hessian):
            multiply = linear_map(self.source, problem, state.key)
            lefts, rights, scale = list(vectors), [multiply(v) for v in vectors], 1.0
        else:
            outputs = linearize_outputs(problem)
            lefts = [outputs.push(v) for v in vectors]
            rights = [self.source.multiply(outputs.losses, u, state.key) for u in lefts]
            scale = 1 / outputs.losses[0].num_examples
        k = len(lefts)
        pairs = [(i, k + j) for i in range(k) for j in range(k)]
        table = scale * jnp.sum(inner_products((*lefts, *rights), pairs)[0], axis=0).reshape(k, k)
        return (table + table.T) / 2

    @on_automatic_axes
    def multiply_jacobian(self, state: ImplicitExactState, vector: Parameters) -> Cotangents:
        """`J v`: how the outputs change along v.

        **Arguments:**

        - `state`: after an update.
        - `vector`: a PyTree like the parameters.

        **Returns:** for each loss an array of the shape of its outputs.
        """
        return linearize_outputs(_problem(state)).push(vector)

    @on_automatic_axes
    def multiply_jacobian_transpose(self, state: ImplicitExactState, vectors: Cotangents) -> Parameters:
        """`Jᵀ u`.

        **Arguments:**

        - `state`: after an update.
        - `vectors`: for each loss an array of the shape of its outputs.

        **Returns:** a PyTree like the parameters.
        """
        return linearize_outputs(_problem(state)).pull(vectors)

    @on_automatic_axes
    def multiply_factor(self, state: ImplicitExactState, vector: Float[Array, "n k"]) -> Parameters:
        r"""`B w`, of the factor B with `C = B Bᵀ`, which is `Jᵀ S / √N` with `H = S Sᵀ`.

        **Arguments:**

        - `state`: after an update.
        - `vector`: w, k numbers for each example, where k is `source.num_cotangents(losses)`: for the exact GGN the
            number of outputs of an example.

        **Returns:** a PyTree like the parameters. With standard normal w its covariance is C.
        """
        outputs, source = self._factored(state)
        vector = shaped("vector", vector, (outputs.losses[0].num_examples, source.num_cotangents(outputs.losses)))
        pulled = outputs.pull(source.multiply_factor(outputs.losses, vector, state.key))
        return combine((1 / math.sqrt(outputs.losses[0].num_examples),), (pulled,))

    @on_automatic_axes
    def multiply_factor_transpose(self, state: ImplicitExactState, vector: Parameters) -> Float[Array, "n k"]:
        """`Bᵀ v`, the adjoint of `multiply_factor`.

        **Arguments:**

        - `state`: after an update.
        - `vector`: a PyTree like the parameters.

        **Returns:** k numbers for each example.
        """
        outputs, source = self._factored(state)
        pushed = source.multiply_factor_transpose(outputs.losses, outputs.push(vector), state.key)
        return pushed / math.sqrt(outputs.losses[0].num_examples)

    def _factored(self, state: ImplicitExactState) -> tuple[Outputs, CurvatureSource]:
        if isinstance(self.source, Hessian):
            raise ValueError("The Hessian has no factor. Use a source such as `kfax.ExactGGN()`.")
        return linearize_outputs(_problem(state)), self.source

    # -- inverses and powers --

    @on_automatic_axes
    def solve(self, state: ImplicitExactState, vector: Parameters) -> Parameters:
        """`(C + λI)⁻¹ v`, by the iterative `solver`, with λ as of the last refresh.

        **Arguments:**

        - `state`: after an update and a refresh.
        - `vector`: a PyTree like the parameters.

        **Returns:** a PyTree like the parameters.

        NaN if vector, matrix or preconditioner are not finite.

        **Raises:** an error, when run, if the solver does not converge. For a solve that may stop short take
        `as_operator` and call `lineax.linear_solve` with `throw=False`.
        """
        if isinstance(self.source, Hessian) and isinstance(self.solver, lx.CG):
            raise ValueError(
                "`lineax.CG` needs a positive definite matrix, and the Hessian may be indefinite. Use "
                "`kfax.ImplicitExactCurvature(kfax.Hessian(), solver=lineax.GMRES(rtol=1e-4, atol=1e-4))`, or "
                "`kfax.ExplicitExactCurvature(kfax.Hessian(), inversion=kfax.Eigh())`."
            )
        _problem(state, vector)
        operator, preconditioner = self._operator(state, vector, state.damping), self.as_preconditioner(state, vector)
        # Tolerances are absolute in part: the right-hand side is brought to size one.
        size = norm(wide(vector))
        unit = combine((1 / jnp.where(size > 0, size, 1),), (wide(vector),))
        solution = lx.linear_solve(operator, unit, self.solver, options={"preconditioner": preconditioner}, throw=False)
        # A solver stops at NaNs as if it were done.
        finite = jnp.isfinite(norm(operator.mv(solution.value)) + norm(preconditioner.mv(unit)))
        value = jax.tree.map(lambda x: jnp.where(finite, size * x, jnp.nan), solution.value)
        failed = finite & (solution.result != lx.RESULTS.successful)
        return eqx.error_if(narrow(value, vector), failed, _NOT_CONVERGED)

    def power(
        self, state: ImplicitExactState, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0
    ) -> Parameters:
        """`(C + λI)^p v`.

        **Arguments:**

        - `state`: after an update.
        - `vector`: a PyTree like the parameters.
        - `exponent`: p, an integer: repeated products, or solves if it is negative.
        - `damping`: λ. [loss/param²]

        **Returns:** a PyTree like the parameters.

        **Raises:** `ValueError` for another p.
        """
        number = np.asarray(exponent)
        if number.shape or number.dtype.kind not in "iufb" or number % 1:
            _refuse(f"the power {exponent}, whose `exponent` is no integer,")
        operator = self.as_operator(state, vector, damping)
        if number < 0:
            by_parameter = damping_by_parameter(vector, damping)
            state = ImplicitExactState(state.problem, state.key, by_parameter, state.preconditioner)
        for _ in range(abs(int(number))):
            vector = narrow(operator.mv(wide(vector)), vector) if number > 0 else self.solve(state, vector)
        return vector

    def as_operator(
        self, state: ImplicitExactState, parameters: Parameters, damping: ArrayLike = 0.0
    ) -> lx.AbstractLinearOperator:
        return self._operator(state, parameters, damping_by_parameter(parameters, damping))

    def _operator(
        self, state: ImplicitExactState, parameters: Parameters, damping: Parameters
    ) -> lx.AbstractLinearOperator:
        tag = lx.symmetric_tag if isinstance(self.source, Hessian) else lx.positive_semidefinite_tag
        return operator_of(linear_map(self.source, _problem(state), state.key), parameters, damping, tag)

    def as_preconditioner(self, state: ImplicitExactState, parameters: Parameters) -> lx.AbstractLinearOperator:
        """The inverse of the `preconditioner`; without one, division by λ, as of the last refresh.

        **Arguments:**

        - `state`: after a refresh.
        - `parameters`: any PyTree like the parameters.

        **Returns:** an operator on PyTrees like the parameters, tagged as positive semi-definite.
        """
        check_layout(parameters, layout_of(check_state(state, ImplicitExactState).damping))
        if self.preconditioner is None:
            return division_by(state.damping)
        return self.preconditioner.as_preconditioner(state.preconditioner, parameters)

    # -- what takes a matrix --

    def decompose(self, state: ImplicitExactState, parameters: Parameters) -> Eigendecomposition:
        _refuse("an eigendecomposition")

    def eigenvalues(self, state: ImplicitExactState, parameters: Parameters) -> Float[Array, " p"]:
        _refuse("all eigenvalues")

    def diagonal(self, state: ImplicitExactState, parameters: Parameters) -> Parameters:
        _refuse("a diagonal")

    @on_automatic_axes
    def to_dense(self, state: ImplicitExactState, parameters: Parameters) -> Float[Array, "p p"]:
        """C as a matrix, by as many products as there are parameters."""
        return dense(linear_map(self.source, _problem(state), state.key), parameters)


_NOT_CONVERGED = (
    "The solver of `kfax.ImplicitExactCurvature` did not converge. Before the first `refresh` the damping is zero: "
    "call it first. Or loosen the tolerances (`solver=lineax.CG(rtol=1e-3, atol=1e-3)`), raise λ, or use float64."
)


def _problem(state: ImplicitExactState, *vectors: Parameters) -> Problem:
    return check_seen(check_state(state, ImplicitExactState).problem, *vectors)


def _dampings(
    state: ImplicitExactState, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]
) -> Parameters:
    check_layout(parameters, layout_of(state.damping))
    return damping_by_parameter(parameters, damping)


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"`ImplicitExactCurvature` knows its matrix by products only, from which {what} cannot be had. Use "
        "`kfax.ExplicitExactCurvature` (for few parameters) or `kfax.BlockDiagonalCurvature`, or hand `as_operator` to "
        "an iterative method."
    )
