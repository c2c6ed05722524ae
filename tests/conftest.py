"""Every test runs with shapes and types checked at run time, in float64, on four CPU devices."""

import collections
import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import pytest


if "kfax" in sys.modules or "jax" in sys.modules:
    raise pytest.UsageError("JAX or kfax was imported before the tests could set them up: run pytest by itself.")

# Most of the time goes into compiling programs that run once: let XLA and LLVM optimize less, which takes half of it.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if [int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]] < [0, 11]:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # newer ones abort at a flag that they do not know
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

# Many programs are compiled by several tests, and by the processes that some of them start: these share them. Worker
# processes have a folder each, since JAX may read in one process what it has not written to its end in another.
if "PYTEST_XDIST_WORKER" in os.environ:
    folder = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["PYTEST_XDIST_WORKER"])
else:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="kfax-tests-")
    folder = PROGRAMS.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# LAPACK's own threads, two processes' worth of them on two cores, would spend their time waiting for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# A collective blocks a thread of each device until all are there. With no more threads than devices, two of them that
# devices come to in different orders wait for each other forever.
os.environ.setdefault("PJRT_NPROC", "16")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # takes effect only before JAX starts

MAPPINGS = pathlib.Path("/proc/self/maps")

install_import_hook("kfax", "beartype.beartype")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def release_programs():
    """Compiled programs are mapped into memory, and Linux allows a process 65,530 such mappings."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """How many rows of the tables of cases ran, code blocks of the documentation, and generated cases by outcome."""
    reports = terminalreporter.stats.get("passed", [])
    generated = collections.Counter()
    for report in [*reports, *terminalreporter.stats.get("failed", [])]:
        for name, value in report.user_properties:
            if name.startswith("generated "):
                generated[name.removeprefix("generated ")] += value
    if generated:
        terminalreporter.write_line("generated: " + ", ".join(f"{v} {name}" for name, v in sorted(generated.items())))
    num_blocks = sum(value for r in reports for name, value in r.user_properties if name == "code blocks")
    if num_blocks:
        terminalreporter.write_line(f"{num_blocks} code blocks of README and documentation ran")
    passed = [r for r in reports if "combination" in r.keywords]
    by_file = collections.Counter(report.nodeid.partition("::")[0].removeprefix("tests/") for report in passed)
    if by_file:
        counts = ", ".join(f"{name} {number}" for name, number in sorted(by_file.items()))
        terminalreporter.write_line(f"{len(passed)} combinations of the tables of cases passed: {counts}")
