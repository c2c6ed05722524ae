"""What keeps a step from going too far: two bounds, a projection of the momentum, and the undoing of failed steps."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from .._math.scalars import nonnegative, number_or_schedule, positive, positive_or_infinite, within_closed_unit
from .._math.types import Scalar, Schedule


class LossConstraint(eqx.Module):
    r"""A learning rate that is lowered where the step would promise more than there is to be had of the loss.

    $$\alpha' = \alpha \min\!\left(1, \frac{\mu \bar h}{\nabla h^\top P \nabla h}\right)$$

    with P the preconditioner, $(\hat C + \lambda I)^{-1}$, and $\bar h$ the mean of the objective's absolute value over
    all steps so far. By $\nabla h^\top P \nabla h$ a step of learning rate one promises to lower the loss, to first
    order. With the exact curvature of a squared error that is at most twice the loss, and twice where all of it can be
    fitted: μ = 2 leaves steps that are exact as they are, 1 halves them until the loss has fallen below half of its
    mean. Far more is promised where the curvature says too little of the loss: by an outlier among small batches, an
    inverse that is old, a softmax that is sure and wrong. It is there that training by numbers goes astray.

    Does not depend on the unit of the loss, but on where its zero is: made for losses whose values say how far there is
    to go, such as errors and negative log-likelihoods. Give surrogates, whose values mean nothing, a multiple of
    infinity.

    ??? cite "Source"
        The bound on a step by what the loss can fall is that of Polyak 1987, "Introduction to Optimization", section
        5.3, here with a mean in place of the present loss, in the metric of P, and as a limit only.
    """

    learning_rate: Scalar | Schedule
    multiple: Scalar

    def __init__(self, learning_rate: ArrayLike | Schedule, multiple: ArrayLike = 1.0):
        """**Arguments:**

        - `learning_rate`: α, a number or a schedule.
        - `multiple`: μ > 0, of the mean loss, that a step of learning rate one may promise; infinity for a learning
            rate that is taken as it is.

        **Raises:** `ValueError` for values out of their range.
        """
        self.learning_rate = number_or_schedule("learning_rate", learning_rate, nonnegative)
        self.multiple = positive_or_infinite("multiple", multiple)

    def limit(self, learning_rate: Scalar, squared_norm: Scalar, mean_loss: Scalar) -> Scalar:
        """α', for `s = ∇hᵀ P ∇h`."""
        allowed = self.multiple * mean_loss
        too_much = squared_norm > allowed
        return learning_rate * jnp.where(too_much, allowed / jnp.where(too_much, squared_norm, 1), 1)


class NormConstraint(eqx.Module):
    r"""A learning rate that is lowered where the step would be too long in the metric of the curvature.

    $$\alpha' = \alpha \min\!\left(1, \sqrt{\frac{\kappa}{\alpha^2\, \nabla h^\top P \nabla h}}\right)$$

    with P the preconditioner, $(\hat C + \lambda I)^{-1}$: the descent part of the step, $-\alpha' P \nabla h$, is no
    longer than $\sqrt\kappa$ in the norm of $\hat C + \lambda I$. For a negative log-likelihood, κ/2 bounds to second
    order how far the model's distribution moves, as a Kullback-Leibler divergence. The usual safeguard where batches
    are small. Between refreshes of the inverse P is that of an earlier step, and of another exponent than -1 another
    matrix: then $\alpha'^2 \nabla h^\top P \nabla h$ is still at most κ, and nothing is said of norms.

    ??? cite "Source"
        Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored approximations",
        section 5.
    """

    learning_rate: Scalar | Schedule
    bound: Scalar | Schedule

    def __init__(self, learning_rate: ArrayLike | Schedule, bound: ArrayLike | Schedule):
        """**Arguments:**

        - `learning_rate`: α, a number or a schedule.
        - `bound`: κ > 0, a number or a schedule: 1e-3 to 1e-2 is common. [loss]

        **Raises:** `ValueError` for values out of their range.
        """
        self.learning_rate = number_or_schedule("learning_rate", learning_rate, nonnegative)
        self.bound = number_or_schedule("bound", bound, positive)


def limit(learning_rate: Scalar, squared_norm: Scalar, bound: Scalar) -> Scalar:
    """α', so that `α'² s` is at most κ."""
    length = learning_rate**2 * squared_norm
    too_long = ~(length <= bound)  # or one of them is NaN
    return learning_rate * jnp.where(too_long, jnp.sqrt(bound / jnp.where(too_long, length, 1)), 1)


class ProjectedMomentum(eqx.Module):
    r"""A momentum that goes on only where the batch is silent: what the curvature sees of the velocity is taken out.

    $$\delta_t = -\alpha\, (\hat C + \lambda I)^{-1} \nabla h + \beta\, \lambda (\hat C + \lambda I)^{-1} \delta_{t-1}$$

    With a constant learning rate this is the update $\delta_t = -\alpha \varphi_t$ of the φ for which

    $$\varphi^\top \nabla h - \tfrac12 \varphi^\top \hat C \varphi
    - \tfrac\lambda2 \lVert \varphi - \beta \varphi_{t-1} \rVert^2$$

    is largest: in what the batch leaves open, the last one. For curvatures of far fewer examples than parameters, such
    as that of [`kfax.SampleSpaceCurvature`][]. Costs another solve. A velocity that is kept after an undone step is
    projected as well.

    ??? cite "Source"
        Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190, section 3 (SPRING). Differs: the update as it was taken
        is carried on, with its learning rate.
    """

    momentum: Scalar | Schedule

    def __init__(self, momentum: ArrayLike | Schedule = 0.99):
        """**Arguments:**

        - `momentum`: β in [0, 1], a number or a schedule.

        **Raises:** `ValueError` for values out of their range.
        """
        self.momentum = number_or_schedule("momentum", momentum, within_closed_unit)


class Rejection(eqx.Module):
    """Undoes a step after which the loss on the same batch is higher, or not finite.

    Parameters, velocity and model state are then as before the step. An adaptive damping is raised, at whatever period
    it is adjusted, and the inverse is computed anew for the next step. If the next step has to be undone as well, the
    velocity is set to zero, since with a momentum that is given no damping could help. The loss is evaluated once more
    at each step.
    Meant for large batches: on a small one a step that helps in the mean may well raise the loss.
    """

    tolerance: Scalar

    def __init__(self, tolerance: ArrayLike = 1e-6):
        """**Arguments:**

        - `tolerance`: by how much the loss may rise, relative to its absolute value: for rounding errors.
        """
        self.tolerance = nonnegative("tolerance", tolerance)

    def accepts(self, before: Scalar) -> Callable[[Scalar], Bool[Array, ""]]:
        """Whether a step from this loss to another is to be taken."""
        return lambda after: after <= before + self.tolerance * jnp.abs(before)
