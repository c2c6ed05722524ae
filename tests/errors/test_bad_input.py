"""Wrong values in each argument of whatever users call, without the run-time type checker, as users have it.

Outcomes, of which the last must not be: a clear error that names the argument, another clear error of kfax, an error of
the function that was given (a batch, say, goes to nothing but `loss_fn`), accepted, and an unclear error.
"""

import collections
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import kfax


HERE = pathlib.Path(__file__).parent
PAGES = HERE.parent.parent / "docs" / "api"
OUTCOMES = ("named", "clear", "own", "accepted", "unclear")

MADE_BY_KFAX = "holds what kfax computed, and is made by kfax only"
NO_ARGUMENT = "takes none"
INNER = {  # kfax calls these, and those that a user writes: they have a page of their own
    *re.findall(r"^::: kfax\.(\w+)$", (PAGES / "extending.md").read_text(), re.MULTILINE),
    *("CurvatureEstimator", "CurvatureSource", "CotangentSource", "DampingRule", "Loss", "NaturalLoss", "Weighting"),
    *("Fraction", *(name for name in vars(kfax) if name.startswith("Tagged"))),  # whose calls are not its construction
}
NOT_CALLED = {
    **dict.fromkeys(
        INNER - {name for name in vars(kfax) if re.fullmatch("Fraction|Tagged(?!Layer).*", name)}, "by kfax"
    ),
    **dict.fromkeys(
        (
            *("BlockDiagonalState", "PlacedState", "BlockCurvature", "ExplicitExactState", "ImplicitExactState"),
            *("SampleSpaceState", "SampleSpaceBatch", "ConjugateGradientsState", "Predictive", "Eigendecomposition"),
            *("OptimizerState", "StepInfo", "StepResult", "LayerNorms", "PreconditionerState"),
            *("ScaleByCurvatureState", "KroneckerFactors", "CorrectedFactors", "WeightedFactors"),
            *("Coverage", "CoverageRow", "DeviceRow", "Weighting", "SoftmaxCrossEntropy", "SigmoidCrossEntropy"),
            *("SquaredError", "PoissonNLL", "GaussianNLL", "FunctionLoss", "EnergyLoss"),
        ),
        MADE_BY_KFAX,
    ),
    **dict.fromkeys(
        (
            *(
                "Hessian",
                "ExactGGN",
                "ExactFisher",
                "EmpiricalFisher",
                "Diagonal",
                "ScaledIdentity",
                "Cholesky",
                "Eigh",
            ),
            *("Expand", "Reduce"),
        ),
        NO_ARGUMENT,
    ),
    **dict.fromkeys(("categorical", "multi_bernoulli", "normal"), "another name of a function that is tried"),
    "default_registry": "no function",
}

# Arguments with which errors are still unclear, and why that was left.
REMAINING = {
    **dict.fromkeys(
        (
            *("check.loss_fn", "ConjugateGradients.update.loss_fn", "BlockDiagonalCurvature.update.loss_fn"),
            *("ExplicitExactCurvature.update.loss_fn", "ImplicitExactCurvature.update.loss_fn"),
            *("SampleSpaceCurvature.update.loss_fn", "PlacedCurvature.update.loss_fn", "function_loss.function"),
            *("function_loss.sample", "Laplace.predict.function"),
        ),
        "a function of other arguments: Python says which ones it takes",
    ),
    **dict.fromkeys(("check.frozen", "check.example_axis"), "a static field that is no function, no string"),
    **dict.fromkeys(
        (
            *("BlockDiagonalCurvature.to_dense.parameters", "PlacedCurvature.to_dense.parameters"),
            *("ImplicitExactCurvature.to_dense.parameters", "SampleSpaceCurvature.to_dense.parameters"),
            *("SampleSpaceCurvature.eigenvalues.parameters", "SampleSpaceCurvature.solve.vector"),
            *("SampleSpaceCurvature.as_preconditioner.parameters", "SampleSpaceCurvature.update.state"),
            *("ImplicitExactCurvature.solve.state", "ImplicitExactCurvature.solve.vector"),
            *("ImplicitExactCurvature.power.state", "ImplicitExactCurvature.power.exponent"),
            *("ImplicitExactCurvature.gram.vectors", "ImplicitExactCurvature.multiply_jacobian_transpose.vectors"),
            *("ImplicitExactCurvature.multiply_factor.vector", "BlockDiagonalCurvature.refresh.only"),
            "ConjugateGradients.update.model",
        ),
        "not mended yet: an error of JAX or Python",
    ),
}


_ENTRY = re.compile(r"^::: kfax\.(\w+)\n((?:    options:|      members:|        - \w+|\n)*)", re.MULTILINE)
_ESTIMATORS = [name for name in vars(kfax) if re.fullmatch(r"(?!Block)\w+Curvature|BlockDiagonalCurvature", name)]
_CALLED_BY_THE_OPTIMIZER = (
    *("check", "linearize", "measure", "fold", "nothing", "add", "fold_finite", "refresh_finite", "weight"),
)
REFUSED = {  # whatever the arguments are
    *("ImplicitExactCurvature.eigenvalues", "ImplicitExactCurvature.diagonal", "ImplicitExactCurvature.decompose"),
    *("SampleSpaceCurvature.diagonal", "SampleSpaceCurvature.decompose"),
}


def callables():
    """All that users call: what the pages show, with the methods that they list."""
    text = "\n".join(path.read_text() for path in PAGES.glob("*.md"))
    methods = {name: re.findall(r"- (\w+)", members) for name, members in _ENTRY.findall(text)}
    asked = set(methods["CurvatureEstimator"]) - set(_CALLED_BY_THE_OPTIMIZER)
    for name in _ESTIMATORS:
        methods[name] = sorted({*methods[name], *asked})
    for name in methods:
        item = getattr(kfax, name)
        if name not in NOT_CALLED:
            yield name
        if not inspect.isclass(item) or name in INNER:
            continue
        for method in methods[name]:
            function = inspect.getattr_static(item, method)
            if method[0] != "_" and inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1:
                yield f"{name}.{method}"


@pytest.fixture(scope="module")
def lines():
    """In a process of its own, in which types are not checked."""
    result = subprocess.run([sys.executable, str(HERE / "bad_input.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_each_callable_has_a_right_call_with_all_its_arguments(lines):
    given = {name: arguments for name, (arguments, _) in lines[0].items()}
    assert not set(callables()) - REFUSED - given.keys(), "add right calls of these to bad_input_calls.py"
    assert given == {name: parameters for name, (_, parameters) in lines[0].items()}


def test_no_wrong_value_has_an_unclear_error(lines, capsys):
    rows = lines[1:]
    table = collections.defaultdict(collections.Counter)
    for name, _, _, outcome, _ in rows:
        table[name][outcome] += 1
    with capsys.disabled():
        print(f"\n{'':45}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
        for name, counts in {**table, "total": sum(table.values(), collections.Counter())}.items():
            print(f"{name:45}" + "".join(f"{counts[outcome]:10}" for outcome in OUTCOMES))
    found = {
        f"{name}.{argument}": f"{wrong}: {text}" for name, argument, wrong, kind, text in rows if kind == "unclear"
    }
    assert not {key: text for key, text in found.items() if key not in REMAINING}
    assert found.keys() == REMAINING.keys(), "what is mended leaves the table"
