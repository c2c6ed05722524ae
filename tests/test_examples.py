"""Each example in its smoke mode, in a process of its own, as a user runs it."""

import pathlib
import subprocess
import sys

import pytest


EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
VARIANTS = {
    "digits_classifier": [[]],
    "autoencoder": [["--batch-size", "64"], ["--data", "curves"], []],
    "transformer": [[]],
    "convnet": [[]],
    "curvature_spectrum": [[], ["--width", "20"]],
    "spectral_density": [[]],
    "ensemble_sweep": [[]],
    "lora": [[]],
    "custom_loss": [[]],
    "helium": [[]],
    "poisson": [["--dimension", "5"], []],
    "heat": [[]],
    "influence": [[]],
    "laplace": [[]],
    "pruning": [[]],
    "continual": [[]],
    "optax_chain": [[]],
    "preconditioned_cg": [[]],
}
# These are run by tests of their own, and by `.ci/processes`.
OTHERS = ("resume", "multi_host")
# What is printed, if not a comparison of optimizers.
PRINTED = {
    "curvature_spectrum": ("K-FAC", "exact GGN", "full blocks", "trace"),
    "spectral_density": ("exact", "matfree", "±", "K-FAC"),
    "ensemble_sweep": ("averaged predictions", "sweep"),
    "lora": ("K-FAC", "Adam", "before"),
    "custom_loss": ("Student's t", "squared error", "distance"),
    "helium": ("SPRING", "Adam", "variance"),
    "poisson": ("Gauss-Newton", "sample space", "K-FAC", "L-BFGS", "Adam"),
    "heat": ("Gauss-Newton", "K-FAC", "Adam"),
    "influence": ("loss", "self-influence, K-FAC", "held-out accuracy"),
    "laplace": ("exact", "K-FAC", "log evidence", "in the gap"),
    "pruning": ("magnitude", "OBD, diagonal", "OBS, K-FAC", "OBS, exact"),
    "continual": ("no penalty", "diagonal", "K-FAC", "both at once"),
    "optax_chain": ("scale_by_curvature", "scale_by_adam"),
    "preconditioned_cg": ("no preconditioner", "diagonal", "exact damping"),
}
# Of an example with several variants all but the last are slow.
RUNS = [
    pytest.param(path, options, id=" ".join([path.stem, *options]), marks=[] if is_last else [pytest.mark.slow])
    for path in EXAMPLES
    if path.stem not in OTHERS
    for options in VARIANTS[path.stem]
    for is_last in [options is VARIANTS[path.stem][-1]]
]


@pytest.mark.parametrize(("path", "options"), RUNS)
def test_smoke(path, options, tmp_path):
    command = [sys.executable, "-W", "error", path, "--smoke", "--output", tmp_path / "plot.png", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert all(word in result.stdout for word in PRINTED.get(path.stem, ("K-FAC", "Adam", "compile s")))


def test_training_is_resumed_on_another_number_of_devices(tmp_path):
    """Also `tests/optimizer/test_resume.py`."""

    def run(*options):
        paths = ["--checkpoint", tmp_path / "folder", "--output", tmp_path / "plot.png"]
        command = [sys.executable, "-W", "error", EXAMPLES[0].parent / "resume.py", *paths, *options]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "step 3, loss" in run("--devices", 4, "--smoke")
    found = run("--devices", 2, "--steps", 5)
    assert "goes on from step 3" in found and "step 5, loss" in found
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_stay_short(path):
    assert path.read_text().count("\n") < 150
