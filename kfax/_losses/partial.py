"""Losses of different examples, as losses of all of them."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math.types import PRNGKey
from .base import Loss, Weighting


class PartialLoss(Loss):
    """A loss of some of the examples, in which those of other losses have weight zero. Made by `of_all_examples`.

    Value and curvature are those of the loss that it is made of.

    **Fields:**

    - `outputs`: of all examples: zeros where they are of other losses.
    - `weighting`: of all examples.
    - `loss`: that of its own examples, without their outputs.
    - `start`: where its own examples begin.
    - `length`: how many they are.
    """

    outputs: Float[Array, "n ..."]
    weighting: Weighting
    loss: Loss
    start: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    @property
    def examples(self) -> range:
        return range(self.start, self.start + self.length)

    def losses(self) -> Float[Array, "n ..."]:
        return self._spread(self._alone().losses())

    def ggn_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._apply(self._alone().ggn_factor, vector)

    def ggn_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._apply(self._alone().ggn_factor_transpose, vector)

    def ggn_product(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._apply(self._alone().ggn_product, vector)

    def fisher_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._apply(self._alone().fisher_factor, vector)

    def fisher_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._apply(self._alone().fisher_factor_transpose, vector)

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        return self._spread(self._alone().sampled_gradient(key))

    def _alone(self) -> Loss:
        return eqx.tree_at(lambda loss: loss.outputs, self.loss, self._own(self.outputs), is_leaf=lambda x: x is None)

    def _apply(self, function: Callable[[Array], Array], vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self._spread(function(self._own(vector)))

    def _own(self, array: Float[Array, "n ..."]) -> Float[Array, "own ..."]:
        return array[self.start : self.start + self.length]

    def _spread(self, array: Float[Array, "own ..."]) -> Float[Array, "n ..."]:
        return _spread(array, self.start, self.num_examples)


def of_all_examples(losses: tuple[Loss, ...]) -> tuple[Loss, ...]:
    """The losses, as losses of the same examples.

    Those of one number of examples have the same ones. If there are several numbers, the examples of each stand one
    after another, in the order in which the losses do.
    """
    numbers = tuple(dict.fromkeys(loss.num_examples for loss in losses))
    if len(numbers) == 1:
        return losses
    starts = dict(zip(numbers, itertools.accumulate(numbers, initial=0), strict=False))
    return tuple(_partial(loss, starts[loss.num_examples], sum(numbers)) for loss in losses)


def _partial(loss: Loss, start: int, total: int) -> PartialLoss:
    number, old = loss.num_examples, loss.weighting
    weights = old.weights
    if not old.is_weighted:
        weights = jnp.ones(number, old.scale.dtype)
    weights, mask = (None if x is None else _spread(x, start, total) for x in (weights, old.mask))
    weighting = Weighting(weights, mask, old.scale, old.positions)
    bare = eqx.tree_at(lambda loss: loss.outputs, loss, None)
    return PartialLoss(_spread(loss.outputs, start, total), weighting, bare, start, number)


def _spread(array: Array, start: int, total: int) -> Array:
    """Zeros before and after."""
    after = total - start - len(array)
    return jnp.pad(array, [(start, after), *[(0, 0)] * (array.ndim - 1)])
