"""What kfax needs to know of a loss: its value, and its curvature in the model's outputs."""

import abc

import equinox as eqx
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, ArrayLike, Bool, Float

from .._types import PRNGKey, Scalar


class Weighting(eqx.Module):
    """How the losses of all examples and positions are put together.

    $$h = \\frac{c}{\\sum_n w_n} \\sum_n w_n \\sum_p m_{np} \\ell_{np}$$

    An example with no unmasked position at all has weight zero.

    **Fields:**

    - `weights`: `(n,)`, or `None` for equal weights.
    - `mask`: over examples and positions, or `None` if all count.
    - `scale`: c.
    """

    weights: Float[Array, " n"] | None = None
    mask: Bool[Array, "n ..."] | None = None
    scale: Scalar = eqx.field(default_factory=lambda: jnp.ones(()))

    @property
    def is_weighted(self) -> bool:
        """Whether some examples or positions may count differently from others."""
        return self.weights is not None or self.mask is not None

    def example_weights(self, num_examples: int) -> Float[Array, " n"] | None:
        """The weights divided by their mean, or `None` if they are equal."""
        if not self.is_weighted:
            return None
        weights = jnp.ones(num_examples, self.scale.dtype) if self.weights is None else self.weights
        if self.mask is not None:
            weights = weights * jnp.any(self.mask.reshape(num_examples, -1), axis=1)
        mean = jnp.mean(weights)
        return jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1), 0)

    def coefficients(self, shape: tuple[int, ...]) -> Float[Array, "n ..."]:
        """The factor, relative to 1/n, with which each example and position counts; broadcasts against `shape`."""
        weights = self.example_weights(shape[0])
        coefficients = self.scale * (jnp.ones(1, self.scale.dtype) if weights is None else weights)
        ndim = len(shape) if self.mask is None else self.mask.ndim
        coefficients = coefficients.reshape(-1, *(1,) * (ndim - 1))
        if self.mask is not None:
            coefficients = coefficients * self.mask
        return coefficients.reshape(*coefficients.shape, *(1,) * (len(shape) - coefficients.ndim))


class Loss(eqx.Module):
    r"""The outputs of a model on a batch, and what is to be made of them.

    Its value is the (weighted) mean over the examples, axis 0 of the outputs, of the losses ℓ_n; over any further axes
    of positions the losses are summed. The loss is the negative log-likelihood of a distribution whose natural
    parameters are the outputs, so that its Hessian in the outputs, $H = S S^\top$, does not depend on the targets and
    is the Fisher information as well. Multiply a loss by a number to weigh it against others.
    """

    outputs: AbstractVar[Float[Array, "n ..."]]
    weighting: AbstractVar[Weighting]

    # -- what a loss defines, for each example and position alone --

    @abc.abstractmethod
    def losses(self) -> Float[Array, "n ..."]:
        """ℓ for each example and position, unweighted; may keep the outputs' last axis, to be summed."""

    @abc.abstractmethod
    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`S v`: from the shape of the outputs to the shape of the outputs, unweighted."""

    @abc.abstractmethod
    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`Sᵀ u`: from the shape of the outputs to the shape of the outputs, unweighted."""

    @abc.abstractmethod
    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        """The gradient of ℓ in the outputs, unweighted, with targets drawn from the model's own distribution."""

    # -- what follows from it --

    @property
    def num_examples(self) -> int:
        """n, the size of axis 0 of the outputs, whatever the weights."""
        return self.outputs.shape[0]

    def example_weights(self) -> Float[Array, " n"] | None:
        """The weights of the examples divided by their mean, or `None` if they are equal."""
        return self.weighting.example_weights(self.num_examples)

    def value(self) -> Scalar:
        """The scalar to be minimized."""
        losses = self.losses()
        total = jnp.sum(self.weighting.coefficients(losses.shape) * losses)
        return total / self.num_examples

    def multiply_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`S v` with weights: the sum over a basis of v of the outer products of the result is `n ∂²h/∂outputs²`."""
        return self.weigh(self.factor(vector))

    def multiply_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`Sᵀ u` with weights: the adjoint of `multiply_factor`."""
        return self.factor_transpose(self.weigh(vector))

    def sampled_cotangent(self, key: PRNGKey) -> Float[Array, "n ..."]:
        """A random vector whose second moment is `n ∂²h/∂outputs²`: the gradient for sampled targets, weighted."""
        return self.weigh(self.sampled_gradient(key))

    def weigh(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Multiplies by the square root of the weights, since a curvature is a second moment."""
        return vector * jnp.sqrt(self.weighting.coefficients(vector.shape)).astype(vector.dtype)

    def __mul__(self, other: ArrayLike) -> "Loss":
        scale = self.weighting.scale
        return eqx.tree_at(lambda loss: loss.weighting.scale, self, scale * jnp.asarray(other, scale.dtype))

    __rmul__ = __mul__


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


def weigh_outputs(
    name: str,
    outputs: Float[Array, "n ..."],
    weights: ArrayLike | None,
    mask: ArrayLike | None,
    mean_over_positions: bool,
) -> tuple[Float[Array, "n ..."], Weighting]:
    """Checks weights and mask, and hides masked outputs so that not even a NaN among them has an effect."""
    num_examples = outputs.shape[0]
    positions = outputs.shape[:-1] if outputs.ndim > 1 else outputs.shape
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    if weights is not None:
        weights = jnp.asarray(weights, dtype)
        if weights.shape != (num_examples,):
            raise ValueError(
                f"`weights` of `{name}` must have one number for each example, shape {(num_examples,)}, got "
                f"{weights.shape}. To leave out positions within an example use `mask`."
            )
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_ or mask.ndim == 0 or mask.shape != positions[: mask.ndim]:
            raise ValueError(
                f"`mask` of `{name}` must be boolean, True where a position counts, and of shape {positions} or "
                f"{(num_examples,)}, got {mask.dtype} of shape {mask.shape}."
            )
        outputs = jnp.where(mask.reshape(*mask.shape, *(1,) * (outputs.ndim - mask.ndim)), outputs, 0)
    weighting = Weighting(weights, mask, jnp.ones((), dtype))
    if mean_over_positions:
        # The mean is over all positions that count: the sum, divided by their (weighted) mean number in an example.
        counts = jnp.broadcast_to(weighting.coefficients(positions), positions)
        number = jnp.sum(counts) / num_examples
        weighting = eqx.tree_at(lambda w: w.scale, weighting, jnp.where(number > 0, 1 / number, 0))
    return outputs, weighting


def hide(targets: Array, weighting: Weighting) -> Array:
    """Zeros in place of masked targets."""
    if weighting.mask is None:
        return targets
    mask = weighting.mask
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (targets.ndim - mask.ndim)), targets, 0)


def real_targets(name: str, targets: ArrayLike, outputs: Float[Array, "n ..."], weighting: Weighting) -> Array:
    """Targets of the outputs' shape and dtype."""
    targets = jnp.asarray(targets)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"`targets` of `{name}` must have the shape of the outputs, {outputs.shape}, got {targets.shape}."
        )
    return hide(targets.astype(outputs.dtype), weighting)
