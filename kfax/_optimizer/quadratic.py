"""The local quadratic model of the objective in the plane of two directions."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._estimators import check_deterministic, CurvatureSource, ExactGGN
from .._math.arguments import function
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
        if batch is not None:
            function("batch", batch, "kfax.Fraction(1 / 4)", 2)
        self.source = check_deterministic("source", source)
        self.batch = batch


class Plane(eqx.Module):
    r"""The combinations of k directions around the present parameters θ: all that depends on inner products only.

    **Fields:**

    - `inner`: `vᵢᵀ vⱼ`. [param²]
    - `slopes`: `∇hᵀ vᵢ`. [loss]
    - `l2`: `vᵢᵀ L vⱼ`, where L is the curvature of the L2 term. [loss]
    - `l2_slopes`: `θᵀ L vᵢ`. [loss]
    - `sizes`: the largest absolute value in each direction. [param]
    - `range`: the largest number that all parameters can hold. [param]
    """

    inner: Float[Array, "k k"]
    slopes: Float[Array, " k"]
    l2: Float[Array, "k k"]
    l2_slopes: Float[Array, " k"]
    sizes: Float[Array, " k"]
    range: float = eqx.field(static=True)

    def squared_norm(self, coefficients: Float[Array, " k"]) -> Scalar:
        """Of a combination."""
        return jnp.maximum(_form(self.inner, coefficients), 0)

    def l2_change(self, coefficients: Float[Array, " k"]) -> Scalar:
        """By how much a combination changes the L2 term."""
        return matmul(coefficients, self.l2_slopes) + _form(self.l2, coefficients) / 2

    def is_finite(self, coefficients: Float[Array, " k"]) -> Bool[Array, ""]:
        """Whether a combination is finite, and leaves room for parameters of its size to be added."""
        return jnp.sum(jnp.abs(coefficients) * self.sizes) < self.range / 2

    def minimize(
        self, gram: Float[Array, "k k"], damping: Scalar, learning_rate: Scalar | None, momentum: Scalar | None
    ) -> tuple[Scalar, Scalar]:
        """The coefficients of the first two directions that minimize a quadratic model; those given are kept.

        `gram` is `vᵢᵀ C vⱼ`, the curvature without damping and L2. [loss]
        """
        q, b = gram + self.l2 + damping * self.inner, self.slopes
        if learning_rate is None and momentum is None:
            alpha, beta = -_solve_psd(q, b)
            return alpha, beta
        if learning_rate is None:
            assert momentum is not None
            return -_divide(b[0] + q[0, 1] * momentum, q[0, 0]), momentum
        assert momentum is None
        return learning_rate, -_divide(b[1] + q[0, 1] * learning_rate, q[1, 1])

    def change(self, curvature: Scalar, coefficients: Float[Array, " k"]) -> Scalar:
        """What a quadratic model, without damping, predicts for the change of the objective.

        `curvature` is `δᵀ C δ` for the combination δ. [loss]
        """
        return matmul(coefficients, self.slopes) + (curvature + _form(self.l2, coefficients)) / 2


def _form(matrix: Float[Array, "k k"], coefficients: Float[Array, " k"]) -> Scalar:
    return matmul(coefficients, matrix, coefficients)


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
