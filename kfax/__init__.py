"""Curvature estimation and K-FAC optimization for JAX and Equinox."""

from importlib.metadata import version as _version

from ._blocks import (
    Block as Block,
    BlockState as BlockState,
    Cholesky as Cholesky,
    Diagonal as Diagonal,
    Eigh as Eigh,
    Expand as Expand,
    FactorSizes as FactorSizes,
    Full as Full,
    GradientBlock as GradientBlock,
    Inverse as Inverse,
    Inversion as Inversion,
    KroneckerFactored as KroneckerFactored,
    KroneckerFactors as KroneckerFactors,
    KroneckerSum as KroneckerSum,
    Product as Product,
    ProductBlock as ProductBlock,
    Recorded as Recorded,
    Reduce as Reduce,
    ScaledIdentity as ScaledIdentity,
    Sharing as Sharing,
    Spectrum as Spectrum,
    TensorNormal as TensorNormal,
    UnitWise as UnitWise,
)
from ._check import check as check
from ._coverage import Coverage as Coverage, coverage as coverage, CoverageRow as CoverageRow
from ._damping import (
    DampingMultiple as DampingMultiple,
    DampingRule as DampingRule,
    FixedDamping as FixedDamping,
    LevenbergMarquardt as LevenbergMarquardt,
    RelativeDamping as RelativeDamping,
    ScheduledDamping as ScheduledDamping,
)
from ._estimators import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
    BlockDiagonalState as BlockDiagonalState,
    CurvatureEstimator as CurvatureEstimator,
    Eigendecomposition as Eigendecomposition,
    ExplicitExactCurvature as ExplicitExactCurvature,
    ExplicitExactState as ExplicitExactState,
    Hessian as Hessian,
    ImplicitExactCurvature as ImplicitExactCurvature,
    ImplicitExactState as ImplicitExactState,
)
from ._fold import Use as Use
from ._l2 import L2 as L2
from ._layers import (
    Blocks as Blocks,
    masked as masked,
    Slots as Slots,
    TaggedBatchNorm as TaggedBatchNorm,
    TaggedConv as TaggedConv,
    TaggedConvTranspose as TaggedConvTranspose,
    TaggedEmbedding as TaggedEmbedding,
    TaggedGRUCell as TaggedGRUCell,
    TaggedLayer as TaggedLayer,
    TaggedLinear as TaggedLinear,
    TaggedLSTMCell as TaggedLSTMCell,
    TaggedModule as TaggedModule,
    TaggedNorm as TaggedNorm,
    TaggedPReLU as TaggedPReLU,
)
from ._losses import (
    check_loss as check_loss,
    function_loss as function_loss,
    FunctionLoss as FunctionLoss,
    gaussian_nll as gaussian_nll,
    GaussianNLL as GaussianNLL,
    Loss as Loss,
    NaturalLoss as NaturalLoss,
    Penalty as Penalty,
    poisson_nll as poisson_nll,
    PoissonNLL as PoissonNLL,
    sigmoid_cross_entropy as sigmoid_cross_entropy,
    SigmoidCrossEntropy as SigmoidCrossEntropy,
    softmax_cross_entropy as softmax_cross_entropy,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
    squared_error as squared_error,
    SquaredError as SquaredError,
    Weighting as Weighting,
)
from ._operations import (
    Arbitrary as Arbitrary,
    Convolution as Convolution,
    Dense as Dense,
    FactoredOperation as FactoredOperation,
    Invocation as Invocation,
    Lookup as Lookup,
    MatrixShape as MatrixShape,
    Operation as Operation,
    ScaleAndShift as ScaleAndShift,
    Transposed as Transposed,
    Windows as Windows,
)
from ._optax import scale_by_curvature as scale_by_curvature, ScaleByCurvatureState as ScaleByCurvatureState
from ._optimizer import Optimizer as Optimizer
from ._passes import Fraction as Fraction
from ._preconditioner import (
    Preconditioner as Preconditioner,
    PreconditionerState as PreconditionerState,
    Staggered as Staggered,
)
from ._presets import full_batch as full_batch, stochastic as stochastic
from ._quadratic import QuadraticModel as QuadraticModel
from ._registry import (
    default_registry as default_registry,
    parameters_of as parameters_of,
    Registry as Registry,
    set_block as set_block,
    tag as tag,
    untag as untag,
)
from ._rescale import NormConstraint as NormConstraint, Rejection as Rejection
from ._sources import (
    CotangentSource as CotangentSource,
    CurvaturePropagation as CurvaturePropagation,
    CurvatureSource as CurvatureSource,
    EmpiricalFisher as EmpiricalFisher,
    ExactFisher as ExactFisher,
    ExactGGN as ExactGGN,
    SampledFisher as SampledFisher,
)
from ._step import (
    LayerNorms as LayerNorms,
    OptimizerState as OptimizerState,
    StepInfo as StepInfo,
    StepResult as StepResult,
)


# The losses by the names of the distributions of which they are the negative log-likelihoods.
categorical = softmax_cross_entropy
multi_bernoulli = sigmoid_cross_entropy
normal = squared_error

__version__ = _version("kfax")
