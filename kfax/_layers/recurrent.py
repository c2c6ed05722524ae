"""Recurrent cells, written out so that each matrix can be observed."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._blocks import KroneckerFactored
from .._operations import Dense, Operation
from .base import Blocks, check_wraps, Slots, TaggedLayer


class TaggedGRUCell(TaggedLayer):
    """An `equinox.nn.GRUCell` whose curvature is estimated.

    Its operations are `"input"` (`[weight_ih bias]`), `"hidden"` (`weight_hh`) and `"candidate"` (`bias_n`, which
    acts on the last third of the hidden gates alone), each with a block. Time is an axis of shared positions.
    """

    layer: eqx.nn.GRUCell
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.GRUCell, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the cell to wrap.
        - `block`: how its curvature is approximated: one for all operations, or one for each by name.

        **Raises:** `ValueError` for anything that is not a GRU cell or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.GRUCell)

    def __call__(
        self,
        input: Float[Array, " input_size"],
        hidden: Float[Array, " hidden_size"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " hidden_size"]:
        """As `equinox.nn.GRUCell`: the next hidden state."""
        cell = self.layer
        if self.slots is None:
            return cell(input, hidden, key=key)
        from_input, from_hidden = cell.weight_ih @ input, cell.weight_hh @ hidden
        if cell.bias is not None:
            from_input = from_input + cell.bias
        i_reset, i_update, i_new = jnp.split(self.observe(from_input, input, "input"), 3)
        h_reset, h_update, h_new = jnp.split(self.observe(from_hidden, hidden, "hidden"), 3)
        if cell.bias_n is not None:
            h_new = self.observe(h_new + cell.bias_n, hidden, "candidate")
        reset, update = jax.nn.sigmoid(i_reset + h_reset), jax.nn.sigmoid(i_update + h_update)
        new = jnp.tanh(i_new + reset * h_new)
        return new + update * (hidden - new)

    def operations(self) -> dict[str, Operation]:
        cell = self.layer
        return {
            "input": Dense(cell.weight_ih, cell.bias),
            "hidden": Dense(cell.weight_hh),
            "candidate": Dense(None, cell.bias_n),
        }


class TaggedLSTMCell(TaggedLayer):
    """An `equinox.nn.LSTMCell` whose curvature is estimated.

    Its operations are `"input"` (`[weight_ih bias]`) and `"hidden"` (`weight_hh`), each with a block. Time is an axis
    of shared positions.
    """

    layer: eqx.nn.LSTMCell
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.LSTMCell, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the cell to wrap.
        - `block`: how its curvature is approximated: one for both operations, or one for each by name.

        **Raises:** `ValueError` for anything that is not an LSTM cell or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.LSTMCell)

    def __call__(
        self,
        input: Float[Array, " input_size"],
        hidden: tuple[Float[Array, " hidden_size"], Float[Array, " hidden_size"]],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, " hidden_size"], Float[Array, " hidden_size"]]:
        """As `equinox.nn.LSTMCell`: the next hidden and cell state."""
        cell = self.layer
        if self.slots is None:
            return cell(input, hidden, key=key)
        h, c = hidden
        from_input = cell.weight_ih @ input
        if cell.bias is not None:
            from_input = from_input + cell.bias
        gates = self.observe(from_input, input, "input") + self.observe(cell.weight_hh @ h, h, "hidden")
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def operations(self) -> dict[str, Operation]:
        return {"input": Dense(self.layer.weight_ih, self.layer.bias), "hidden": Dense(self.layer.weight_hh)}
