from .arbitrary import Arbitrary as Arbitrary, Invocation as Invocation
from .base import FactoredOperation as FactoredOperation, MatrixShape as MatrixShape, Operation as Operation
from .convolution import Convolution as Convolution, Windows as Windows
from .dense import Dense as Dense
from .lookup import Lookup as Lookup
from .scale_shift import ScaleAndShift as ScaleAndShift
from .transposed import Transposed as Transposed
