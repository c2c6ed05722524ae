"""Every test runs with shapes and types checked at run time, in float64, on four CPU devices."""

import sys

import jax
import pytest
from jaxtyping import install_import_hook


if "kfax" in sys.modules:
    raise pytest.UsageError("kfax was imported before the run-time type checker was installed: run pytest by itself.")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # takes effect only before JAX starts

install_import_hook("kfax", "beartype.beartype")


@pytest.fixture
def key():
    return jax.random.key(0)
