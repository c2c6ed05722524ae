"""What estimators have in common whose state holds their last batch."""

from typing import Any, NoReturn

from .._capture import Problem
from .._math.types import Parameters
from .base import CurvatureEstimator
from .products import check_layout, layout_of


class LastBatchCurvature(CurvatureEstimator):
    """An estimator of the curvature of the last batch, which its state holds, to be run again."""

    def nothing(self, state: Any) -> NoReturn:
        self._refuse_several()

    def add(self, measured: Any, more: Any) -> NoReturn:
        self._refuse_several()

    def _refuse_several(self) -> NoReturn:
        raise ValueError(
            f"`{type(self).__name__}` holds its batch itself, which cannot be several. Use "
            "`kfax.ExplicitExactCurvature`, or `kfax.BlockDiagonalCurvature`; or, for products, the sum of the "
            "operators of several states (`as_operator`)."
        )


def check_seen(problem: Problem | None, *vectors: Parameters) -> Problem:
    """The batch of a state, on which vectors must be like the parameters."""
    if problem is None:
        raise ValueError("No batch was seen yet: `state = estimator.update(state, loss_fn, model, batch)`.")
    for vector in vectors:
        check_layout(vector, layout_of(problem.parameters))
    return problem
