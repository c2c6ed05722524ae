"""Dense layers."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._blocks import KroneckerFactored
from .._operations import Dense, Operation
from .base import Blocks, check_wraps, Slots, TaggedLayer


class TaggedLinear(TaggedLayer):
    """An `equinox.nn.Linear` whose curvature is estimated.

    Its matrix is `V = [W b]`, of shape `(out_features, in_features + 1)`; `W` or `b` alone if the other is frozen or
    absent. A stack of dense layers made by `equinox.filter_vmap` is a stack of matrices.
    """

    layer: eqx.nn.Linear
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.Linear, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the dense layer to wrap.
        - `block`: how its curvature is approximated.

        **Raises:** `ValueError` for anything that is not a dense layer or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.Linear)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.Linear`: from `(in_features,)` to `(out_features,)`."""
        del key
        expected = () if self.layer.in_features == "scalar" else (self.layer.in_features,)
        if self.layer.weight is not None and self.layer.weight.ndim != 2:
            raise ValueError(
                "This is a stack of `equinox.nn.Linear`, as `equinox.filter_vmap` makes it for an ensemble: call it "
                "under `equinox.filter_vmap` too, or one after the other in `jax.lax.scan`."
            )
        if jnp.shape(x) != expected:
            raise ValueError(
                f"This `equinox.nn.Linear` takes one example, an array of shape {expected}, but was called with one of "
                f"shape {jnp.shape(x)}. Several examples or positions are mapped over: `jax.vmap(model)(inputs)`."
            )
        return self.layer(x) if self.slots is None else self.observe(_apply(self.layer, x), x)

    def operations(self) -> dict[str, Operation]:
        return {"": Dense(self.layer.weight, self.layer.bias)}


def _apply(layer: eqx.nn.Linear, x: Array) -> Array:
    """What the layer computes, up to rounding, with the axes of its product in an order in which mapped ones are first.

    In its own `weight @ x` a mapped axis comes last, and has to be moved: after two `jax.vmap`s XLA's CPU compiler
    transposes in every pass.
    """
    if type(layer) is not eqx.nn.Linear or "scalar" in (layer.in_features, layer.out_features):
        return layer(x)
    y = jnp.tensordot(x, layer.weight, axes=(0, 1))
    return y if layer.bias is None else y + layer.bias
