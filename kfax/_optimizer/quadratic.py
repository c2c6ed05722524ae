"""The local quadratic model of the objective in the plane of two directions."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._estimators import check_deterministic, CurvatureSource, ExactGGN
from .._math.linalg import eigh, matmul
from .._math.types import Scalar


class QuadraticModel(eqx.Module):
    r"""Chooses the learning rate, the momentum or both by minimizing the exact local quadratic model.

    $$q(\delta) = \tfrac12 \delta^\top (C + (\eta + \lambda) I)\, \delta + \nabla h^\top \delta, \qquad
    \delta = \alpha \Delta + \beta v$$

    Δ is the preconditioned descent direction, v the previous update, C the exact generalized Gauss-Newton matrix of
    the batch (or what `source` says), η the coefficient of L2 and λ the damping. It takes one forward pass of
    derivatives through the model for each of Δ and v. Meant for large batches: on a small batch it trusts the batch's
    own curvature too much.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, sections 6.4 and 7.
    """

    source: CurvatureSource
    batch: Callable | None

    def __init__(self, source: CurvatureSource = ExactGGN(), *, batch: Callable | None = None):
        """**Arguments:**

        - `source`: which matrix C is: [`kfax.ExactGGN`][]`()`; or [`kfax.ExactFisher`][]`()` for losses without a
            generalized Gauss-Newton matrix, such as [`kfax.gaussian_nll`][]; or [`kfax.EmpiricalFisher`][]`()`.
        - `batch`: `(batch, count) -> batch`, the part of each batch on which C is taken, [`kfax.Fraction`][]`(1 / 4)`
            for instance, as in the source. All of it, if not given.

        **Raises:** `ValueError` for something else, or a source that draws random numbers.
        """
        if not (batch is None or callable(batch)):
            raise ValueError(
                f"`batch` must be a function of batch and count, such as `kfax.Fraction(1 / 4)`, got {batch!r}."
            )
        self.source = check_deterministic("source", source)
        self.batch = batch


class PlaneModel(eqx.Module):
    r"""The quadratic model restricted to the combinations of k directions.

    **Fields:**

    - `gram`: `vᵢᵀ (C + ηI) vⱼ`, the curvature without damping. [loss]
    - `inner`: `vᵢᵀ vⱼ`. [param²]
    - `slopes`: `∇hᵀ vᵢ`. [loss]
    """

    gram: Float[Array, "k k"]
    inner: Float[Array, "k k"]
    slopes: Float[Array, " k"]

    def minimize(self, damping: Scalar, learning_rate: Scalar | None, momentum: Scalar | None) -> tuple[Scalar, Scalar]:
        """The coefficients of the first two directions that minimize the damped model; those given are kept."""
        q, b = self.gram + damping * self.inner, self.slopes
        if learning_rate is None and momentum is None:
            alpha, beta = -_solve_psd(q, b)
            return alpha, beta
        if learning_rate is None:
            assert momentum is not None
            return -_divide(b[0] + q[0, 1] * momentum, q[0, 0]), momentum
        assert momentum is None
        return learning_rate, -_divide(b[1] + q[0, 1] * learning_rate, q[1, 1])

    def change(self, coefficients: Float[Array, " k"]) -> Scalar:
        """What the model, without damping, predicts for the change of the objective."""
        return matmul(coefficients, self.slopes) + matmul(coefficients, self.gram, coefficients) / 2


def _divide(numerator: Scalar, denominator: Scalar) -> Scalar:
    """Zero along a direction without extent, such as the velocity before the first step."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def _solve_psd(matrix: Float[Array, "k k"], vector: Float[Array, " k"]) -> Float[Array, " k"]:
    """The least-norm solution, after scaling the diagonal to one: well defined for (nearly) dependent directions."""
    diagonal = jnp.diag(matrix)
    scale = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    scaled = scale[:, None] * matrix * scale[None, :]
    cutoff = 10 * len(vector) * jnp.finfo(matrix.dtype).eps
    values, vectors = eigh(scaled)
    kept = jnp.abs(values) > cutoff * jnp.max(jnp.abs(values))
    inverses = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return scale * matmul(vectors, inverses * matmul(vectors.T, scale * vector))
