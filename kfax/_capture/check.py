"""Whether everything that the model does with its weights was observed, and example by example."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from .._layers import Part, parts, to_matrices
from .._math.arguments import axis_name
from .._math.mesh import on_automatic_axes
from .._math.tree import inner_products, zeros_like
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

    For a random cotangent of the outputs, in which every example has a random weight, the gradient of each layer's
    weights is computed twice: by differentiating the model, and from the inputs and output cotangents that the layer's
    tag observed, weighted along the axis that is taken for that of the examples. They agree unless a weight is also
    used where its tag cannot see it (`model.embedding.weight.T`, a rescaled copy), or the axis is another one, or
    examples see each other. Curvature would then be wrong, and nothing would show it. Loss and gradient must also be
    finite. Costs a pass forward through the model and three backward, compiled; more only to find out what is wrong.
    Whether a block suits its layer shows when curvature is first estimated.

    **Arguments:** as for [`kfax.Optimizer`][] and its `init`, which calls this.

    **Returns:** nothing.

    **Raises:** `ValueError` naming the layer whose weight is used behind its tag's back, or around which the axis of
    the examples has to be named; or for a loss or gradient that is not finite, or for whatever is found wrong while the
    model is traced. Warns if examples see each other, for instance by negatives within the batch; not if they do by
    an `equinox.nn.BatchNorm` and the axis is named.
    """
    axis_name("example_axis", example_axis)
    check_observed(Problem(loss_fn, model, batch, key, model_state, frozen), example_axis)


@on_automatic_axes
def check_observed(problem: Problem, example_axis: str | None) -> None:
    """Whether loss and gradient are finite, and every use of a weight was observed, example by example."""
    value, is_finite, gaps, bare = _run(problem, example_axis, _random_weights, sums_magnitudes=False)
    _report_finite(problem, value, is_finite, gaps)
    if _differ(np.asarray(value, float), np.asarray(bare, float), value.dtype):
        raise ValueError(
            f"`loss_fn` gives {float(value):.6g} while kfax observes the layers, and {float(bare):.6g} otherwise: it "
            "computes with all arrays of the model, among which are those by which stacked layers are observed. Take "
            "`kfax.parameters_of(model)` in place of the model, or an `l2` of the optimizer."
        )
    if all(gap.is_rounding for gap in gaps.values()):
        return
    # A gradient that vanishes? Its terms tell, and take as long again to compile.
    gaps = _run(problem, example_axis, _random_weights, sums_magnitudes=True)[2]
    doubtful = {path: gap for path, gap in gaps.items() if not gap.is_rounding}
    if not doubtful:
        return
    # Why? Without weights the axis makes no difference: only what was not observed leaves a gap of the same order.
    plain = _run(problem, example_axis, np.ones, sums_magnitudes=True)[2]
    faults = [path for path in doubtful if not plain[path].is_rounding or _of_same_order(plain[path], doubtful[path])]
    _report_unobserved({path: float(plain[path].relative) for path in faults})
    whole = [path for path, gap in doubtful.items() if not gap.in_parts]  # where examples were seen all at once
    if whole:
        _report_examples(problem, example_axis, whole)


@dataclasses.dataclass(frozen=True)
class _Gap:
    """What differs between the two gradients of a layer.

    **Fields:**

    - `relative`: their relative distance.
    - `is_rounding`: whether rounding explains it.
    - `in_parts`: whether the layer saw the examples in parts, so that they could not be weighted.
    """

    relative: float
    is_rounding: bool
    in_parts: bool


def _run(
    problem: Problem, example_axis: str | None, weigh: Callable[[int], np.ndarray], sums_magnitudes: bool
) -> tuple[Array, dict[str, bool], dict[str, _Gap], Array]:
    """The loss, whether each layer's gradient is finite, how its two gradients differ, and the bare loss."""
    try:
        with jax.default_matmul_precision("highest"):  # or accelerators would round the rebuilt gradients to 10 bits
            results = eqx.filter_jit(_compare)(problem, example_axis, weigh, sums_magnitudes)
            value, finite, gaps, bare = jax.block_until_ready(results)
    except eqx.EquinoxRuntimeError as error:
        # A wrong example axis shows only when the computation runs (see `_slot`). The message alone is what matters.
        message = str(error).rpartition("EquinoxRuntimeError: ")[2].partition("\n\n---")[0]
        raise ValueError(message) from None
    paths = list(parts(problem.parameters))
    numbers = zip(*(np.asarray(field).tolist() for field in gaps), strict=True)
    is_finite = dict(zip(paths, np.asarray(finite).tolist(), strict=True))
    return value, is_finite, {path: _Gap(*each) for path, each in zip(paths, numbers, strict=True)}, bare


@on_automatic_axes
def check_values(problem: Problem) -> None:
    """Whether loss and gradient are finite."""
    _report_finite(problem, *eqx.filter_jit(lambda problem: _values(linearize(problem)))(problem), {})


def _of_same_order(plain: _Gap, weighted: _Gap) -> bool:
    return 4 * plain.relative > weighted.relative


def _report_finite(problem: Problem, value: Array, is_finite: Mapping[str, Any], gaps: dict[str, _Gap]) -> None:
    if not np.isfinite(value):
        raise ValueError(_not_finite_message(float(value), problem.batch, problem.model))
    finite = {path: is_finite[path] and (path not in gaps or np.isfinite(gaps[path].relative)) for path in is_finite}
    if not all(finite.values()):
        raise ValueError(
            f"The loss is finite, but its gradient in the parameters of {_named(p for p in finite if not finite[p])} "
            "is not: look for a square root, a logarithm or a division at zero after the layer or in the loss, also "
            "where its result is not used."
        )


def _report_unobserved(faults: dict[str, float]) -> None:
    if faults:
        worst = max(faults, key=lambda path: faults[path])
        others = f" (and also: {_named(path for path in faults if path != worst)})" if len(faults) > 1 else ""
        raise ValueError(
            f"The gradient of the layer at `{worst}`, rebuilt from the inputs and output cotangents that its tag "
            f"observed, is off by {100 * faults[worst]:.3g}%{others}. Its weights are also used behind its tag's back: "
            "for instance as raw `layer.weight`, as a rescaled copy, by `kfax.untag` inside `loss_fn`, or in calls "
            "that `kfax.masked` hides but the loss does not. Call the tagged layer wherever its weights are used, or "
            "wrap the module that uses them in a tagged layer of its own, or freeze it with `frozen=`. In a tagged "
            "layer that you wrote yourself `__call__` may miss an operation, `observe` it with another input than its "
            "own, or not go on with what `observe` returns."
        )


def _report_examples(problem: Problem, example_axis: str | None, paths: list[str]) -> None:
    """What is wrong where the rows that were observed for an example are not those that its loss depends on."""
    sees = _examples_see_each_other(problem)
    axis = "the outermost mapped axis" if example_axis is None else f"the axis named {example_axis!r}"
    remedy = (
        'Name the axis of the examples: `jax.vmap(model, axis_name="batch")` in `loss_fn`, and `example_axis="batch"` '
        "for the estimator."
    )
    losses = eqx.filter_eval_shape(lambda: problem.evaluate(problem.parameters).losses)
    numbers = [len(examples) for examples in dict.fromkeys(loss.examples for loss in losses)]
    if len(numbers) > 1 and not _has_batch_norm(problem.model):
        raise ValueError(
            f"The losses are of {' and '.join(map(str, numbers))} examples. So {_named(paths)} must see as many at a "
            "time, each for its own loss alone, but does not. Call the model for each loss apart, or leave examples "
            f"out of a loss by `weights` or `mask`. {remedy}"
        )
    if sees is False or (sees is None and example_axis is None):
        raise ValueError(
            f"Around {_named(paths)}, {axis} does not enumerate the examples, though it has as many elements; or the "
            f"layer computes the same for every example, and cannot see them. {remedy}"
        )
    if example_axis is not None and _has_batch_norm(problem.model):
        return  # which is what users expect of it, and what `coverage` says
    doubt = "" if example_axis is not None else f" Whether {axis} is theirs cannot be told by values then. {remedy}"
    warnings.warn(
        "Examples see each other, as in a batch normalization or by negatives within the batch: the blocks of "
        f"{_named(paths)} leave out what is between different examples, which exact estimators have.{doubt}",
        stacklevel=5,
    )


def _has_batch_norm(model: Model) -> bool:
    def is_norm(node):
        return isinstance(node, eqx.nn.BatchNorm)

    return any(map(is_norm, jax.tree.leaves(model, is_leaf=is_norm)))


def _named(paths: Iterable[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def _examples_see_each_other(problem: Problem) -> bool | None:
    """Whether outputs of the first half of the examples change with the second; `None` if there is no telling.

    Examples are expected on axis 0 of the arrays of the batch.
    """

    def outputs(problem):
        return tuple(loss.outputs for loss in problem.evaluate(problem.parameters).losses)

    number = eqx.filter_eval_shape(outputs, problem)[0].shape[0]
    half = (number + 1) // 2

    def is_of_examples(leaf):
        return eqx.is_array(leaf) and leaf.ndim > 0 and leaf.shape[0] == number

    if half == number or not any(map(is_of_examples, jax.tree.leaves(problem.batch))):
        return None
    repeated = jax.tree.map(
        lambda leaf: leaf[jnp.arange(number) % half] if is_of_examples(leaf) else leaf, problem.batch
    )
    run = eqx.filter_jit(outputs)
    pairs = zip(run(problem), run(dataclasses.replace(problem, batch=repeated)), strict=True)
    return any(_differ(np.asarray(x[:half], float), np.asarray(y[:half], float), x.dtype) for x, y in pairs)


def _differ(x: np.ndarray, y: np.ndarray, dtype: Any) -> bool:
    """By more than rounding in a different order."""
    scale = max(np.linalg.norm(x), np.linalg.norm(y))
    return bool(np.linalg.norm(x - y) > float(jnp.finfo(dtype).eps) ** 0.75 * scale)


def _random_weights(number: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 2, number)  # a constant of the program, in which every layer has it


def _values(linearization: Linearization) -> tuple[Array, dict[str, Bool[Array, ""]]]:
    """The loss, and for each array of parameters whether its gradient is finite. Of tagged models or others."""
    leaves = jax.tree_util.tree_leaves_with_path(linearization.gradient())
    return linearization.evaluation.value(), {
        jax.tree_util.keystr(path): jnp.all(jnp.isfinite(g)) for path, g in leaves
    }


def _compare(
    problem: Problem, example_axis: str | None, weigh: Callable[[int], np.ndarray], sums_magnitudes: bool
) -> tuple[Array, Bool[Array, " layers"], list[Shaped[Array, " layers"]], Array]:
    """The loss; whether each layer's gradient is finite; what differs between two of them; the bare loss.

    The two gradients are of random outputs, with the weights of examples that `weigh` makes. The bare loss is that of a
    model whose slots are empty, where some are leaves of it.
    """
    read = functools.partial(_read_gradient, weigh, sums_magnitudes)
    linearization = linearize(problem, read, example_axis=example_axis)
    losses = linearization.losses
    keys = jax.random.split(jax.random.key(0), len(losses))
    shapes = [loss.outputs for loss in losses]
    cotangents = tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True))
    weights = weigh(linearization.evaluation.num_examples)
    weighted = tuple(_by_example(weights, u) for u in cotangents)

    paths = list(parts(problem.parameters))

    def pull(before, cotangents):
        gradient, observed = linearization.pullback(cotangents)
        gradient = to_matrices(gradient)
        return gradient, _gaps([before[path] for path in paths], [observed[path] for path in paths])

    # One backward pass is compiled, and run with three cotangents. Gaps are between one and that before it.
    passes = (linearization.of_value(), linearization.at_outputs(weighted), linearization.at_outputs(cotangents))
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *passes)
    _, (finite, gaps) = jax.lax.scan(pull, to_matrices(zeros_like(problem.parameters)), stacked)
    value = linearization.evaluation.value()
    is_stacked = any(part.operation.shape().stack for part in parts(problem.parameters).values())
    bare = problem.evaluate(problem.parameters).value() if is_stacked else value
    return value, finite[1], [field[2] for field in gaps], bare


def _by_example(weights: np.ndarray, array: Array) -> Array:
    return array * weights.reshape(-1, *(1,) * (array.ndim - 1)).astype(array.dtype)


def _read_gradient(
    weigh: Callable[[int], np.ndarray], sums_magnitudes: bool, part: Part, num_examples: int, is_only: bool
) -> Reading:
    """Reads the gradient of V by the observed rows, and what `_gaps` asks besides."""
    shape = part.operation.shape()
    dtype = shape.statistics_dtype

    def read(operation, x, dy, context):
        gradient = operation.gradient(x, dy, context).astype(dtype)
        missing = shape.d_a - gradient.shape[-1]
        return jnp.pad(gradient, [(0, 0)] * (gradient.ndim - 1) + [(0, missing)])

    def statistic(operation, use):
        in_parts = use.examples is None
        weights = np.ones(use.num_examples) if use.examples is None else weigh(num_examples)[use.examples]
        dy = jax.tree.map(lambda leaf: _by_example(weights, leaf), use.dy)
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (use.x, dy))
        dtypes = [shape.dtype, *(leaf.dtype for leaf in jax.tree.leaves(rows) if _is_float(leaf))]
        coarsest = max(jnp.finfo(each).eps for each in dtypes)
        all_rows = [rows]
        if sums_magnitudes:
            all_rows.append(jax.tree.map(lambda leaf: jnp.abs(leaf) if _is_float(leaf) else leaf, rows))
        gradients = [read(operation, x, dy, use.context) for x, dy in all_rows]
        return gradients, jnp.asarray(coarsest, dtype), jnp.asarray(in_parts, dtype)

    zeros, count = jnp.zeros((*shape.leading, shape.d_g, shape.d_a), dtype), jnp.zeros(shape.stack, dtype)
    return Reading(([zeros] * (1 + sums_magnitudes), count, count), statistic, is_sum=True)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _gaps(true: list[Array], observed: list[Any]) -> tuple[Bool[Array, " layers"], list[Shaped[Array, " layers"]]]:
    """For each layer whether the first gradient is finite; and of two of them the fields of `_Gap`.

    A sum of products of rounded numbers is off by about `resolution` (of which there is one for each use, added up)
    times the sum of their magnitudes, where it was summed; that alone matters where the gradient vanishes. What lies
    between the two is rounded too, and by more than that: hence the generous share of the gradient itself.
    """
    gradients, resolutions, in_parts = map(list, zip(*observed, strict=True))
    rebuilt, *magnitudes = map(list, zip(*gradients, strict=True))
    true = [x.astype(y.dtype) for x, y in zip(true, rebuilt, strict=True)]
    differences = [x - y for x, y in zip(true, rebuilt, strict=True)]
    vectors = (true, rebuilt, differences, *magnitudes)
    squares, sizes = inner_products(vectors, [(i, i) for i in range(len(vectors))], measured=[0])
    ours, theirs, distance, *totals = jnp.sqrt(squares).T
    total = sum(totals, jnp.zeros(()))
    largest = jnp.maximum(ours, theirs)
    resolution = jnp.stack([jnp.max(each).astype(squares.dtype) for each in resolutions])
    # Of functions that are not defined for absolute values, nothing.
    allowed = resolution**0.375 * largest + 8 * resolution * jnp.where(jnp.isfinite(total), total, 0)
    relative = distance / jnp.where(largest > 0, largest, 1)
    return jnp.isfinite(sizes[:, 0]), [
        relative,
        distance <= allowed,
        jnp.stack([jnp.any(each > 0) for each in in_parts]),
    ]


def _not_finite_message(value: float, batch: Any, model: Model) -> str:
    def culprits(tree, name):
        leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
        return [f"`{name}{jax.tree_util.keystr(p)}`" for p, x in leaves if not bool(jnp.all(jnp.isfinite(x)))]

    found = culprits(batch, "batch") + culprits(model, "model")
    if found:
        reason = f"There are NaNs or infinities in {', '.join(found)}: remove or mask them."
    else:
        reason = (
            "Batch and model are finite: look for labels outside the range of classes, for negative weights of "
            "examples, for a division by zero in the model, or for an overflow of half precision."
        )
    return f"The loss is {value} at the initial parameters. {reason}"
