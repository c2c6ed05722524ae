"""Influence functions: what a training example does to a prediction."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._blocks import Diagonal
from .._capture import linearize, Problem, Reading, split_key
from .._estimators import CurvatureEstimator, total_weight
from .._layers import from_matrices, Part, split_parameters, to_matrices
from .._math.arguments import axis_name, frozen_nodes, loss_function
from .._math.mesh import on_automatic_axes
from .._math.types import Model, Parameters, PRNGKey, Where
from .._operations import FactoredOperation, MatrixShape, Operation, Transposed
from .._slot import Use
from .stacks import check_stack, dots, solve_each


class Influence(eqx.Module):
    r"""How much each training example counts for what a trained model does.

    $$s_{qi} = q^\top (C + \lambda I)^{-1} g_i$$

    $g_i$ is the gradient of training example i, and q that of what is asked about: a loss, a logit, any function of
    the parameters. $C$ is the curvature of the mean loss over the training set, by any estimator. With the example
    weighted by $\frac1N + \varepsilon$ in place of $\frac1N$, the trained parameters change by
    $-\varepsilon\, (C + \lambda I)^{-1} g_i$, and so what q is the gradient of changes by $-\varepsilon s_{qi}$. Left
    out, $\varepsilon = -\frac1N$, it changes by about $+\frac1N s_{qi}$. So if q is the gradient of a loss, examples of
    positive score helped. The score has the unit of what q is the gradient of. (With weights of examples, N is their
    sum.)

    All is for one batch at a time: a data set of any size is gone through by a loop over its batches, whose scores are
    joined along their last axis. Nothing depends on how it is split.

    Scores are finished in the backward pass, layer by layer. No gradient of an example is kept: with a layer that is
    applied at one position of an example, a product of matrices takes its inputs and output cotangents to scores, with
    memory for `min(q d_g, d_g d_a)` numbers for each example; at several positions the gradients of this layer are
    formed first, `d_g d_a` numbers for each example. Either way it takes about `2 q P` flops for each example.

    ??? cite "Source"
        Koh & Liang 2017, arXiv:1703.04730, section 2; Grosse et al. 2023, arXiv:2308.03296, sections 2 and 3, whose
        influence on what q is the gradient of is $-s$.
    """

    loss_fn: Callable
    estimator: CurvatureEstimator
    example_axis: str | None = eqx.field(static=True)
    frozen: Where | None = eqx.field(static=True)

    def __init__(
        self,
        loss_fn: Callable,
        estimator: CurvatureEstimator,
        *,
        example_axis: str | None = None,
        frozen: Where | None = None,
    ):
        """**Arguments:**

        - `loss_fn`: the loss that the model was trained with, as for [`kfax.Optimizer`][].
        - `estimator`: whose inverse is used: [`kfax.BlockDiagonalCurvature`][]`(decay=1.0)` for K-FAC. It takes in the
            training set by itself, by its own `init`, `update` and `refresh`.
        - `example_axis`: the `axis_name` of the `jax.vmap` over examples in `loss_fn`, as for
            [`kfax.BlockDiagonalCurvature`][].
        - `frozen`: what is not trained, as in [`kfax.tag`][].

        **Raises:** `ValueError` for something else than that.
        """
        if not isinstance(estimator, CurvatureEstimator):
            raise ValueError(
                "`estimator` must be an estimator, such as `kfax.BlockDiagonalCurvature(decay=1.0)`, got "
                f"{estimator!r}."
            )
        self.loss_fn = loss_function(loss_fn)
        self.estimator = estimator
        self.example_axis = axis_name("example_axis", example_axis)
        self.frozen = frozen_nodes(frozen)

    @on_automatic_axes
    def gradients(self, model: Model, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None) -> Parameters:
        r"""The gradient $g_i$ of each example, in one backward pass.

        It is that of $w_i \ell_i$, with the weights as they are given: not divided by their mean, so that it does not
        depend on what else is in the batch. Their sum is the gradient of the mean loss times the batch's total weight.
        With several losses it is that of their sum. Penalties are no example's, and are left out. (With
        `mean_over_positions` it is that of the sum over positions, and an example counts by how many it has.)

        **Arguments:**

        - `model`: the tagged model.
        - `batch`: passed to `loss_fn`: queries, if it is their loss that is asked about.
        - `key`, `model_state`: for `loss_fn`, if it takes them.

        **Returns:** a PyTree like the parameters with a leading axis of the examples. [loss/param]
        """
        problem = self._problem(model, batch, key, model_state)
        found = _observe(problem, _read_gradients, self.example_axis)
        matrices = {key: jnp.moveaxis(each.cotangents, -3, 0) for key, each in found.items()}
        return jax.vmap(lambda one: from_matrices(problem.parameters, one))(matrices)

    @on_automatic_axes
    def solve(self, state: Any, queries: Parameters) -> Parameters:
        """`(C + λI)⁻¹ q` of each query, by the estimator: the directions that scores are taken along.

        **Arguments:**

        - `state`: of the estimator, after a refresh.
        - `queries`: gradients q, a PyTree like the parameters with a leading axis: of `gradients`, or of
            `jax.vmap(eqx.filter_grad(function), in_axes=(None, 0))(model, ...)`, or those of other functions, stacked.

        **Returns:** a PyTree like `queries`. For exact ones of a data set see [`kfax.ConjugateGradients`][].
        """
        return solve_each(self.estimator, state, queries)

    def scores(
        self,
        model: Model,
        batch: Any,
        directions: Parameters,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
    ) -> Float[Array, "q n"]:
        """Scores of all examples of a batch for all queries.

        **Arguments:**

        - `model`: the tagged model.
        - `batch`: of the training set.
        - `directions`: from `solve`, a PyTree like the parameters with a leading axis of q queries.
        - `key`, `model_state`: for `loss_fn`, if it takes them.

        **Returns:** a row for each query, a column for each example.

        **Raises:** `ValueError` for directions that are not like the parameters, with one more axis.
        """
        by_layer = self.scores_by_layer(model, batch, directions, key=key, model_state=model_state)
        return jnp.sum(jnp.stack(list(by_layer.values())), axis=0)

    @on_automatic_axes
    def scores_by_layer(
        self,
        model: Model,
        batch: Any,
        directions: Parameters,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
    ) -> dict[str, Float[Array, "q n"]]:
        """What each layer contributes to the scores.

        **Arguments:** as for `scores`.

        **Returns:** scores by key, as [`kfax.coverage`][] prints them, which sum up to those of `scores`.
        """
        problem = self._problem(model, batch, key, model_state)
        check_stack("directions", directions, problem.parameters)
        matrices = jax.vmap(to_matrices)(directions)
        found = _observe(problem, functools.partial(_read_scores, matrices), self.example_axis)
        return {key: jnp.sum(each.reshape(-1, *each.shape[-2:]), axis=0).T for key, each in found.items()}

    @on_automatic_axes
    def self_influence(
        self, state: Any, model: Model, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None
    ) -> Float[Array, " n"]:
        r"""$g_i^\top (C + \lambda I)^{-1} g_i$: how much the loss of each example would grow if it were left out.

        It is large for what the model could not have known from the other examples: outliers, and wrong labels. It
        takes a solve for each example, and memory for a gradient and a solution of each.

        **Arguments:**

        - `state`: of the estimator, after a refresh.
        - `model`: the tagged model.
        - `batch`: of the training set.
        - `key`, `model_state`: for `loss_fn`, if it takes them.

        **Returns:** a number for each example. [loss]
        """
        gradients = self.gradients(model, batch, key=key, model_state=model_state)
        return dots(gradients, solve_each(self.estimator, state, gradients))

    def _problem(self, model: Model, batch: Any, key: PRNGKey | None, model_state: Any) -> Problem:
        split_parameters(model, self.frozen)  # every parameter is observed
        return Problem(self.loss_fn, model, batch, split_key(self.loss_fn, key)[0], model_state, self.frozen)


def _observe(problem: Problem, read: Callable[[Part, int, bool], Reading], example_axis: str | None) -> dict[str, Any]:
    """What is read of the layers, by key, when the losses have the cotangents of the sum over examples."""
    linearization = linearize(problem, read, example_axis=example_axis)
    cotangents = eqx.tree_at(lambda terms: terms[1], linearization.of_value(), replace_fn=jnp.zeros_like)
    weight = total_weight(linearization.losses)
    return linearization.pullback(jax.tree.map(lambda u: u * weight.astype(u.dtype), cotangents))[1]


# It records the gradient of each example.
_BY_EXAMPLE = Diagonal()


def _read_gradients(part: Part, num_examples: int, is_only: bool) -> Reading:
    shape, record = part.operation.shape(), functools.partial(_BY_EXAMPLE.record, part.operation.shape())
    return Reading(_BY_EXAMPLE.slot(shape, num_examples, is_only), record, is_sum=False)


def _read_scores(
    matrices: Mapping[str, Float[Array, "q *leading d_g d_a"]], part: Part, num_examples: int, is_only: bool
) -> Reading:
    del is_only
    shape, directions = part.operation.shape(), matrices[part.key].astype(part.operation.shape().statistics_dtype)
    zeros = jnp.zeros((*shape.stack, num_examples, len(directions)), shape.statistics_dtype)
    given = jnp.moveaxis(directions, 0, len(shape.stack))
    return Reading(zeros, functools.partial(_scores, shape), is_sum=False, given=given)


def _scores(shape: MatrixShape, operation: Operation, use: Use) -> Float[Array, "n q"]:
    """`Σ gᵀ V ā` over positions and groups, for each direction V."""
    directions = use.given.reshape(len(use.given), math.prod(shape.groups), shape.d_g, shape.d_a)
    if isinstance(operation, FactoredOperation) and not isinstance(operation, Transposed):
        if use.num_positions * operation.num_positions(use.x) == 1:
            return _scores_at_one_position(directions, operation, use)
    gradients = _BY_EXAMPLE.record(shape, operation, use).cotangents
    return jnp.einsum("knoi,qkoi->nq", gradients.reshape(-1, *gradients.shape[-3:]), directions)


def _scores_at_one_position(
    directions: Float[Array, "q k d_g d_a"], operation: FactoredOperation, use: Use
) -> Float[Array, "n q"]:
    own, leading = operation.shape(), (directions.shape[1], use.num_examples)
    a = operation.input_sums(use.x, None, directions.dtype).reshape(*leading, own.num_inputs)
    g = operation.cotangents(use.dy).astype(directions.dtype).reshape(*leading, own.d_g)
    # Of the two orders of products the cheaper one has the smaller result in between.
    scores = jnp.einsum("kni,qkoi,kno->nq", a, directions[..., : own.num_inputs], g)
    return scores + jnp.einsum("qko,kno->nq", directions[..., -1], g) if own.bias else scores
