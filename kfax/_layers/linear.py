"""Dense layers."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from .._blocks import Block, KroneckerFactored, MatrixShape, Rows
from .._fold import observe, Slot
from .base import TaggedLayer


class TaggedLinear(TaggedLayer):
    """An `equinox.nn.Linear` whose curvature is estimated.

    Its matrix is `V = [W b]`, of shape `(out_features, in_features + 1)`; `W` or `b` alone if the other is frozen or
    absent. Whatever reads `weight`, `bias`, `in_features`, `out_features` or `use_bias` of the dense layer can read
    them here. A stack of dense layers made by `equinox.filter_vmap` is a stack of matrices.
    """

    layer: eqx.nn.Linear
    block: Block
    slot: Slot | None

    def __init__(self, layer: eqx.nn.Linear, *, block: Block = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the dense layer to wrap.
        - `block`: how its curvature is approximated.

        **Raises:** `ValueError` for anything that is not a dense layer or not a block.
        """
        if not isinstance(layer, eqx.nn.Linear):
            raise ValueError(f"`TaggedLinear` wraps an `equinox.nn.Linear`, got {type(layer).__name__}.")
        if not isinstance(block, Block):
            raise ValueError(f"`block` must be a block, such as `kfax.KroneckerFactored()`, got {block!r}.")
        self.layer = layer
        self.block = block
        self.slot = None

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.Linear`: from `(in_features,)` to `(out_features,)`."""
        return observe(self.layer(x, key=key), x, self.slot)

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def bias(self) -> Any:
        return self.layer.bias

    @property
    def in_features(self) -> Any:
        return self.layer.in_features

    @property
    def out_features(self) -> Any:
        return self.layer.out_features

    @property
    def use_bias(self) -> bool:
        return self.layer.use_bias

    def shape(self) -> MatrixShape:
        weight, bias = self.layer.weight, self.layer.bias
        if weight is not None:
            *stack, num_outputs, num_inputs = weight.shape
            return MatrixShape(tuple(stack), num_outputs, num_inputs, bias is not None, weight.dtype)
        assert bias is not None
        *stack, num_outputs = bias.shape
        return MatrixShape(tuple(stack), num_outputs, 0, True, bias.dtype)

    def rows(self, x: Array, dy: Array) -> Rows:
        num_examples, num_positions = dy.shape[:2]
        inputs = x.reshape(num_examples, num_positions, -1)
        if self.layer.weight is None:
            inputs = inputs[..., :0]
        return Rows(inputs, dy.reshape(num_examples, num_positions, -1))

    def to_matrix(self) -> Shaped[Array, "*stack d_g d_a"]:
        weight, bias = self.layer.weight, self.layer.bias
        columns = [] if weight is None else [weight]
        if bias is not None:
            columns.append(bias[..., None])
        return jnp.concatenate(columns, axis=-1)

    def from_matrix(self, matrix: Float[Array, "*stack d_g d_a"]) -> "TaggedLinear":
        layer = self.layer
        if layer.bias is not None:
            layer = eqx.tree_at(lambda m: m.bias, layer, matrix[..., -1])
        if layer.weight is not None:
            layer = eqx.tree_at(lambda m: m.weight, layer, matrix[..., : self.shape().num_inputs])
        return eqx.tree_at(lambda tagged: tagged.layer, self, layer)
