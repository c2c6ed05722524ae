from .base import Block as Block, BlockState as BlockState, Recorded as Recorded
from .gradients import Diagonal as Diagonal, Full as Full, GradientBlock as GradientBlock, UnitWise as UnitWise
from .kronecker import KroneckerFactored as KroneckerFactored
from .kronecker_sum import KroneckerSum as KroneckerSum
from .sharing import (
    Expand as Expand,
    FactorSizes as FactorSizes,
    KroneckerFactors as KroneckerFactors,
    Reduce as Reduce,
    Sharing as Sharing,
)
