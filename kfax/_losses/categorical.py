"""Softmax cross entropy: a categorical distribution given by its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._math.arguments import array
from .._math.types import PRNGKey
from .base import check_outputs, hide, NaturalLoss, real_targets, weigh_outputs, Weighting


class SoftmaxCrossEntropy(NaturalLoss):
    r"""$\ell = -\log \mathrm{softmax}(f)_y$, or $-\sum_c y_c \log \mathrm{softmax}(f)_c$ for a distribution y.

    Its Hessian in the logits f is $\mathrm{diag}(p) - p p^\top = S S^\top$ with $p = \mathrm{softmax}(f)$ and
    $S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top$. Made by [`kfax.softmax_cross_entropy`][].

    **Fields:**

    - `outputs`: logits, `(n, *positions, classes)`.
    - `targets`: labels, `(n, *positions)`, or probabilities of the logits' shape.
    - `weighting`: of examples and positions.
    """

    outputs: Float[Array, "n ... c"]
    targets: Int[Array, "n ..."] | Float[Array, "n ... c"]
    weighting: Weighting

    def losses(self) -> Float[Array, "n ..."]:
        log_p = jax.nn.log_softmax(self.outputs)
        if self.targets.ndim == self.outputs.ndim:
            return -jnp.sum(self.targets * log_p, axis=-1)
        valid = (self.targets >= 0) & (self.targets < self.outputs.shape[-1])
        picked = jnp.take_along_axis(log_p, jnp.where(valid, self.targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(valid, -picked, jnp.nan)

    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        p = jax.nn.softmax(self.outputs)
        scaled = jnp.sqrt(p) * vector
        return scaled - p * jnp.sum(scaled, axis=-1, keepdims=True)

    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        p = jax.nn.softmax(self.outputs)
        return jnp.sqrt(p) * (vector - jnp.sum(p * vector, axis=-1, keepdims=True))

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        labels = jax.random.categorical(key, self.outputs)
        return jax.nn.softmax(self.outputs) - jax.nn.one_hot(labels, self.outputs.shape[-1], dtype=self.outputs.dtype)


def softmax_cross_entropy(
    logits: Array,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> SoftmaxCrossEntropy:
    """The softmax cross entropy between logits and labels, averaged over the examples of a batch.

    **Arguments:**

    - `logits`: `(n, *positions, classes)`, with the examples on axis 0. Losses of different positions (tokens,
        pixels) of one example are summed.
    - `labels`: integers of shape `(n, *positions)`, each in `[0, classes)` (the loss is NaN otherwise), or
        probabilities (such as one-hot vectors) of the logits' shape. Probabilities should sum to 1: the curvature
        assumes it.
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked logits and labels has no effect.
    - `mean_over_positions`: average over positions instead of summing, each counting the same.

    **Returns:** a [`kfax.SoftmaxCrossEntropy`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for logits that are not floating-point, and for shapes that do not fit.
    """
    check_outputs("softmax_cross_entropy", logits)
    if logits.ndim < 2:
        raise ValueError(
            f"`softmax_cross_entropy` takes logits of shape `(n, ..., classes)`, got {logits.shape}. Call the model as "
            "`jax.vmap(model)(inputs)`; for a single logit for each example use `sigmoid_cross_entropy`."
        )
    labels = array("`labels` of `softmax_cross_entropy`", labels)
    outputs, weighting = weigh_outputs("softmax_cross_entropy", logits, weights, mask, mean_over_positions)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != logits.shape[:-1] and labels.shape != logits.shape:
            raise ValueError(
                f"Integer `labels` of `softmax_cross_entropy` must have the shape of the logits without their last "
                f"axis, {logits.shape[:-1]}, got {labels.shape}."
            )
        if labels.shape != logits.shape:
            return SoftmaxCrossEntropy(outputs=outputs, targets=hide(labels, weighting), weighting=weighting)
    elif labels.shape == logits.shape[:-1]:
        raise ValueError(
            f"`labels` of `softmax_cross_entropy` have dtype {labels.dtype}, but class indices must be integers: "
            "convert them with `labels.astype(int)`. Floating-point labels are probabilities, one for each class."
        )
    targets = real_targets("softmax_cross_entropy", labels, logits, weighting)
    return SoftmaxCrossEntropy(outputs=outputs, targets=targets, weighting=weighting)
