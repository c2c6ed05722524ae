"""What every estimator of a model's curvature can be asked."""

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Bool, Float

from .._capture import Across, Linearization, mean_across, Problem, split_key
from .._losses import Loss
from .._math.mesh import on_automatic_axes
from .._math.moving_average import MovingAverage
from .._math.types import Model, Parameters, PRNGKey, Scalar, Where
from .damping import wide
from .eigendecomposition import Eigendecomposition
from .sources import CurvatureSource


class CurvatureEstimator(eqx.Module):
    """The curvature C of a loss in the parameters of a tagged model, or an approximation of it.

    The loss is the mean over a batch's examples, without any regularizer. C is in loss/param². Vectors are PyTrees
    like the parameters, `kfax.parameters_of(model)`: a gradient, for instance. All methods are pure functions: the
    estimator itself holds nothing but its configuration.
    """

    # -- taking in batches --

    @abc.abstractmethod
    def check(self, problem: Problem) -> None:
        """Checks, on concrete values, that loss and gradient of a batch are finite, and all else the estimate needs.

        **Raises:** `ValueError` that says what is wrong.
        """

    @abc.abstractmethod
    def init(self, model: Model, *, frozen: Where | None = None) -> Any:
        """The state before any batch was seen."""

    @abc.abstractmethod
    def linearize(self, problem: Problem, state: Any) -> Linearization:
        """Runs the model on a batch such that its gradient, and by `measure` its curvature, can be had from it.

        What is measured may depend on the state, into which it will be folded: on an eigenbasis, for one.
        """

    @abc.abstractmethod
    def measure(self, linearization: Linearization, key: PRNGKey | None) -> Any:
        """The curvature of a linearized batch, as `fold` takes it in."""

    @abc.abstractmethod
    def fold(self, state: Any, measured: Any) -> Any:
        """Takes what was measured on a batch into the estimate."""

    @on_automatic_axes
    def update(
        self,
        state: Any,
        loss_fn: Callable,
        model: Model,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        frozen: Where | None = None,
    ) -> Any:
        """Takes one batch into the estimate.

        **Arguments:**

        - `state`: from `init` or an earlier update.
        - `loss_fn`: as for [`kfax.Optimizer`][].
        - `model`: the tagged model.
        - `batch`: passed to `loss_fn`.
        - `key`: for sources that draw random numbers, and for `loss_fn` if it takes a key.
        - `model_state`: for `loss_fn`, if it takes one.
        - `frozen`: as in [`kfax.tag`][].

        **Returns:** the new state.
        """
        model_key, source_key = split_key(loss_fn, key)
        problem = Problem(loss_fn, model, batch, model_key, model_state, frozen)
        return self.fold(state, measured_across(loss_fn, self.measure(self.linearize(problem, state), source_key)))

    @abc.abstractmethod
    def weight(self, state: Any) -> Scalar:
        """What the estimate rests on: zero before the first update."""

    @abc.abstractmethod
    def nothing(self, state: Any) -> Any:
        """What is measured on no example, the zero of `add`."""

    @abc.abstractmethod
    def add(self, measured: Any, more: Any) -> Any:
        """What is measured on the examples of two batches together, each with its weight."""

    # -- what is costly --

    @abc.abstractmethod
    def refresh(self, state: Any, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Does the costly part of `solve`, for the present estimate and damping."""

    @abc.abstractmethod
    def redamp(self, state: Any, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Gives `solve` another damping, for those blocks for which that takes no refresh; others keep theirs."""

    @abc.abstractmethod
    def fold_finite(self, state: Any, measured: Any, is_good: Bool[Array, ""]) -> tuple[Any, Bool[Array, ""]]:
        """`fold`, if what was measured is good and finite.

        **Arguments:**

        - `state`: before it.
        - `measured`: on a batch.
        - `is_good`: whether it is wanted at all.

        **Returns:** the state, and whether it is as before because something measured is not finite.
        """

    @abc.abstractmethod
    def refresh_finite(
        self,
        state: Any,
        parameters: Parameters,
        damping: ArrayLike | Mapping[str, ArrayLike],
        only: Collection[str] | None = None,
        is_wanted: Bool[Array, ""] | bool = True,
    ) -> tuple[Any, Bool[Array, ""]]:
        """`refresh`, of what can be inverted.

        **Arguments:** as for `refresh`.

        - `only`: keys of the blocks to be refreshed, if the estimator has blocks; all if not given.
        - `is_wanted`: whether it is wanted at all.

        **Returns:** the state, with those inverses as before that are not finite, or of nothing, or not wanted; and
        whether any is wanted and failed.
        """

    @abc.abstractmethod
    def decompose(self, state: Any, parameters: Parameters) -> Eigendecomposition:
        """The eigendecomposition of C: any power of C + λI for any λ, log-determinants, eigenvalues."""

    @abc.abstractmethod
    def power(self, state: Any, vector: Parameters, exponent: ArrayLike, damping: ArrayLike = 0.0) -> Parameters:
        """`(C + λI)^p v`. For more than one of them take `decompose` once."""

    @abc.abstractmethod
    def eigenvalues(self, state: Any, parameters: Parameters) -> Float[Array, " p"]:
        """All eigenvalues of C, in no particular order."""

    # -- what is cheap --

    @abc.abstractmethod
    def solve(self, state: Any, vector: Parameters) -> Parameters:
        """`(C + λI)⁻¹ v`, with C and λ as of the last refresh; zeros before the first one."""

    @abc.abstractmethod
    def multiply(self, state: Any, vector: Parameters) -> Parameters:
        """`C v`."""

    @abc.abstractmethod
    def diagonal(self, state: Any, parameters: Parameters) -> Parameters:
        """The diagonal of C, as a PyTree like the parameters."""

    @abc.abstractmethod
    def to_dense(self, state: Any, parameters: Parameters) -> Float[Array, "p p"]:
        """C as a matrix, acting on vectors as `jax.flatten_util.ravel_pytree` ravels them."""

    # -- for solvers --

    @abc.abstractmethod
    def as_operator(self, state: Any, parameters: Parameters, damping: ArrayLike = 0.0) -> lx.AbstractLinearOperator:
        """`C + λI` as a linear operator of [lineax](https://docs.kidger.site/lineax/).

        **Arguments:**

        - `state`: with the batches to be used.
        - `parameters`: any PyTree like the parameters.
        - `damping`: λ. [loss/param²]

        **Returns:** an operator on PyTrees like the parameters (in at least float32), tagged as symmetric and, if it
        is, as positive semi-definite. In float32 `lineax.CG` without a preconditioner takes eigenvalues below about
        `1e-5 P` for zero, and returns NaN.
        """

    @abc.abstractmethod
    def as_preconditioner(self, state: Any, parameters: Parameters) -> lx.AbstractLinearOperator:
        """`solve` as a linear operator: an approximate inverse, for `lineax.CG` and the like.

        **Arguments:**

        - `state`: after a refresh.
        - `parameters`: any PyTree like the parameters.

        **Returns:** an operator on PyTrees like the parameters, tagged as positive semi-definite.
        """


def check_source(source: CurvatureSource) -> CurvatureSource:
    if not isinstance(source, CurvatureSource):
        raise ValueError(f"`source` must be a curvature source, such as `kfax.ExactGGN()`, got {source!r}.")
    return source


def narrow(vector: Parameters, like: Parameters) -> Parameters:
    """In the dtypes of another vector."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), vector, like)


def operator_of(
    function: Callable[[Parameters], Parameters], parameters: Parameters, damping: Parameters, tag: object
) -> lx.FunctionLinearOperator:
    """`function + λI` as an operator, with λ of every parameter."""

    def damped(vector):
        products = function(narrow(vector, parameters))
        return jax.tree.map(lambda product, by, v: product.astype(v.dtype) + by * v, products, damping, vector)

    return lx.FunctionLinearOperator(damped, jax.eval_shape(lambda: damping), tag)


def inverse_of(function: Callable[[Parameters], Parameters], parameters: Parameters) -> lx.FunctionLinearOperator:
    """`function`, the inverse of something positive definite, as an operator."""
    structure = jax.eval_shape(lambda: wide(parameters))
    return lx.FunctionLinearOperator(lambda v: wide(function(narrow(v, parameters))), structure, _PSD)


def division_by(damping: Parameters) -> lx.AbstractLinearOperator:
    """Division by λ, which brings the smallest eigenvalues to 1: `lineax.CG` takes small ones for zero."""

    def divide(vector):
        return jax.tree.map(lambda v, by: v / jnp.where(by > 0, by, 1), vector, damping)

    return inverse_of(divide, damping)


_PSD = lx.positive_semidefinite_tag


def measured_across(loss_fn: Callable, measured: Any) -> Any:
    """What was measured on the examples of all devices, for a `loss_fn` that is one `kfax.across` them."""
    if not isinstance(loss_fn, Across):
        return measured

    def mean(average):
        if not isinstance(average, MovingAverage):
            raise ValueError(
                "Inside `jax.shard_map` an estimator must be one of running averages, such as "
                "`kfax.BlockDiagonalCurvature`. `kfax.ImplicitExactCurvature` takes sharded batches, without it."
            )
        return MovingAverage(*mean_across(loss_fn, average.value, average.weight))

    return jax.tree.map(mean, measured, is_leaf=lambda node: isinstance(node, MovingAverage))


def total_weight(losses: tuple[Loss, ...]) -> Scalar:
    """How much a batch counts in a mean over batches: its number of examples, or the sum of their weights."""
    weights = [loss.total_weight() for loss in losses]
    return (sum(weights[1:], weights[0]) / len(weights)).astype(jnp.result_type(float))
