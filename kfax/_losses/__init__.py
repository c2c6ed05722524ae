from .base import Loss as Loss, Weighting as Weighting
from .bernoulli import (
    multi_bernoulli as multi_bernoulli,
    sigmoid_cross_entropy as sigmoid_cross_entropy,
    SigmoidCrossEntropy as SigmoidCrossEntropy,
)
from .categorical import (
    categorical as categorical,
    softmax_cross_entropy as softmax_cross_entropy,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
)
from .gaussian import normal as normal, squared_error as squared_error, SquaredError as SquaredError
