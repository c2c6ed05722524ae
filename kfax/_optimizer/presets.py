"""Two settings of the optimizer that work in most cases, with their reasons."""

from collections.abc import Callable

from jaxtyping import ArrayLike

from .._estimators import BlockDiagonalCurvature, CurvatureEstimator, PlacedCurvature
from .._math.types import Schedule, Where
from .damping import DampingRule, LevenbergMarquardt, RelativeDamping
from .l2 import L2
from .optimizer import Optimizer
from .preconditioner import Preconditioner, Staggered
from .quadratic import QuadraticModel
from .rescale import NormConstraint, Rejection


def full_batch(
    loss_fn: Callable,
    *,
    l2: ArrayLike | L2 | None = None,
    estimator: CurvatureEstimator | None = None,
    quadratic_model: QuadraticModel | None = None,
    frozen: Where | None = None,
) -> Optimizer:
    """An optimizer for batches that are the data set, or a large part of it: nothing to tune.

    Learning rate and momentum minimize the exact quadratic model ([`kfax.QuadraticModel`][]), since on so many examples
    it can be trusted. λ starts at the mean eigenvalue of the curvature, whatever the scale of the loss, and is adapted
    by [`kfax.LevenbergMarquardt`][], with a factor of 0.8 for each step so that it gets from a wrong start to where it
    belongs within some ten steps; 1e-4 of the mean eigenvalue is the least. Steps that raise the loss are undone, and λ
    raised. Statistics are taken only when inverses are computed from them, every 5 steps, and their running average has
    a decay of 0.5: many examples leave little noise to be averaged, and it follows quickly. These numbers were found on
    the autoencoder of the benchmarks, with another seed than theirs, among some twenty settings.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, algorithm 2. Differs: the relative λ, the faster adaptation and
        average, and rejection.

    **Arguments:** as for [`kfax.Optimizer`][], and:

    - `estimator`: of the curvature; `kfax.BlockDiagonalCurvature(decay=0.5)` if not given. Since λ is relative, not
        [`kfax.ImplicitExactCurvature`][].
    - `quadratic_model`: which chooses learning rate and momentum; [`kfax.QuadraticModel`][]`()` if not given. For
        losses without a generalized Gauss-Newton matrix give both estimator and model another source.

    **Returns:** a [`kfax.Optimizer`][].
    """
    auto = QuadraticModel() if quadratic_model is None else quadratic_model
    if not isinstance(auto, QuadraticModel):
        raise ValueError(f"`quadratic_model` must be a `kfax.QuadraticModel(...)` or `None`, got {auto!r}.")
    estimator = BlockDiagonalCurvature(decay=0.5) if estimator is None else estimator
    return Optimizer(
        loss_fn,
        learning_rate=auto,
        momentum=auto,
        damping=RelativeDamping(LevenbergMarquardt(1.0, decay=0.8, period=5, minimum=1e-4)),
        l2=l2,
        preconditioner=Preconditioner(estimator, inverse_update_period=5, curvature_update_period=5),
        rejection=Rejection(),
        frozen=frozen,
    )


def stochastic(
    loss_fn: Callable,
    *,
    learning_rate: ArrayLike | Schedule,
    damping: ArrayLike | Schedule | DampingRule | RelativeDamping = 1e-2,
    bound: ArrayLike | Schedule = 1e-3,
    l2: ArrayLike | L2 | None = None,
    estimator: BlockDiagonalCurvature | PlacedCurvature | None = None,
    frozen: Where | None = None,
) -> Optimizer:
    """An optimizer for mini-batches: a learning rate to choose, best with a schedule that decays, and perhaps λ.

    On a mini-batch neither its quadratic model nor the change of its own loss says much about the loss, so nothing is
    chosen by them. A [`kfax.NormConstraint`][] keeps steps in reach of the quadratic model while the curvature
    changes quickly, which takes the place of a warmup. Inverses are renewed over 10 steps, some at each of them. These
    numbers were found on the digits of the benchmarks, among some ten settings.

    λ is not relative to the curvature: where the data can be fitted the curvature vanishes with the cross entropy, and
    a λ that vanishes with it lets the steps grow. On the digits nine runs of ten diverged in this way.

    ??? cite "Source"
        Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored approximations".

    **Arguments:** as for [`kfax.Optimizer`][], and:

    - `learning_rate`: α, a number or a schedule: from 0.1 down is a good first try.
    - `damping`: λ. This default and the next are for losses of some nats for each example, such as the cross entropy
        of a classification: multiply both by whatever your loss is multiplied by. [loss/param²]
    - `bound`: κ of the [`kfax.NormConstraint`][]. [loss]
    - `estimator`: of the curvature; `kfax.BlockDiagonalCurvature()` if not given, and none but such or a
        [`kfax.PlacedCurvature`][], since its blocks are refreshed one after the other.

    **Returns:** a [`kfax.Optimizer`][].
    """
    return Optimizer(
        loss_fn,
        learning_rate=NormConstraint(learning_rate, bound),
        momentum=0.9,
        damping=damping,
        l2=l2,
        preconditioner=Preconditioner(estimator, inverse_update_period=Staggered(10)),
        frozen=frozen,
    )
