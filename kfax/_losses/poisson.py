"""Poisson negative log-likelihood: counts, given by the logarithm of their rate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.types import PRNGKey
from .base import check_outputs, NaturalLoss, real_targets, weigh_outputs, Weighting


class PoissonNLL(NaturalLoss):
    r"""$\ell = \sum_i e^{f_i} - y_i f_i$, without the constant $\log y_i!$.

    Its Hessian in the logarithms f of the rates is $\mathrm{diag}(e^f)$. Made by [`kfax.poisson_nll`][].

    **Fields:**

    - `outputs`: logarithms of rates, `(n, *positions, d)`.
    - `targets`: counts, of the same shape.
    - `weighting`: of examples and positions.
    """

    outputs: Float[Array, "n ..."]
    targets: Float[Array, "n ..."]
    weighting: Weighting

    def losses(self) -> Float[Array, "n ..."]:
        return jnp.exp(self.outputs) - self.targets * self.outputs

    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return jnp.exp(self.outputs / 2) * vector

    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor(vector)

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        # JAX draws from Poisson distributions with keys of one kind only.
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), "uint32"), impl="threefry2x32")
        rates = jnp.exp(self.outputs)
        return rates - jax.random.poisson(key, rates).astype(rates.dtype)


def poisson_nll(
    log_rates: Array,
    counts: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> PoissonNLL:
    """The negative log-likelihood of counts under Poisson distributions, averaged over the examples of a batch.

    The constant `log(count!)` is left out.

    **Arguments:**

    - `log_rates`: `(n, *positions, d)` or `(n,)`, with the examples on axis 0; all other axes are summed over.
    - `counts`: of the same shape: integers, or any other numbers that are not negative.
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked rates and counts has no effect.
    - `mean_over_positions`: average over positions (all axes but the first and the last) instead of summing.

    **Returns:** a [`kfax.PoissonNLL`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for rates that are not floating-point, and for shapes that do not fit.
    """
    check_outputs("poisson_nll", log_rates)
    outputs, weighting = weigh_outputs("poisson_nll", log_rates, weights, mask, mean_over_positions)
    targets = real_targets("poisson_nll", counts, log_rates, weighting, "counts")
    return PoissonNLL(outputs=outputs, targets=targets, weighting=weighting)
