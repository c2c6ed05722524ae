"""Squared error: a normal distribution of variance one half, given by its mean."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.types import PRNGKey
from .base import check_outputs, NaturalLoss, real_targets, weigh_outputs, Weighting


class SquaredError(NaturalLoss):
    r"""$\ell = \sum_i (f_i - y_i)^2$, without a factor 1/2.

    Up to a constant this is the negative log-likelihood of a normal distribution with mean f and variance 1/2. Its
    Hessian in the outputs f is $2 I$. Made by [`kfax.squared_error`][].

    **Fields:**

    - `outputs`: predictions, `(n, *positions, d)`.
    - `targets`: of the same shape.
    - `weighting`: of examples and positions.
    """

    outputs: Float[Array, "n ..."]
    targets: Float[Array, "n ..."]
    weighting: Weighting

    def losses(self) -> Float[Array, "n ..."]:
        return jnp.square(self.outputs - self.targets)

    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return math.sqrt(2) * vector

    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return math.sqrt(2) * vector

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        # Targets f + ε/√2 with standard normal ε: the gradient is 2 (f - target).
        return -math.sqrt(2) * jax.random.normal(key, self.outputs.shape, self.outputs.dtype)


def squared_error(
    predictions: Array,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> SquaredError:
    """The squared error between predictions and targets, averaged over the examples of a batch.

    There is no factor 1/2, so that the Hessian in the predictions is 2I: multiply by 0.5 if you want one.

    **Arguments:**

    - `predictions`: `(n, *positions, d)` or `(n,)`, with the examples on axis 0; all other axes are summed over.
    - `targets`: of the same shape.
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked predictions and targets has no effect.
    - `mean_over_positions`: average over positions (all axes but the first and the last) instead of summing.

    **Returns:** a [`kfax.SquaredError`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for predictions that are not floating-point, and for shapes that do not fit.
    """
    check_outputs("squared_error", predictions)
    outputs, weighting = weigh_outputs("squared_error", predictions, weights, mask, mean_over_positions)
    targets = real_targets("squared_error", targets, predictions, weighting)
    return SquaredError(outputs=outputs, targets=targets, weighting=weighting)
