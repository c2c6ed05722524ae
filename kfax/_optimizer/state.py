"""What the optimizer keeps between steps, and what it reports of one."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool

from .._layers import any_parameters_of, parts, to_matrices
from .._math.moving_average import MovingAverage
from .._math.tree import is_traced, norm
from .._math.types import Counter, Model, Parameters, Scalar, Where


class OptimizerState(eqx.Module):
    """What the optimizer remembers between steps. Does not depend on the batch size.

    **Fields:**

    - `step`: how many calls of `step` there were, those whose step was not taken included.
    - `damping`: what the damping rule stores. For an adaptive one it is λ [loss/param²], or a multiple of the mean
        eigenvalue if it is relative; for a schedule the first value. λ of a step is in its [`kfax.StepInfo`][].
    - `velocity`: the previous update of the parameters. [param]
    - `preconditioner`: a [`kfax.PreconditionerState`][] or a [`kfax.EigenbasisAdamState`][], which has the state of the
        estimator, and what is computed from it.
    - `was_undone`: whether the last step was.
    - `losses`: the mean of the objective's absolute value over all steps whose batches were finite. [loss]
    """

    step: Counter
    damping: Scalar
    velocity: Parameters
    preconditioner: Any
    was_undone: Bool[Array, ""]
    losses: MovingAverage

    @property
    def curvature(self) -> Any:
        """The state of the estimator."""
        return self.preconditioner.curvature


class StepResult(eqx.Enumeration):
    """How a step went: a field of [`kfax.StepInfo`][], to be compared by `==`.

    Whatever is not finite is kept out of model and state, so that training goes on. Of several reasons the first in
    this order is given:

    - `invalid_setting`: a number that a schedule, a rule or the caller gave for this step, or that the optimizer was
        made with inside `jit`, is not finite or out of its range: a negative learning rate, momentum outside [0, 1], a
        damping or a bound that is not positive. Nothing was changed but the counter, as for a batch that is not finite.
        Where the value is known, outside `jit`, it is an error.
    - `non_finite_batch`: loss, gradient or new model state are not finite. Nothing was changed but the counter (and
        inverses, if they were due).
    - `non_finite_update`: the update was not finite. The parameters were not changed, the velocity was set to zero.
    - `rejected`: the loss was higher after the step, or not finite. The step was undone; the velocity is set to zero
        after the second time in a row, or at once where there is no [`kfax.Rejection`][].
    - `non_finite_inverse`: the step was taken, with the last good inverse for at least one block. A block without any
        is not moved. All inverses are computed anew at the next step.
    - `non_finite_curvature`: the step was taken, but the statistics of the batch were left out.
    - `successful`: none of these.
    """

    successful = "The step was taken."
    invalid_setting = "A learning rate, damping or other setting is not finite or out of range: nothing was changed."
    non_finite_batch = "Loss, gradient or new model state are not finite: nothing was changed."
    non_finite_update = "The update is not finite: the parameters were not changed."
    rejected = "The loss was higher after the step, or not finite: the step was undone."
    non_finite_inverse = "At least one block could not be inverted: its last good inverse was used."
    non_finite_curvature = "The statistics of the batch are not finite: they were left out."


class LayerNorms(eqx.Module):
    """Euclidean norms of what belongs to one layer (or one operation of it).

    **Fields:**

    - `parameter`: before the step. [param]
    - `gradient`: of the objective. [loss/param]
    - `descent`: the preconditioned gradient. [param]
    - `update`: of the change of the parameters. [param]
    """

    parameter: Scalar
    gradient: Scalar
    descent: Scalar
    update: Scalar


class StepInfo(eqx.Module):
    """What happened in a step.

    **Fields:**

    - `step`: its number, from zero.
    - `result`: how it went, a [`kfax.StepResult`][].
    - `loss`: the objective before the step: all losses and penalties, and the L2 term. [loss]
    - `loss_after`: the objective after the proposed step, on the same batch, whether it was taken or not. NaN on steps
        that did not measure it: it is measured where there is a [`kfax.Rejection`][], and where an adaptive damping
        is adjusted. [loss]
    - `gradient_norm`: of the objective. [loss/param]
    - `descent_norm`: of the preconditioned gradient. [param]
    - `proposed_norm`: of the update that was proposed, whether the step was taken or not. Like the next, and the
        predicted change, without weight decay. [param]
    - `update_norm`: of the change of the parameters: that of the update, or zero. [param]
    - `learning_rate`, `momentum`: the coefficients that were used.
    - `is_constrained`: whether a constraint lowered the learning rate.
    - `damping`: λ of this step. [loss/param²]
    - `predicted_change`: the change of the objective that the quadratic model predicts, with λ‖δ‖²/2 if the damping
        rule includes it. NaN on steps that had no use for it.
    - `reduction_ratio`: the actual change over the predicted one. NaN on steps that did not measure it.
    - `layers`: norms of single layers, by path, if the optimizer was told to report them.
    - `model_state`: the new one, if `loss_fn` returned one.
    - `aux`: what else `loss_fn` returned; stacked if the batch was run in micro-batches.
    """

    step: Counter
    result: StepResult
    loss: Scalar
    loss_after: Scalar
    gradient_norm: Scalar
    descent_norm: Scalar
    proposed_norm: Scalar
    update_norm: Scalar
    learning_rate: Scalar
    momentum: Scalar
    is_constrained: Bool[Array, ""]
    damping: Scalar
    predicted_change: Scalar
    reduction_ratio: Scalar
    layers: dict[str, LayerNorms] | None
    model_state: Any
    aux: Any

    def __str__(self) -> str:
        names = ("loss", "gradient_norm", "update_norm", "learning_rate", "momentum", "damping", "reduction_ratio")
        if is_traced(self.loss) or self.loss.ndim:  # nothing to be read, or of several steps or models
            return repr(self)
        numbers = ", ".join(f"{name} {float(getattr(self, name)):.4g}" for name in names)
        return f"step {int(self.step)}: {numbers}. {StepResult[self.result]}"


def layer_norms(
    parameters: Parameters, gradient: Parameters, descent: Parameters, update: Parameters
) -> dict[str, LayerNorms]:
    """The norms of each layer, by path."""
    trees = [to_matrices(tree) for tree in (parameters, gradient, descent, update)]
    return {key: LayerNorms(*(norm(tree[key]) for tree in trees)) for key in trees[0]}


def parameters_for(state: OptimizerState, model: Model, frozen: Where | None) -> Parameters:
    """What is trained of a model, for which the state must have been made."""
    if not isinstance(state, OptimizerState):
        raise ValueError(
            f"The optimizer's state is what `optimizer.init(model, batch)` returned, got {type(state).__name__}. Were "
            "the arguments of `step(model, state, batch)` swapped?"
        )
    parameters = any_parameters_of(model, frozen)

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
    if _layout(state.velocity) != _layout(parameters):
        raise ValueError(
            "The optimizer's state was made for a model of another structure (other blocks, shapes, or static fields). "
            "Call `optimizer.init(model, batch)` for the changed model."
        )
    return parameters


def _layout(tree: Parameters) -> Any:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]
