"""An optimizer whose settings are right but for those given."""

from typing import Any

import kfax


def optimizer(loss_fn, **options):
    settings: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1.0}
    return kfax.Optimizer(loss_fn, **(settings | options))
