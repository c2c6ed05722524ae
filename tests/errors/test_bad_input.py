"""Wrong values in each argument of whatever users call, without the run-time type checker, as users have it.

Outcomes, of which the last must not be: a clear error that names the argument, another clear error of kfax, an error of
a user's own code (a batch, say, goes to nothing but `loss_fn`; and a layer may be given where a function of something
else is asked for, which shows when it is called: the error is then its own, at its own line), accepted, and an unclear
error. Each argument is tried with some of the wrong values; with all of them in the slow test.
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
EVERY = 8  # of the wrong values one is tried
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
            "EigenbasisAdamState",
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

# Arguments that may be anything: models of which nothing is asked, and what is not used.
ANYTHING = {
    *("untag.model", "parameters_of.model", "coverage.model", "masked.module", "scale_by_curvature.update.params"),
    "SampleSpaceCurvature.redamp.parameters",
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


def outcomes(every):
    """In a process of its own, in which types are not checked."""
    command = [sys.executable, str(HERE / "bad_input.py"), str(every)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_no_wrong_value_has_an_unclear_error(every, capsys):
    calls, *rows = outcomes(every)
    given = {name: arguments for name, (arguments, _) in calls.items()}
    assert not set(callables()) - REFUSED - given.keys(), "add right calls of these to bad_input_calls.py"
    assert given == {name: parameters for name, (_, parameters) in calls.items()}
    assert not [row for row in rows if row[3] == "right"], "a call that is meant to be right"
    table = collections.defaultdict(collections.Counter)
    for name, _, _, outcome, _ in rows:
        table[name][outcome] += 1
    with capsys.disabled():
        print(f"\n{'':45}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
        for name, counts in {**table, "total": sum(table.values(), collections.Counter())}.items():
            print(f"{name:45}" + "".join(f"{counts[outcome]:10}" for outcome in OUTCOMES))
    assert not [
        f"{name}({argument}={wrong}): {text}" for name, argument, wrong, kind, text in rows if kind == "unclear"
    ]
    if every == 1:  # each argument is looked at by kfax: it is refused for something, or stands in this list
        refused = {(name, argument) for name, argument, _, kind, _ in rows if kind in ("named", "clear", "own")}
        assert {f"{name}.{argument}" for name, argument, *_ in rows if (name, argument) not in refused} == ANYTHING
