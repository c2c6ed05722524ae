"""Embeddings."""

import equinox as eqx
from jaxtyping import Array, Int, PRNGKeyArray

from .._blocks import KroneckerFactored
from .._operations import Lookup, Operation
from .base import Blocks, check_wraps, Slots, TaggedLayer


class TaggedEmbedding(TaggedLayer):
    """An `equinox.nn.Embedding` whose curvature is estimated.

    Its matrix is `V = Wᵀ`, of shape `(embedding_size, num_embeddings)`, applied to one-hot vectors. Their second
    moment, the factor A, is diagonal: how often each entry occurs in an example. So nothing is ever as large as the
    square of the vocabulary. Of entries that do not occur the preconditioned gradient is zero.

    An embedding whose matrix is also that of an output head, tied by `equinox.nn.Shared`, has the block
    [`kfax.KroneckerSum`][]: [`kfax.tag`][] sees to it.
    """

    layer: eqx.nn.Embedding
    block: Blocks
    slots: Slots

    def __init__(self, layer: eqx.nn.Embedding, *, block: Blocks = KroneckerFactored()):
        """**Arguments:**

        - `layer`: the embedding to wrap.
        - `block`: how its curvature is approximated.

        **Raises:** `ValueError` for anything that is not an embedding or not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        check_wraps(self, eqx.nn.Embedding)

    def __call__(self, x: Int[Array, ""], *, key: PRNGKeyArray | None = None) -> Array:
        """As `equinox.nn.Embedding`: from an integer to `(embedding_size,)`."""
        return self.observe(self.layer(x, key=key), x)

    def operations(self) -> dict[str, Operation]:
        return {"": Lookup(self.layer.weight)}
