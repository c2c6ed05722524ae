"""Which mapped axis enumerates the examples, and what is wrong where it cannot be told."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._math.types import Counter


@dataclasses.dataclass(frozen=True)
class ExampleAxis:
    """Which mapped axis enumerates the examples, and what to say when it cannot be found.

    **Fields:**

    - `name`: the `axis_name` of the `jax.vmap` over examples; `None` for the outermost mapped axis.
    - `sets`: the examples that are run together: all, or those of several losses apart.
    - `is_sum`: whether the statistic is a plain sum over rows. Together with a name that needs no particular size, so
        that the batch may be processed in parts.
    - `path`: the layer, for messages.
    - `paths`: all layers that are observed, for messages that are compiled once for all of them.
    """

    name: str | None
    sets: tuple[range, ...]
    is_sum: bool
    path: str
    paths: tuple[str, ...] = ()

    def marker(self) -> Counter | None:
        """An integer that is mapped over the named axis and no other."""
        if self.name is None:
            return None
        try:
            return jax.lax.axis_index(self.name)
        except NameError as error:
            raise ValueError(
                f"The layer at `{self.path}` was called where no axis is named {self.name!r}, which is the "
                f"`example_axis` given to the estimator. Write `jax.vmap(model, axis_name={self.name!r})` around the "
                "model, or leave `example_axis` out to use the outermost mapped axis."
            ) from error

    def in_reverse(self) -> str:
        """What is wrong where a derivative within the loss is more than forward mode."""
        return (
            f"`loss_fn` differentiates the layer at `{self.path}` in reverse mode (or by `jax.linearize`), in which it "
            "cannot be observed. Use `jax.jvp` or `jax.jacfwd`, nested for higher derivatives, not `jax.grad`, "
            "`jax.jacrev` or `jax.hessian`. If only a value is needed, as for an adversarial example, take that of "
            "`kfax.untag(model)`, with `jax.lax.stop_gradient`. `kfax.ImplicitExactCurvature()` has no such limit."
        )

    def of_all(self, message: Callable[["ExampleAxis"], str]) -> tuple[Array, tuple[str, ...]]:
        """The messages of all layers, to be compiled at once, after which of them is that of this one."""
        paths = self.paths or (self.path,)
        return jnp.asarray(paths.index(self.path)), tuple(message(dataclasses.replace(self, path=p)) for p in paths)

    def of(self, found: int | None) -> range | None:
        """Which examples there are on an axis of size `found`, if that tells."""
        every = range(self.sets[-1].stop)
        return next((each for each in (*self.sets, every) if len(each) == found), None)

    def fault(self, found: int | None) -> str | None:
        """What is wrong if the axis has size `found` (`None` if there is no such axis), or `None` if nothing is."""
        if self.of(found) is not None or (self.name is not None and found is not None and self.is_sum):
            return None
        size = " and ".join(str(len(each)) for each in self.sets)
        if self.name is not None:
            seen = f"sees {found or 'no'} examples at a time on the axis named {self.name!r}"
            return (
                f"The layer at `{self.path}` {seen}, but the Loss has {size}. Example weights and per-example "
                "statistics need all examples in one `jax.vmap` with that name: to save memory give kfax smaller "
                "batches instead of looping inside `loss_fn`."
            )
        seen = "is under no mapped axis" if found is None else f"has an outermost mapped axis of size {found}"
        return (
            f"The layer at `{self.path}` {seen}, but the Loss has {size} examples (axis 0 of its outputs). "
            'Name the axis of the examples: `jax.vmap(model, axis_name="batch")` in `loss_fn`, and '
            '`example_axis="batch"` for the estimator. If the outputs have their examples on another axis than 0, move '
            "it there with `jnp.moveaxis`."
        )
