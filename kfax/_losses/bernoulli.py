"""Sigmoid cross entropy: independent Bernoulli distributions given by their logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.types import PRNGKey
from .base import check_outputs, NaturalLoss, real_targets, weigh_outputs, Weighting


class SigmoidCrossEntropy(NaturalLoss):
    r"""$\ell = -\sum_i y_i \log \sigma(f_i) + (1 - y_i) \log \sigma(-f_i)$.

    Its Hessian in the logits f is $\mathrm{diag}(\sigma(f) \sigma(-f))$. Made by [`kfax.sigmoid_cross_entropy`][].

    **Fields:**

    - `outputs`: logits, `(n, *positions, d)`.
    - `targets`: of the same shape, in [0, 1].
    - `weighting`: of examples and positions.
    """

    outputs: Float[Array, "n ..."]
    targets: Float[Array, "n ..."]
    weighting: Weighting

    def losses(self) -> Float[Array, "n ..."]:
        log_p, log_not_p = jax.nn.log_sigmoid(self.outputs), jax.nn.log_sigmoid(-self.outputs)
        return -self.targets * log_p - (1 - self.targets) * log_not_p

    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return jnp.sqrt(jax.nn.sigmoid(self.outputs) * jax.nn.sigmoid(-self.outputs)) * vector

    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor(vector)

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        p = jax.nn.sigmoid(self.outputs)
        return p - jax.random.bernoulli(key, p).astype(p.dtype)


def sigmoid_cross_entropy(
    logits: Array,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> SigmoidCrossEntropy:
    """The sigmoid cross entropy between logits and targets, averaged over the examples of a batch.

    **Arguments:**

    - `logits`: `(n, *positions, d)` or `(n,)`, with the examples on axis 0; all other axes are summed over.
    - `targets`: of the same shape, each in [0, 1].
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked logits and targets has no effect.
    - `mean_over_positions`: average over positions (all axes but the first and the last) instead of summing.

    **Returns:** a [`kfax.SigmoidCrossEntropy`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for logits that are not floating-point, and for shapes that do not fit.
    """
    check_outputs("sigmoid_cross_entropy", logits)
    outputs, weighting = weigh_outputs("sigmoid_cross_entropy", logits, weights, mask, mean_over_positions)
    targets = real_targets("sigmoid_cross_entropy", targets, logits, weighting)
    return SigmoidCrossEntropy(outputs=outputs, targets=targets, weighting=weighting)
