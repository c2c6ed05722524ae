"""Negative log-likelihood of a normal distribution whose variance the model predicts as well."""

import math
from typing import NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.types import PRNGKey
from .base import check_outputs, Loss, real_targets, weigh_outputs, Weighting


class GaussianNLL(Loss):
    r"""$\ell = \tfrac12 \sum_i s_i + (y_i - \mu_i)^2 e^{-s_i}$, without the constant $\tfrac12 \log 2\pi$.

    The negative log-likelihood of normal distributions with means μ and variances $e^s$. These are no natural
    parameters: the Hessian in (μ, s) depends on the targets and is not positive semi-definite, so that there is no
    generalized Gauss-Newton matrix. The Fisher information is $\mathrm{diag}(e^{-s}, \tfrac12)$. Made by
    [`kfax.gaussian_nll`][].

    **Fields:**

    - `outputs`: means, and after them logarithms of variances, `(n, *positions, 2 d)`.
    - `targets`: `(n, *positions, d)`.
    - `weighting`: of examples and positions.
    """

    outputs: Float[Array, "n ..."]
    targets: Float[Array, "n ..."]
    weighting: Weighting

    def losses(self) -> Float[Array, "n ..."]:
        mean, log_variance = jnp.split(self.outputs, 2, axis=-1)
        return (log_variance + jnp.square(self.targets - mean) * jnp.exp(-log_variance)) / 2

    def ggn_factor(self, vector: Float[Array, "n ..."]) -> NoReturn:
        raise _no_ggn()

    def ggn_factor_transpose(self, vector: Float[Array, "n ..."]) -> NoReturn:
        raise _no_ggn()

    def ggn_product(self, vector: Float[Array, "n ..."]) -> NoReturn:
        raise _no_ggn()

    def fisher_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        mean, log_variance = jnp.split(vector, 2, axis=-1)
        return jnp.concatenate([self._precision_root() * mean, math.sqrt(0.5) * log_variance], axis=-1)

    def fisher_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.fisher_factor(vector)

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        # Targets μ + e^(s/2) ε with standard normal ε.
        noise = jax.random.normal(key, self.targets.shape, self.targets.dtype)
        return jnp.concatenate([-self._precision_root() * noise, (1 - jnp.square(noise)) / 2], axis=-1)

    def _precision_root(self) -> Float[Array, "n ..."]:
        return jnp.exp(-jnp.split(self.outputs, 2, axis=-1)[1] / 2)


def _no_ggn() -> ValueError:
    return ValueError(
        "`gaussian_nll` has no generalized Gauss-Newton matrix: its Hessian in means and log-variances depends on the "
        "targets and has negative eigenvalues. Use its Fisher information as the source of curvature: "
        "`kfax.ExactFisher()`, `kfax.SampledFisher()` or `kfax.CurvaturePropagation(source=kfax.ExactFisher())`."
    )


def gaussian_nll(
    means: Array,
    log_variances: Array,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> GaussianNLL:
    """The negative log-likelihood of targets under normal distributions whose variances are learned, too.

    It is averaged over the examples of a batch. The constant `log(2 pi) / 2` is left out. The curvature of this loss
    has to come from its Fisher information: choose `kfax.ExactFisher()`, `kfax.SampledFisher()` or
    `kfax.CurvaturePropagation(source=kfax.ExactFisher())`.

    **Arguments:**

    - `means`: `(n, *positions, d)` or `(n,)`, with the examples on axis 0; all other axes are summed over.
    - `log_variances`: of the same shape.
    - `targets`: of the same shape.
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked outputs and targets has no effect.
    - `mean_over_positions`: average over positions (all axes but the first and the last) instead of summing.

    **Returns:** a [`kfax.GaussianNLL`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for outputs that are not floating-point, and for shapes that do not fit.
    """
    name = "gaussian_nll"
    check_outputs(name, means)
    check_outputs(name, log_variances)
    if means.shape != log_variances.shape:
        raise ValueError(
            f"`means` and `log_variances` of `{name}` must have one shape, got {means.shape} and {log_variances.shape}."
        )
    stack = jnp.stack if means.ndim == 1 else jnp.concatenate
    outputs, weighting = weigh_outputs(name, stack([means, log_variances], -1), weights, mask, mean_over_positions)
    targets = real_targets(name, targets, means, weighting)
    targets = targets[:, None] if means.ndim == 1 else targets
    return GaussianNLL(outputs=outputs, targets=targets.astype(outputs.dtype), weighting=weighting)
