"""What kfax needs to know of a loss: its value, and its curvature in the model's outputs."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, ArrayLike, Bool, Float

from .._math.arguments import array, flag
from .._math.tree import is_traced
from .._math.types import PRNGKey, Scalar


class Weighting(eqx.Module):
    r"""How the losses of all examples and positions are put together.

    $$h = \frac{c}{\sum_n w_n} \sum_n w_n \frac1R \sum_p m_{np} \ell_{np}$$

    An example with no unmasked position at all has weight zero. With a weight that is negative or not finite, h is NaN.

    **Fields:**

    - `weights`: w, `(n,)`, or `None` for equal weights.
    - `mask`: m, over examples and positions, or `None` if all count.
    - `scale`: c, in the dtype of the value.
    - `positions`: R, `None` to sum over positions (R = 1); their (weighted) mean number in an example to average over
        them.
    """

    weights: Float[Array, " n"] | None = None
    mask: Bool[Array, "n ..."] | None = None
    scale: Scalar = eqx.field(default_factory=lambda: jnp.ones(()))
    positions: Scalar | None = None

    @property
    def is_weighted(self) -> bool:
        """Whether some examples or positions may count differently from others."""
        return self.weights is not None or self.mask is not None

    def example_weights(self, num_examples: int) -> Float[Array, " n"] | None:
        """The weights divided by their mean, or `None` if they are equal."""
        if not self.is_weighted:
            return None
        weights = self._counting(num_examples)
        # Of very large or small numbers the sum or its reciprocal, by which XLA divides, could not be represented.
        weights = weights * jnp.where(jnp.max(weights) > 1, 2.0**-64, 2.0**64).astype(weights.dtype)
        mean = jnp.mean(weights)
        return weights / jnp.where(mean == 0, 1, mean)

    def total(self, num_examples: int) -> Scalar:
        """The denominator: `R Σ w_n`, over the examples that are not masked throughout.

        At most the root of the largest number (1.8e19 in float32), so that it can be added up over batches.
        """
        total = jnp.sum(self._counting(num_examples))
        total = total if self.positions is None else self.positions * total
        return jnp.minimum(total, math.sqrt(jnp.finfo(total.dtype).max))

    def coefficients(self, shape: tuple[int, ...]) -> Float[Array, "n ..."]:
        """The factor, relative to 1/n, with which each example and position counts; broadcasts against `shape`."""
        weights = self.example_weights(shape[0])
        # Where no position counts, nothing is divided by their number.
        scale = self.scale
        if self.positions is not None:
            scale = scale / jnp.where(self.positions > 0, self.positions, 1)
        coefficients = scale * (jnp.ones(1, self.scale.dtype) if weights is None else weights)
        ndim = len(shape) if self.mask is None else self.mask.ndim
        coefficients = coefficients.reshape(-1, *(1,) * (ndim - 1))
        if self.mask is not None:
            coefficients = coefficients * self.mask
        return coefficients.reshape(*coefficients.shape, *(1,) * (len(shape) - coefficients.ndim))

    def _counting(self, num_examples: int) -> Float[Array, " n"]:
        """The weights, with zero for what is masked throughout; NaNs if there is a number that is no weight."""
        weights = jnp.ones(num_examples, self.scale.dtype) if self.weights is None else self.weights
        weights = jnp.where(jnp.all(_is_weight(weights)), weights, jnp.nan)
        if self.mask is None:
            return weights
        return jnp.where(jnp.any(self.mask.reshape(num_examples, -1), axis=1), weights, 0)


class Loss(eqx.Module):
    r"""The outputs of a model on a batch, and what is to be made of them.

    Its value is the (weighted) mean over the examples, axis 0 of the outputs, of the losses ℓ_n; over any further axes
    of positions the losses are summed. Two matrices say how curved it is in the outputs of an example, each given by
    products with a factor of it:

    - the Hessian $H = S S^\top$ of ℓ_n, from which the generalized Gauss-Newton matrix (GGN) is made;
    - the Fisher information $F = T T^\top$, the mean of $\nabla \ell_n \nabla \ell_n^\top$ over targets drawn from
      the distribution of which ℓ_n is the negative log-likelihood.

    All methods that take or return an array of the outputs' shape are per example and position, and without weights:
    apply `weigh` to what `ggn_factor`, `fisher_factor`, `gradient` and `sampled_gradient` return, and to what their
    transposes take. A method that a loss has no answer to raises a `ValueError`. Multiply a loss by a number to weigh
    it against others. To define a loss, subclass [`kfax.NaturalLoss`][] if its outputs are natural parameters, for
    then the two matrices are one.
    """

    outputs: AbstractVar[Float[Array, "n ..."]]
    weighting: AbstractVar[Weighting]

    # -- what a loss defines, for each example and position alone --

    @abc.abstractmethod
    def losses(self) -> Float[Array, "n ..."]:
        """ℓ for each example and position, unweighted; may keep the outputs' last axis, to be summed."""

    @abc.abstractmethod
    def ggn_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`S v`."""

    @abc.abstractmethod
    def ggn_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`Sᵀ u`."""

    @abc.abstractmethod
    def ggn_product(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`H u`."""

    @abc.abstractmethod
    def fisher_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`T v`."""

    @abc.abstractmethod
    def fisher_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`Tᵀ u`."""

    @abc.abstractmethod
    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        """The gradient of ℓ in the outputs, with targets drawn from the model's own distribution."""

    # -- what follows from it --

    @property
    def num_examples(self) -> int:
        """n, the size of axis 0 of the outputs, whatever the weights."""
        return self.outputs.shape[0]

    @property
    def examples(self) -> range:
        """Which of the examples that are run together it is of: all, unless other losses are of others."""
        return range(self.num_examples)

    def example_weights(self) -> Float[Array, " n"] | None:
        """The weights of the examples divided by their mean, or `None` if they are equal."""
        return self.weighting.example_weights(self.num_examples)

    def total_weight(self) -> Scalar:
        """How much this batch counts among batches of a data set.

        It is the denominator of the mean that the value is. So the mean of the values of all batches of a data set,
        weighted by it, is the value for the whole data set, however it was split.
        """
        return self.weighting.total(self.num_examples)

    def value(self) -> Scalar:
        """The scalar to be minimized."""
        losses = self.losses()
        total = jnp.sum(self.weighting.coefficients(losses.shape) * losses)
        return total / self.num_examples

    def gradient(self) -> Float[Array, "n ..."]:
        """The gradient of ℓ in the outputs, for the given targets."""
        return jax.grad(lambda f: jnp.sum(eqx.tree_at(lambda loss: loss.outputs, self, f).losses()))(self.outputs)

    def weigh(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Multiplies by the square root of the weights, since a curvature is a second moment."""
        return vector * jnp.sqrt(self.weighting.coefficients(vector.shape)).astype(vector.dtype)

    def __mul__(self, other: ArrayLike) -> "Loss":
        scale, factor = self.weighting.scale, jnp.asarray(other)
        if factor.ndim != 0:
            raise ValueError(
                f"A kfax Loss is multiplied by a single number, not by an array of shape {factor.shape}: give weights "
                "of examples to the function that makes the loss, as `weights=`."
            )
        if not is_traced(other) and not _is_weight(np.asarray(other)):
            raise ValueError(
                f"A kfax Loss is multiplied by numbers that are finite and not negative, got {other}: its "
                "curvature would be negative too. Add what is to be maximized as a `kfax.Penalty`, whose curvature is "
                "left out."
            )
        scale *= jnp.where(_is_weight(factor), factor, jnp.nan).astype(scale.dtype)
        return eqx.tree_at(lambda loss: loss.weighting.scale, self, scale)

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike) -> "Loss":
        return self * (1 / jnp.asarray(other))

    def __add__(self, other: Any) -> Any:
        raise TypeError(
            "A kfax Loss is not a number and is not added to: return a list of losses, with terms without curvature as "
            "`kfax.Penalty(value)`, or give an L2 term to the optimizer, `l2=`."
        )

    __radd__ = __add__

    def __str__(self) -> str:
        # Seen by those who print it, or differentiate a function that returns it.
        return f"{self!r}: a kfax Loss; the number is its `value()`"


class NaturalLoss(Loss):
    r"""The negative log-likelihood of a distribution whose natural parameters are the outputs.

    Then its Hessian in the outputs does not depend on the targets, and is the Fisher information as well:
    $H = F = S S^\top$.

    ??? cite "Source"
        Martens 2020, arXiv:1412.1193, section 9.2.
    """

    @abc.abstractmethod
    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`S v`: from the shape of the outputs to the shape of the outputs, unweighted."""

    @abc.abstractmethod
    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`Sᵀ u`: from the shape of the outputs to the shape of the outputs, unweighted."""

    def ggn_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor(vector)

    def ggn_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor_transpose(vector)

    def ggn_product(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor(self.factor_transpose(vector))

    def fisher_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor(vector)

    def fisher_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.factor_transpose(vector)


def check_outputs(name: str, outputs: Array) -> None:
    if not eqx.is_array(outputs) or not jnp.issubdtype(outputs.dtype, jnp.floating):
        got = outputs.dtype if eqx.is_array(outputs) else type(outputs).__name__
        raise ValueError(
            f"`{name}` takes the model's outputs as an array of real floating-point numbers, got {got}. "
            "Were the arguments swapped, or was `jnp.argmax` taken of the outputs?"
        )
    if outputs.ndim == 0:
        raise ValueError(
            f"`{name}` takes the outputs of a whole batch, with the examples on axis 0, but got a single number. "
            "Call the model as `jax.vmap(model)(inputs)`."
        )


def make_weighting(
    name: str,
    outputs: Float[Array, "n ..."],
    positions: tuple[int, ...],
    weights: ArrayLike | None,
    mask: ArrayLike | None,
    mean_over_positions: bool,
) -> Weighting:
    """Checks weights and mask. `positions` are the leading axes of the outputs, from the examples on."""
    num_examples = outputs.shape[0]
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    if weights is not None:
        given, weights = weights, array(f"`weights` of `{name}`", weights, dtype)
        if weights.shape != (num_examples,):
            raise ValueError(
                f"`weights` of `{name}` must have one number for each example, shape {(num_examples,)}, got "
                f"{weights.shape}. To leave out positions within an example use `mask`."
            )
        # Of what was given: within `jit` an array that is made of known numbers is traced.
        if not is_traced(given) and not np.all(_is_weight(np.asarray(given))):
            raise ValueError(
                f"`weights` of `{name}` must be finite and not negative. Of an example that is not to count it is 0."
            )
    if mask is not None:
        mask = array(f"`mask` of `{name}`", mask)
        if mask.dtype != jnp.bool_ or mask.ndim == 0 or mask.shape != positions[: mask.ndim]:
            raise ValueError(
                f"`mask` of `{name}` must be boolean, True where a position counts, and of shape {positions} or "
                f"{(num_examples,)}, got {mask.dtype} of shape {mask.shape}."
            )
    weighting = Weighting(weights, mask, jnp.ones((), dtype))
    if flag("mean_over_positions", mean_over_positions):
        # The mean is over all positions that count: the sum, divided by their (weighted) mean number in an example.
        counts = jnp.broadcast_to(weighting.coefficients(positions), positions)
        weighting = Weighting(weights, mask, weighting.scale, jnp.sum(counts) / num_examples)
    return weighting


def weigh_outputs(
    name: str,
    outputs: Float[Array, "n ..."],
    weights: ArrayLike | None,
    mask: ArrayLike | None,
    mean_over_positions: bool,
) -> tuple[Float[Array, "n ..."], Weighting]:
    """Checks weights and mask, and hides masked outputs so that not even a NaN among them has an effect."""
    positions = outputs.shape[:-1] if outputs.ndim > 1 else outputs.shape
    weighting = make_weighting(name, outputs, positions, weights, mask, mean_over_positions)
    return hide(outputs, weighting), weighting


def _is_weight(number: Any) -> Any:
    return (number >= 0) & (number < np.inf)


def hide(array: Array, weighting: Weighting) -> Array:
    """Zeros in place of what is masked."""
    mask = weighting.mask
    return array if mask is None else jnp.where(expand(mask, array), array, 0)


def expand(mask: Bool[Array, "..."], array: Array) -> Bool[Array, "..."]:
    """The mask of an array's leading axes, with ones for the others."""
    return mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))


def real_targets(
    name: str, targets: ArrayLike, outputs: Float[Array, "n ..."], weighting: Weighting, noun: str = "targets"
) -> Array:
    """Targets of the outputs' shape and dtype."""
    targets = array(f"`{noun}` of `{name}`", targets)
    if jnp.iscomplexobj(targets):
        raise ValueError(f"`{noun}` of `{name}` must be real numbers, got {targets.dtype}.")
    if targets.shape != outputs.shape:
        raise ValueError(
            f"`{noun}` of `{name}` must have the shape of the outputs, {outputs.shape}, got {targets.shape}."
        )
    return hide(targets.astype(outputs.dtype), weighting)
