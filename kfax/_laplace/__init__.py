from .laplace import Laplace as Laplace
from .predictive import Predictive as Predictive
