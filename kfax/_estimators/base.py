"""What every estimator of a model's curvature can be asked."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, Float

from .._capture import Linearization
from .._registry import split_parameters
from .._types import Model, Parameters, PRNGKey, Where


class CurvatureEstimator(eqx.Module):
    """An approximation C of the curvature of a loss in the parameters of a tagged model.

    The loss is the mean over a batch's examples, without any regularizer. C is in loss/param². Vectors are PyTrees
    like the parameters, for instance `equinox.filter(model, equinox.is_inexact_array)`, or a gradient. All methods are
    pure functions: the estimator itself holds nothing but its configuration.

    **Fields:**

    - `example_axis`: the name of the axis that enumerates the examples, or `None` for the outermost mapped one.
    """

    example_axis: eqx.AbstractVar[str | None]

    @abc.abstractmethod
    def init(self, model: Model, *, frozen: Where | None = None) -> Any:
        """The state before any batch was seen."""

    @abc.abstractmethod
    def linearize(
        self,
        loss_fn: Callable,
        model: Model,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        frozen: Where | None = None,
    ) -> Linearization:
        """Runs the model on a batch such that its gradient, and by `fold` its curvature, can be had from it."""

    @abc.abstractmethod
    def fold(self, state: Any, linearization: Linearization, parameters: Parameters, key: PRNGKey | None) -> Any:
        """Takes a linearized batch into the estimate."""

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
        model_key, source_key = (None, None) if key is None else jax.random.split(key)
        linearization = self.linearize(loss_fn, model, batch, key=model_key, model_state=model_state, frozen=frozen)
        parameters, _ = split_parameters(model, frozen)
        return self.fold(state, linearization, parameters, source_key)

    @abc.abstractmethod
    def refresh(self, state: Any, parameters: Parameters, damping: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Does the costly part of `solve`, for the present estimate and damping."""

    @abc.abstractmethod
    def solve(self, state: Any, vector: Parameters) -> Parameters:
        """`(C + λI)⁻¹ v`, with C and λ as of the last refresh."""

    @abc.abstractmethod
    def multiply(self, state: Any, vector: Parameters) -> Parameters:
        """`C v`."""

    @abc.abstractmethod
    def eigenvalues(self, state: Any, parameters: Parameters) -> Float[Array, " p"]:
        """All eigenvalues of C, in no particular order."""

    @abc.abstractmethod
    def to_dense(self, state: Any, parameters: Parameters) -> Float[Array, "p p"]:
        """C as a matrix, acting on vectors as `jax.flatten_util.ravel_pytree` ravels them."""
