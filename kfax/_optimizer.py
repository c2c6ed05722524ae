"""The K-FAC optimizer: from a model, a state and a batch to the next model and state."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._capture import Linearization, Problem
from ._check import check
from ._damping import as_damping_rule, DampingRule
from ._estimators import BlockDiagonalCurvature, CurvatureEstimator, ImplicitExactCurvature
from ._l2 import L2
from ._layers import parts
from ._quadratic import PlaneModel, QuadraticModel
from ._registry import split_parameters
from ._scalars import positive, scalar, scheduled
from ._tree import combine, cond, dot, is_traced, norm, zeros_like
from ._types import Counter, Model, Parameters, PRNGKey, Scalar, Schedule, Where


Coefficient = Scalar | Schedule | QuadraticModel


class OptimizerState(eqx.Module):
    """What the optimizer remembers between steps. Does not depend on the batch size.

    **Fields:**

    - `step`: how many steps were taken.
    - `damping`: λ, as the damping rule left it. [loss/param²]
    - `velocity`: the previous update of the parameters. [param]
    - `curvature`: the state of the estimator, with its inverses.
    """

    step: Counter
    damping: Scalar
    velocity: Parameters
    curvature: Any


class StepInfo(eqx.Module):
    """What happened in a step.

    **Fields:**

    - `step`: its number, from zero.
    - `loss`: the objective before the step: all losses, and the L2 term.
    - `gradient_norm`: of the objective. [loss/param]
    - `update_norm`: of the change of the parameters. [param]
    - `learning_rate`, `momentum`: the coefficients that were used.
    - `damping`: λ of this step. [loss/param²]
    - `predicted_change`: the change of the objective that the quadratic model predicts, without damping. NaN on steps
        that had no use for it.
    - `reduction_ratio`: the actual change over the predicted one. NaN on steps that did not measure it.
    - `model_state`: the new one, if `loss_fn` returned one.
    - `aux`: what else `loss_fn` returned.
    """

    step: Counter
    loss: Scalar
    gradient_norm: Scalar
    update_norm: Scalar
    learning_rate: Scalar
    momentum: Scalar
    damping: Scalar
    predicted_change: Scalar
    reduction_ratio: Scalar
    model_state: Any
    aux: Any


class Optimizer(eqx.Module):
    r"""Minimizes a loss by preconditioned gradient steps with momentum.

    $$\delta_t = -\alpha_t\, (\hat C + (\lambda_t + \eta) I)^{-1} \nabla h(\theta_t) + \beta_t\, \delta_{t-1}, \qquad
    \theta_{t+1} = \theta_t + \delta_t$$

    with Ĉ the estimator's curvature, λ the damping and η the coefficient of L2. `init` and `step` are pure functions:
    jit them, scan them, vmap them as you like. An optimizer is a PyTree whose numbers are array leaves, so that another
    value needs no new compilation.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, algorithm 2. Differs: the preconditioner is damped by λ itself, not
        by a γ that is searched for separately.
    """

    loss_fn: Callable
    learning_rate: Coefficient
    momentum: Coefficient
    damping: DampingRule
    estimator: CurvatureEstimator
    l2: L2
    inverse_update_period: int = eqx.field(static=True)
    curvature_update_period: int = eqx.field(static=True)
    frozen: Where | None = eqx.field(static=True)

    def __init__(
        self,
        loss_fn: Callable,
        *,
        learning_rate: ArrayLike | Schedule | QuadraticModel,
        momentum: ArrayLike | Schedule | QuadraticModel,
        damping: ArrayLike | Schedule | DampingRule,
        l2: ArrayLike | L2 = 0.0,
        estimator: CurvatureEstimator | None = None,
        inverse_update_period: int = 5,
        curvature_update_period: int = 1,
        frozen: Where | None = None,
    ):
        """**Arguments:**

        - `loss_fn`: called as `loss_fn(model, batch)`, and with `key=` and `model_state=` if it has parameters of
            these names. Returns a [`kfax.Loss`][] of the whole batch (or a list or dictionary of them), or a tuple
            `(losses, aux)`; if it takes a model state, `(losses, model_state)` or `(losses, model_state, aux)`.
        - `learning_rate`: α, a number, a schedule (a function of the step, as those of optax), or
            [`kfax.QuadraticModel`][].
        - `momentum`: β, likewise.
        - `damping`: λ, a number, a schedule, or a rule such as [`kfax.LevenbergMarquardt`][]. [loss/param²]
        - `l2`: η, a number, or a [`kfax.L2`][] for some of the parameters. [loss/param²]
        - `estimator`: of the curvature; [`kfax.BlockDiagonalCurvature`][]`()` if not given.
        - `inverse_update_period`: how many steps between refreshes of the inverse, the costly part.
        - `curvature_update_period`: how many steps between updates of the statistics.
        - `frozen`: what is not trained: a function of the model that returns nodes of it, as in [`kfax.tag`][].

        **Raises:** `ValueError` for values out of their range.
        """
        if not callable(loss_fn):
            raise ValueError(f"`loss_fn` must be a function of model and batch, got {type(loss_fn).__name__}.")
        if inverse_update_period < 1 or curvature_update_period < 1:
            raise ValueError("`inverse_update_period` and `curvature_update_period` count steps: at least 1.")
        self.loss_fn = loss_fn
        self.learning_rate = _coefficient("learning_rate", learning_rate)
        self.momentum = _coefficient("momentum", momentum)
        if isinstance(learning_rate, QuadraticModel) and isinstance(momentum, QuadraticModel):
            if learning_rate != momentum:
                raise ValueError("Learning rate and momentum must be chosen by one `kfax.QuadraticModel`.")
        self.damping = as_damping_rule(damping)
        self.l2 = l2 if isinstance(l2, L2) else L2(l2)
        self.estimator = BlockDiagonalCurvature() if estimator is None else estimator
        self.inverse_update_period = inverse_update_period
        self.curvature_update_period = curvature_update_period
        self.frozen = frozen

    def init(self, model: Model, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None) -> OptimizerState:
        """**Arguments:**

        - `model`: the tagged model.
        - `batch`: as for `step`. Used only to check model and `loss_fn` by [`kfax.check`][], which takes values: inside
            `jit` and the like there is no such check.
        - `key`, `model_state`: for `loss_fn`, if it takes them.

        **Returns:** the state for the first step.

        **Raises:** `ValueError` for a parameter without a block, and all that `kfax.check` raises.
        """
        parameters, _ = split_parameters(model, self.frozen)
        if not is_traced((model, batch, key, model_state)):
            check(
                self.loss_fn,
                model,
                batch,
                key=key,
                model_state=model_state,
                example_axis=self.estimator.example_axis,
                frozen=self.frozen,
            )
        return OptimizerState(
            step=jnp.zeros((), jnp.int32),
            damping=self.damping.init(),
            velocity=zeros_like(parameters),
            curvature=self.estimator.init(model, frozen=self.frozen),
        )

    def step(
        self,
        model: Model,
        state: OptimizerState,
        batch: Any,
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        learning_rate: ArrayLike | None = None,
        momentum: ArrayLike | None = None,
        damping: ArrayLike | None = None,
    ) -> tuple[Model, OptimizerState, StepInfo]:
        """**Arguments:**

        - `model`: the tagged model.
        - `state`: from `init` or the previous step.
        - `batch`: passed to `loss_fn`.
        - `key`: for the estimator's source if it draws random numbers, and for `loss_fn` if it takes a key.
        - `model_state`: for `loss_fn`, if it takes one.
        - `learning_rate`, `momentum`, `damping`: used in this step in place of what the optimizer would choose.

        **Returns:** the next model, the next state, and a [`kfax.StepInfo`][].

        **Raises:** `ValueError` if model, state and batch do not fit.
        """
        parameters, _ = split_parameters(model, self.frozen)
        _check_state(state, parameters)
        loss_key, source_key = (None, None) if key is None else jax.random.split(key)
        problem = Problem(self.loss_fn, model, batch, loss_key, model_state, self.frozen)
        linearization = self.estimator.linearize(problem)
        mask = self.l2.mask(model, parameters)
        now = _Present(
            linearization=linearization,
            mask=mask,
            loss=linearization.evaluation.value() + self.l2.value(mask, parameters),
            gradient=combine((1, 1), (linearization.gradient(), self.l2.multiply(mask, parameters))),
            damping=self.damping.value(state.damping, state.step) if damping is None else positive("damping", damping),
        )
        curvature = self._estimate(now, state, parameters, source_key)
        given = (
            _choose("learning_rate", self.learning_rate, learning_rate, state.step),
            _choose("momentum", self.momentum, momentum, state.step),
        )
        descent = combine((-1,), (self.estimator.solve(curvature, now.gradient),))
        coefficients, predicted = self._coefficients(now, given, (descent, state.velocity))
        update = combine(coefficients, (descent, state.velocity))
        new_model = eqx.apply_updates(model, update)
        new_damping, predicted, ratio = self._assess(now, state.step, curvature, update, new_model, predicted)
        info = StepInfo(
            step=state.step,
            loss=now.loss,
            gradient_norm=norm(now.gradient),
            update_norm=norm(update),
            learning_rate=coefficients[0],
            momentum=coefficients[1],
            damping=now.damping,
            predicted_change=predicted,
            reduction_ratio=ratio,
            model_state=linearization.evaluation.model_state,
            aux=linearization.evaluation.aux,
        )
        return new_model, OptimizerState(state.step + 1, new_damping, update, curvature), info

    def state_axes(self, state: OptimizerState) -> PyTree[int | None]:
        """`in_axes` and `out_axes` of a state for `equinox.filter_vmap` over an ensemble: all arrays but the counter.

        An unmapped counter keeps "every fifth step" one decision for the whole ensemble. With a mapped one, JAX would
        do the work of both branches at every step.

        **Arguments:**

        - `state`: that of one member or of the ensemble, or its shapes.

        **Returns:** zeros, and `None` for `step`, in the structure of the state.
        """
        axes = jax.tree.map(lambda _: 0, state)
        return eqx.tree_at(lambda s: s.step, axes, None)

    def _estimate(
        self,
        now: "_Present",
        state: OptimizerState,
        parameters: Parameters,
        key: PRNGKey | None,
    ) -> Any:
        """The curvature with this batch in it, and its inverses, each if it is due."""
        curvature = cond(
            _is_due(state.step, self.curvature_update_period),
            lambda: self.estimator.fold(state.curvature, now.linearization, key),
            lambda: state.curvature,
        )
        damping = {path: now.damping + eta for path, eta in self.l2.by_layer(now.mask, parameters).items()}
        return cond(
            _is_due(state.step, self.inverse_update_period),
            lambda: self.estimator.refresh(curvature, parameters, damping),
            lambda: curvature,
        )

    def _coefficients(
        self, now: "_Present", given: tuple[Scalar | None, Scalar | None], directions: tuple[Parameters, Parameters]
    ) -> tuple[tuple[Scalar, Scalar], Scalar | None]:
        """Learning rate and momentum, and the change that the exact quadratic model predicts if it was asked."""
        learning_rate, momentum = given
        if learning_rate is not None and momentum is not None:
            return (learning_rate, momentum), None
        exact = ImplicitExactCurvature(self._quadratic_model().source)
        batch = exact.fold(exact.init(now.problem.model, frozen=self.frozen), now.linearization, None)
        gram = exact.gram(batch, directions)
        l2 = _table(directions, tuple(self.l2.multiply(now.mask, v) for v in directions))
        slopes = jnp.stack([dot(now.gradient, v) for v in directions])
        plane = PlaneModel(gram + l2, _table(directions, directions), slopes)
        coefficients = plane.minimize(now.damping, learning_rate, momentum)
        return coefficients, plane.change(jnp.stack(coefficients))

    def _quadratic_model(self) -> QuadraticModel:
        models = [each for each in (self.learning_rate, self.momentum) if isinstance(each, QuadraticModel)]
        return models[0] if models else QuadraticModel()

    def _assess(
        self,
        now: "_Present",
        step: Counter,
        curvature: Any,
        update: Parameters,
        new_model: Model,
        predicted: Scalar | None,
    ) -> tuple[Scalar, Scalar, Scalar]:
        """The next λ, the predicted change and the reduction ratio; NaN for what was not computed."""
        dtype = now.loss.dtype
        unknown = jnp.full((), jnp.nan, dtype)

        def measure():
            change = self._approximate_change(now, curvature, update) if predicted is None else predicted
            new_parameters, _ = split_parameters(new_model, self.frozen)
            after = now.problem.evaluate(new_parameters).value()
            after = after + self.l2.value(now.mask, new_parameters)
            ratio = (after - now.loss) / change
            return self.damping.update(now.damping, ratio), change.astype(dtype), ratio.astype(dtype)

        def do_not_measure():
            return now.damping, unknown if predicted is None else predicted.astype(dtype), unknown

        wanted = self.damping.wants_ratio(step)
        return do_not_measure() if wanted is False else cond(wanted, measure, do_not_measure)

    def _approximate_change(self, now: "_Present", curvature: Any, update: Parameters) -> Scalar:
        """What the estimator's own quadratic model predicts, without damping."""
        product = combine((1, 1), (self.estimator.multiply(curvature, update), self.l2.multiply(now.mask, update)))
        return dot(now.gradient, update) + dot(update, product) / 2


class _Present(eqx.Module):
    """What is known at the start of a step and needed by its parts."""

    linearization: Linearization
    mask: PyTree[bool]
    loss: Scalar
    gradient: Parameters
    damping: Scalar

    @property
    def problem(self) -> Problem:
        return self.linearization.problem


def _coefficient(name: str, value: Any) -> Coefficient:
    if isinstance(value, QuadraticModel) or callable(value):
        return value
    return scalar(name, value)


def _choose(name: str, coefficient: Coefficient, given: ArrayLike | None, step: Counter) -> Scalar | None:
    """The coefficient's value in this step; `None` if the quadratic model is to choose it."""
    if given is not None:
        return scalar(name, given)
    if isinstance(coefficient, QuadraticModel):
        return None
    if callable(coefficient):
        return scheduled(name, coefficient, step)
    return coefficient


def _is_due(step: Counter, period: int) -> Bool[Array, ""] | bool:
    return True if period == 1 else step % period == 0


def _table(left: tuple[Parameters, ...], right: tuple[Parameters, ...]) -> Float[Array, "k k"]:
    return jnp.stack([jnp.stack([dot(v, w) for w in right]) for v in left])


def _check_state(state: OptimizerState, parameters: Parameters) -> None:
    """The state must have been made for a model like this one."""

    def shapes(tree):
        return {key: part.operation.shape() for key, part in parts(tree).items()}

    expected, found = shapes(state.velocity), shapes(parameters)
    for path in expected | found:
        if expected.get(path) != found.get(path):
            was, now = (str(tree[path]) if path in tree else "nothing" for tree in (expected, found))
            raise ValueError(
                f"The optimizer's state was made for another model: at `{path}` it has {was}, but the model has {now}. "
                "Call `optimizer.init(model, batch)` for the changed model (or was `frozen` changed?)."
            )
    if jax.tree.structure(state.velocity) != jax.tree.structure(parameters):
        raise ValueError(
            "The optimizer's state was made for a model of another structure (other blocks, or static fields). Call "
            "`optimizer.init(model, batch)` for the changed model."
        )
