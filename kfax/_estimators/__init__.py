from .base import CurvatureEstimator as CurvatureEstimator
from .block_diagonal import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
    BlockDiagonalState as BlockDiagonalState,
)
from .implicit_exact import ImplicitExactCurvature as ImplicitExactCurvature
