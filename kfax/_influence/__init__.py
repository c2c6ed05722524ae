from .conjugate_gradients import (
    ConjugateGradients as ConjugateGradients,
    ConjugateGradientsState as ConjugateGradientsState,
)
from .influence import Influence as Influence
