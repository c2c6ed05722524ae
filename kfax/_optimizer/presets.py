"""Two settings of the optimizer that work in most cases, with their reasons."""

from collections.abc import Callable

from jaxtyping import ArrayLike

from .._estimators import BlockDiagonalCurvature, CurvatureEstimator
from .._math.types import Schedule, Where
from .damping import LevenbergMarquardt, RelativeDamping
from .eigenbasis_adam import EigenbasisAdam
from .l2 import L2
from .optimizer import Optimizer
from .preconditioner import Preconditioner
from .quadratic import QuadraticModel
from .rescale import Rejection
from .weight_decay import WeightDecay


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
    weight_decay: ArrayLike | WeightDecay | None = None,
    l2: ArrayLike | L2 | None = None,
    estimator: BlockDiagonalCurvature | None = None,
    frozen: Where | None = None,
) -> Optimizer:
    """An optimizer for mini-batches: Adam in the eigenbases of the curvature, [`kfax.EigenbasisAdam`][].

    It is tuned as AdamW is: a learning rate, best with a warmup and a decay to zero, and perhaps a weight decay. Good
    learning rates are about those of Adam: 0.01 is a good first try. None depends on the unit of the
    loss. λ is 1e-16, the square of Adam's 1e-8.

    **Arguments:** as for [`kfax.Optimizer`][], and:

    - `learning_rate`: α, a number or a schedule. [param]
    - `estimator`: of the curvature; `kfax.BlockDiagonalCurvature(decay=0.6)` if not given.

    **Returns:** a [`kfax.Optimizer`][].
    """
    return Optimizer(
        loss_fn,
        learning_rate=learning_rate,
        momentum=0.0,
        damping=1e-16,
        l2=l2,
        weight_decay=weight_decay,
        preconditioner=EigenbasisAdam(estimator),
        frozen=frozen,
    )
