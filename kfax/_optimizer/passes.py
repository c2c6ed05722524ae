"""What a step runs: whole batches, a part of one, or one part after another."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._capture import Across, Linearization, mean_across, on_each, Problem
from .._estimators import CurvatureSource, ImplicitExactBatch, ImplicitExactCurvature, total_weight
from .._losses import Loss
from .._math.moving_average import MovingAverage
from .._math.types import ArrayTree, Counter, Parameters, PRNGKey, Scalar


class Fraction(eqx.Module):
    """A part of a batch: a slice of its examples, a different one each time it is used, until all had their turn.

    Examples are expected on axis 0 of all arrays of the batch. Where they are elsewhere, give a function
    `(batch, count) -> batch` of your own instead.

    **Fields:**

    - `share`: how large the part is, in (0, 1].
    """

    share: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"`share` of `kfax.Fraction` must be a number in (0, 1], got {self.share!r}.")

    def __call__(self, batch: Any, count: Counter) -> Any:
        """**Arguments:**

        - `batch`: a PyTree of arrays.
        - `count`: how often a part was taken before.

        **Returns:** the same PyTree with fewer examples.

        **Raises:** `ValueError` if its arrays do not agree on the number of examples.
        """
        total = _num_examples(batch, "`kfax.Fraction`")
        number = max(math.floor(total * self.share + 0.5), 1)
        start = jnp.minimum(count % -(-total // number) * number, total - number)

        def part(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, start, number) if eqx.is_array(leaf) else leaf

        return jax.tree.map(part, batch)


class PassResult(eqx.Module):
    """What came of one pass over a batch.

    **Fields:**

    - `means`: over the examples.
    - `weight`: how much the batch counts among others.
    - `model_state`: after the pass.
    - `aux`: what else `loss_fn` returned; stacked if the batch was run in parts.
    """

    means: ArrayTree
    weight: Scalar
    model_state: Any
    aux: Any


def over_micro_batches(
    problem: Problem,
    number: int,
    key: PRNGKey | None,
    run: Callable[[Problem, PRNGKey | None, Any], tuple[PassResult, Any]],
    carry: Any,
) -> tuple[PassResult, Any]:
    """Runs a problem's batch in a number of equal parts, one after the other.

    **Arguments:**

    - `problem`: with the whole batch.
    - `number`: of parts.
    - `key`: split among the parts, as that of the problem is.
    - `run`: `(problem, key, carry) -> (result, carry)` for one part. The model state is handed on.
    - `carry`: a PyTree of arrays.

    **Returns:** the result for all parts, its means weighted; and the last carry.
    """
    if number == 1:
        return _across(problem, *run(problem, key, carry))
    batches, rest = eqx.partition(_split(problem.batch, number), eqx.is_array)
    state, fixed = eqx.partition(problem.model_state, eqx.is_array)
    static = []

    def one(batch, keys, state, carry):
        batch, state = eqx.combine(batch, rest), eqx.combine(state, fixed)
        part = Problem(problem.loss_fn, problem.model, batch, keys[0], state, problem.frozen)
        result, carry = run(part, keys[1], carry)
        aux, others = eqx.partition(result.aux, eqx.is_array)
        static.append(others)
        return result.means, result.weight, eqx.filter(result.model_state, eqx.is_array), aux, carry

    def body(loop, xs):
        mean, state, carry = loop
        means, weight, state, aux, carry = one(xs[0], xs[1], state, carry)
        return (mean.update(means, jnp.ones(()), weight), state, carry), aux

    keys = tuple(None if k is None else jax.random.split(k, number) for k in (problem.key, key))
    first_batch, first_keys = jax.tree.map(lambda x: x[0], (batches, keys))
    means, weight, *_ = eqx.filter_eval_shape(one, first_batch, first_keys, state, carry)
    empty = MovingAverage(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means), jnp.zeros((), weight.dtype))
    start = on_each(problem.loss_fn, (empty, state, carry))
    (mean, state, carry), aux = jax.lax.scan(body, start, (batches, keys))
    result = PassResult(mean.value, mean.weight, eqx.combine(state, fixed), eqx.combine(aux, static[-1]))
    return _across(problem, result, carry)


def _across(problem: Problem, result: PassResult, carry: Any) -> tuple[PassResult, Any]:
    """The means over what all devices ran, if each has some of the examples."""
    means, weight = mean_across(problem.loss_fn, result.means, result.weight)
    return PassResult(means, weight, result.model_state, result.aux), carry


def gradient_of(
    problem: Problem,
    number: int,
    key: PRNGKey | None,
    linearize: Callable[[Problem], Linearization],
    measure: Callable[[Linearization, PRNGKey | None, Any], Any],
    measured: Any,
) -> tuple[PassResult, Any]:
    """Loss and gradient of a batch, and what is measured along the way.

    **Arguments:**

    - `problem`, `number`, `key`: as for `over_micro_batches`.
    - `linearize`: runs the model.
    - `measure`: `(linearization, key, measured) -> measured`, for each part.
    - `measured`: what `measure` starts from.
    """

    def run(problem, key, measured):
        linearization = linearize(problem)
        evaluation = linearization.evaluation
        means = {"loss": evaluation.value(), "gradient": linearization.gradient()}
        measured = measure(linearization, key, measured)
        weight = _weight(evaluation.losses, number)
        return PassResult(means, weight, evaluation.model_state, evaluation.aux), measured

    return over_micro_batches(problem, number, key, run, measured)


def loss_of(problem: Problem, number: int, parameters: Parameters) -> Scalar:
    """The loss of a batch at other parameters."""

    def run(problem, key, carry):
        del key
        evaluation = problem.evaluate(parameters)
        weight = _weight(evaluation.losses, number)
        return PassResult({"loss": evaluation.value()}, weight, evaluation.model_state, None), carry

    return over_micro_batches(problem, number, None, run, None)[0].means["loss"]


def gram_of(
    problem: Problem, number: int, source: CurvatureSource, directions: tuple[Parameters, ...]
) -> Float[Array, "k k"]:
    """The quadratic forms of the exact curvature of a batch."""
    exact = ImplicitExactCurvature(source)

    def gram(problem):
        state = exact.init(problem.model, frozen=problem.frozen)
        return exact.gram(exact.fold(state, ImplicitExactBatch(problem, None, None)), directions)

    if number == 1 and not isinstance(problem.loss_fn, Across):
        return gram(problem)

    def run(problem, key, carry):
        del key
        evaluation = problem.evaluate(problem.parameters)  # the same as is linearized for `gram`, and computed once
        means = {"gram": gram(problem)}
        return PassResult(means, total_weight(evaluation.losses), evaluation.model_state, None), carry

    return over_micro_batches(problem, number, None, run, None)[0].means["gram"]


def _weight(losses: tuple[Loss, ...], number: int) -> Scalar:
    """How much a part of a batch counts."""
    first, *others = (loss.weighting for loss in losses)

    def is_like_first(weighting):
        same = weighting.weights is first.weights and weighting.mask is first.mask
        return same and (weighting.positions is None) == (first.positions is None)

    if number > 1 and not all(map(is_like_first, others)):
        raise ValueError(
            "With `micro_batches` several losses must have the same `weights` and `mask` (the very same arrays), and "
            "the same `mean_over_positions`: each is a mean over the whole batch, in which a part counts as much as "
            "its weights, and so differently for each loss. Run the batch whole, or make them one loss."
        )
    return total_weight(losses)


def _split(batch: Any, number: int) -> Any:
    total = _num_examples(batch, f"`micro_batches={number}`")
    if total % number:
        raise ValueError(f"A batch of {total} examples cannot be split into `micro_batches={number}` equal parts.")

    def split(leaf):
        return leaf.reshape(number, total // number, *leaf.shape[1:]) if eqx.is_array(leaf) else leaf

    return jax.tree.map(split, batch)


def _num_examples(batch: Any, what: str) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(batch, eqx.is_array))
    sizes = {jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else 0 for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"`batch{path}`: {size}" for path, size in sizes.items())
        raise ValueError(
            f"{what} splits a batch along axis 0 of its arrays, which must be as long as there are examples, but the "
            f"lengths are {found}. Hand what does not belong to single examples to `loss_fn` in another way."
        )
    return next(iter(sizes.values()))
