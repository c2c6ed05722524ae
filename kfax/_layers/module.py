"""Any module as one layer."""

from typing import Any

import equinox as eqx
import jax

from .._math.types import PyTree
from .._operations import Arbitrary, Invocation, Operation
from .base import Blocks, Slots, TaggedLayer


class TaggedModule(TaggedLayer, eqx.nn.StatefulLayer):
    """Any module whose curvature is estimated, by the gradients of single examples.

    For parameters that fit no pattern: a learned query or position table, a reparametrized weight, a spline. All
    parameters of the module form one row, `V` of shape `(1, P)`. Their gradients are computed by running the module
    once more for each example, in an update of the curvature and in [`kfax.check`][]; an update takes memory for
    P numbers of each example.

    The module must not call collective operations such as `jax.lax.pmean` (a `BatchNorm`, for instance). To have it
    stacked by `equinox.filter_vmap`, tag it inside the function that is mapped.
    """

    layer: Any
    block: Blocks
    slots: Slots
    ndims: tuple[tuple[str, int], ...] = eqx.field(static=True)  # of each parameter by path

    def __init__(self, layer: Any, *, block: Blocks):
        """**Arguments:**

        - `layer`: the module to wrap, called with any arguments, returning any PyTree of arrays.
        - `block`: how its curvature is approximated: [`kfax.Diagonal`][] or, for few parameters, [`kfax.Full`][].

        **Raises:** `ValueError` for something that has no parameters or cannot be called, or that is not a block.
        """
        self.layer, self.block, self.slots = layer, block, None
        arrays = jax.tree_util.tree_leaves_with_path(eqx.filter(layer, eqx.is_inexact_array))
        self.ndims = tuple((jax.tree_util.keystr(path), leaf.ndim) for path, leaf in arrays)
        if not callable(layer) or not self.ndims:
            raise ValueError(f"`TaggedModule` wraps a module with parameters that can be called, got {layer!r}.")

    def __call__(self, *args: Any, **options: Any) -> PyTree:
        """As the module itself."""
        if self.slots is None:
            return self.layer(*args, **options)
        inputs = args, options
        # A state can be used once; a copy of the tree is another one.
        args, options = jax.tree.map(lambda leaf: leaf, inputs)
        out = self.layer(*args, **options)
        arrays, static = eqx.partition(self.layer, eqx.is_array)
        inputs, fixed = eqx.partition(inputs, eqx.is_array)

        def function(arrays, inputs):
            args, options = eqx.combine(inputs, fixed)
            return eqx.filter(eqx.combine(arrays, static)(*args, **options), eqx.is_inexact_array)

        return self.observe(out, inputs, context=Invocation(arrays, function))

    def is_stateful(self) -> bool:
        """Whether `equinox.nn.Sequential` is to give the module its state."""
        return isinstance(self.layer, eqx.nn.StatefulLayer) and self.layer.is_stateful()

    def operations(self) -> dict[str, Operation]:
        ndims = dict(self.ndims)
        parameters = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if jax.tree_util.keystr(path) in ndims else None, self.layer
        )
        stack = ()
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
            if hasattr(leaf, "shape"):  # and is not a number in place of an array
                stack = leaf.shape[: leaf.ndim - ndims[jax.tree_util.keystr(path)]]
        return {"": Arbitrary(parameters, stack)}
