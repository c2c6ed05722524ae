from .base import Loss as Loss, Weighting as Weighting
from .bernoulli import (
    sigmoid_cross_entropy as sigmoid_cross_entropy,
    SigmoidCrossEntropy as SigmoidCrossEntropy,
)
from .categorical import (
    softmax_cross_entropy as softmax_cross_entropy,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
)
from .gaussian import squared_error as squared_error, SquaredError as SquaredError
