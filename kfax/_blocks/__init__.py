from .base import Block as Block, BlockState as BlockState, ProductBlock as ProductBlock, Recorded as Recorded
from .eigenvalue_corrected import CorrectedFactors as CorrectedFactors, EigenvalueCorrected as EigenvalueCorrected
from .frobenius_optimal import FrobeniusOptimal as FrobeniusOptimal
from .gradients import (
    Diagonal as Diagonal,
    Full as Full,
    GradientBlock as GradientBlock,
    ScaledIdentity as ScaledIdentity,
    UnitWise as UnitWise,
)
from .kl_optimal import KLOptimal as KLOptimal
from .kronecker import KroneckerFactored as KroneckerFactored
from .kronecker_sum import KroneckerSum as KroneckerSum
from .pieces import (
    costs_of as costs_of,
    Groups as Groups,
    groups_of as groups_of,
    is_costly as is_costly,
    Kinds as Kinds,
    Piece as Piece,
    pieces_of as pieces_of,
)
from .product import (
    check_inversion as check_inversion,
    Cholesky as Cholesky,
    Eigh as Eigh,
    immovable as immovable,
    Inverse as Inverse,
    Inversion as Inversion,
    Product as Product,
    Spectrum as Spectrum,
    unbounded as unbounded,
)
from .sharing import (
    Expand as Expand,
    FactorSizes as FactorSizes,
    KroneckerFactors as KroneckerFactors,
    Reduce as Reduce,
    Sharing as Sharing,
)
from .tensor_normal import TensorNormal as TensorNormal
from .weighted import WeightedFactors as WeightedFactors
