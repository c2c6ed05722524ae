"""Products with the exact curvature matrix, which is never formed."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._objective import evaluate
from .._registry import split_parameters
from .._types import Model, Parameters, PRNGKey, Where


class ImplicitExactCurvature(eqx.Module):
    r"""The generalized Gauss-Newton matrix $C = \frac1N \sum_n J_n^\top H_n J_n$ of a batch, by its action.

    Holds nothing: each product linearizes the model on the batch. The model is run with empty slots, so that forward
    mode is available; under `jit` the run is shared with whatever else runs the model at the same parameters.
    """

    def gram(
        self,
        loss_fn: Callable,
        model: Model,
        batch: Any,
        vectors: Sequence[Parameters],
        *,
        key: PRNGKey | None = None,
        model_state: Any = None,
        frozen: Where | None = None,
    ) -> Float[Array, "k k"]:
        r"""All the quadratic forms $v_i^\top C v_j$.

        **Arguments:**

        - `loss_fn`, `model`, `batch`: as for an estimator's `update`.
        - `vectors`: k PyTrees like the parameters.
        - `key`, `model_state`, `frozen`: as for an estimator's `update`.

        **Returns:** the symmetric positive semi-definite matrix, in the dtype of the losses. Costs one forward pass
        and one forward-mode pass for each vector, and no backward pass.
        """
        parameters, rest = split_parameters(model, frozen)

        def outputs(parameters):
            evaluation = evaluate(loss_fn, eqx.combine(parameters, rest), batch, key=key, model_state=model_state)
            losses = evaluation.losses
            return tuple(loss.outputs for loss in losses), losses

        _, push, losses = jax.linearize(outputs, parameters, has_aux=True)
        factors = []
        for vector in vectors:
            tangents = push(vector)
            pairs = zip(losses, tangents, strict=True)
            factors.append([loss.multiply_factor_transpose(tangent) for loss, tangent in pairs])
        flat = jnp.stack([jnp.concatenate([part.reshape(-1) for part in factor]) for factor in factors])
        return flat @ flat.T / losses[0].num_examples
