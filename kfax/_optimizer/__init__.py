from .damping import (
    DampingMultiple as DampingMultiple,
    DampingRule as DampingRule,
    FixedDamping as FixedDamping,
    LevenbergMarquardt as LevenbergMarquardt,
    RelativeDamping as RelativeDamping,
    ScheduledDamping as ScheduledDamping,
)
from .eigenbasis_adam import EigenbasisAdam as EigenbasisAdam, EigenbasisAdamState as EigenbasisAdamState
from .l2 import L2 as L2
from .optax import scale_by_curvature as scale_by_curvature, ScaleByCurvatureState as ScaleByCurvatureState
from .optimizer import Optimizer as Optimizer
from .passes import Fraction as Fraction
from .preconditioner import (
    Preconditioner as Preconditioner,
    PreconditionerState as PreconditionerState,
    Staggered as Staggered,
)
from .presets import full_batch as full_batch, stochastic as stochastic
from .quadratic import QuadraticModel as QuadraticModel
from .rescale import (
    LossConstraint as LossConstraint,
    NormConstraint as NormConstraint,
    ProjectedMomentum as ProjectedMomentum,
    Rejection as Rejection,
)
from .state import (
    LayerNorms as LayerNorms,
    OptimizerState as OptimizerState,
    StepInfo as StepInfo,
    StepResult as StepResult,
)
from .weight_decay import WeightDecay as WeightDecay
