from .base import (
    Block as Block,
    BlockState as BlockState,
    MatrixShape as MatrixShape,
    Recorded as Recorded,
    Rows as Rows,
)
from .kronecker import KroneckerFactored as KroneckerFactored
from .sharing import (
    Expand as Expand,
    KroneckerFactors as KroneckerFactors,
    Reduce as Reduce,
    Sharing as Sharing,
)
