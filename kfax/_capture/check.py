"""Whether everything that the model does with its weights was observed."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._layers import Part, to_matrices
from .._math.types import Model, PRNGKey, Where
from .linearize import Linearization, linearize, Problem, Reading


def check(
    loss_fn: Callable,
    model: Model,
    batch: Any,
    *,
    key: PRNGKey | None = None,
    model_state: Any = None,
    example_axis: str | None = None,
    frozen: Where | None = None,
) -> None:
    """Checks a tagged model against a loss function, on one batch.

    For a random cotangent of the outputs the gradient of each layer's weights is computed twice: by differentiating
    the model, and from the inputs and output cotangents that the layer's tag observed. They agree unless a weight is
    also used where its tag cannot see it (`model.embedding.weight.T`, a rescaled copy). Curvature would then be
    wrong, and nothing would show it. Loss and gradient must also be finite. Costs a pass forward through the model and
    two backward, compiled. Whether a block suits its layer shows when curvature is first estimated.

    **Arguments:** as for [`kfax.Optimizer`][] and its `init`, which calls this.

    **Returns:** nothing.

    **Raises:** `ValueError` naming the layer whose weight is used behind its tag's back, or for a loss or gradient that
    is not finite, or for whatever is found wrong while the model is traced.
    """
    check_observed(Problem(loss_fn, model, batch, key, model_state, frozen), example_axis)


def check_observed(problem: Problem, example_axis: str | None) -> None:
    """Whether loss and gradient are finite, and every use of a weight was observed."""
    try:
        with jax.default_matmul_precision("highest"):  # or accelerators would round the rebuilt gradients to 10 bits
            found = jax.block_until_ready(eqx.filter_jit(_compare)(problem, example_axis))
    except eqx.EquinoxRuntimeError as error:
        # A wrong example axis shows only when the computation runs (see `_slot`). The message alone is what matters.
        message = str(error).rpartition("EquinoxRuntimeError: ")[2].partition("\n\n---")[0]
        raise ValueError(message) from None
    _report(problem, *found)


def check_values(problem: Problem) -> None:
    """Whether loss and gradient are finite."""
    _report(problem, *eqx.filter_jit(lambda problem: _values(linearize(problem)))(problem), {})


def _report(problem: Problem, value: Array, is_finite: dict[str, Array], gaps: dict[str, Array]) -> None:
    if not np.isfinite(value):
        raise ValueError(_not_finite_message(float(value), problem.batch, problem.model))
    faults = {path: float(gap) for path, gap in gaps.items() if gap != 0}
    undefined = [f"`{path}`" for path in is_finite if not is_finite[path] or not np.isfinite(faults.get(path, 0))]
    if undefined:
        raise ValueError(
            f"The loss is finite, but its gradient in the parameters of {', '.join(undefined)} is not: look for a "
            "square root, a logarithm or a division at zero after the layer or in the loss, also where its result is "
            "not used."
        )
    if faults:
        worst = max(faults, key=lambda path: faults[path])
        others = f" (and also: {', '.join(f'`{path}`' for path in faults if path != worst)})" if len(faults) > 1 else ""
        raise ValueError(
            f"The gradient of the layer at `{worst}`, rebuilt from the inputs and output cotangents that its tag "
            f"observed, is off by {100 * faults[worst]:.3g}%{others}. Its weights are also used behind its tag's back: "
            "for instance as raw `layer.weight`, as a rescaled copy, by `kfax.untag` inside `loss_fn`, or in calls "
            "that `kfax.masked` hides but the loss does not. Call the tagged layer wherever its weights are used, or "
            "wrap the module that uses them in a tagged layer of its own, or freeze it with `frozen=`. In a tagged "
            "layer that you wrote yourself `__call__` may miss an operation, `observe` it with another input than its "
            "own, or not go on with what `observe` returns."
        )


def _values(linearization: Linearization) -> tuple[Array, dict[str, Bool[Array, ""]]]:
    """The loss, and for each layer whether its gradient is finite."""
    gradients = to_matrices(linearization.gradient())
    return linearization.evaluation.value(), {path: jnp.all(jnp.isfinite(g)) for path, g in gradients.items()}


def _compare(
    problem: Problem, example_axis: str | None
) -> tuple[Array, dict[str, Bool[Array, ""]], dict[str, Float[Array, ""]]]:
    """`_values`, and for each layer the relative gap between the two gradients, or zero if within rounding."""
    linearization = linearize(problem, _read_gradient, example_axis=example_axis)
    losses = linearization.losses
    keys = jax.random.split(jax.random.key(0), len(losses))
    shapes = [loss.outputs for loss in losses]
    cotangents = tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True))
    gradient, observed = linearization.pull(cotangents)
    true = to_matrices(gradient)
    return *_values(linearization), {path: _gap(true[path], *observed[path]) for path in observed}


def _read_gradient(part: Part, num_examples: int) -> Reading:
    """Reads the gradient of V by the observed rows, that of their absolute values, and how coarse the numbers are."""
    del num_examples
    shape = part.operation.shape()
    dtype = shape.statistics_dtype

    def read(operation, x, dy, context):
        gradient = operation.gradient(x, dy, context).astype(dtype)
        missing = shape.d_a - gradient.shape[-1]
        return jnp.pad(gradient, [(0, 0)] * (gradient.ndim - 1) + [(0, missing)])

    def statistic(operation, use):
        x, dy = rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (use.x, use.dy))
        abs_x, abs_dy = jax.tree.map(lambda leaf: jnp.abs(leaf) if _is_float(leaf) else leaf, rows)
        dtypes = [shape.dtype, *(leaf.dtype for leaf in jax.tree.leaves(rows) if _is_float(leaf))]
        coarsest = max(jnp.finfo(each).eps for each in dtypes)
        return (
            read(operation, x, dy, use.context),
            read(operation, abs_x, abs_dy, use.context),
            jnp.asarray(coarsest, dtype),
        )

    zeros = jnp.zeros((*shape.leading, shape.d_g, shape.d_a), dtype)
    return Reading((zeros, zeros, jnp.zeros(shape.stack, dtype)), statistic, is_sum=True)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _gap(true: Array, observed: Array, magnitude: Array, resolution: Array) -> Float[Array, ""]:
    """The relative distance, or zero where rounding explains it.

    A sum of products of rounded numbers is off by about `resolution` (of which there is one for each use, added up)
    times the sum of their magnitudes; that alone matters where the gradient vanishes. What lies between the two is
    rounded too, and by more than that: hence the generous share of the gradient itself.
    """
    resolution = jnp.max(resolution)
    largest = jnp.maximum(jnp.linalg.norm(true), jnp.linalg.norm(observed))
    distance = jnp.linalg.norm(true - observed)
    total = jnp.linalg.norm(magnitude)  # of functions that are not defined for absolute values, nothing
    allowed = resolution**0.375 * largest + 8 * resolution * jnp.where(jnp.isfinite(total), total, 0)
    return jnp.where(distance <= allowed, 0, distance / jnp.where(largest > 0, largest, 1))


def _not_finite_message(value: float, batch: Any, model: Model) -> str:
    def culprits(tree, name):
        leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
        return [f"`{name}{jax.tree_util.keystr(p)}`" for p, x in leaves if not bool(jnp.all(jnp.isfinite(x)))]

    found = culprits(batch, "batch") + culprits(model, "model")
    if found:
        reason = f"There are NaNs or infinities in {', '.join(found)}: remove or mask them."
    else:
        reason = (
            "Batch and model are finite: look for labels outside the range of classes, for a division by zero in the "
            "model, or for an overflow of half precision."
        )
    return f"The loss is {value} at the initial parameters. {reason}"
