from .across import Across as Across, across as across, mean_across as mean_across, on_each as on_each
from .check import check as check, check_observed as check_observed, check_values as check_values
from .evaluate import evaluate as evaluate, Evaluation as Evaluation, split_key as split_key, value as value
from .linearize import (
    Cotangents as Cotangents,
    Linearization as Linearization,
    linearize as linearize,
    Problem as Problem,
    Reading as Reading,
)
from .outputs import linearize_outputs as linearize_outputs, Outputs as Outputs
