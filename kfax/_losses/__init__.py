from .base import Loss as Loss, NaturalLoss as NaturalLoss, Weighting as Weighting
from .bernoulli import (
    sigmoid_cross_entropy as sigmoid_cross_entropy,
    SigmoidCrossEntropy as SigmoidCrossEntropy,
)
from .categorical import (
    softmax_cross_entropy as softmax_cross_entropy,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
)
from .check import check_loss as check_loss
from .energy import energy_loss as energy_loss, EnergyLoss as EnergyLoss
from .function import function_loss as function_loss, FunctionLoss as FunctionLoss
from .gaussian import squared_error as squared_error, SquaredError as SquaredError
from .learned_variance import gaussian_nll as gaussian_nll, GaussianNLL as GaussianNLL
from .partial import of_all_examples as of_all_examples
from .penalty import Penalty as Penalty
from .poisson import poisson_nll as poisson_nll, PoissonNLL as PoissonNLL
