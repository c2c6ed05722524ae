"""Puts wrong values into each argument of each right call, and prints what came of it. Run without a type checker.

`python bad_input.py n` puts in each n-th of them: another one into each argument.
"""

import inspect
import json
import pathlib
import sys
import traceback
import warnings

import equinox as eqx
import jax.numpy as jnp
from bad_input_calls import CALLS, function_of, LINEAR, OTHER

import kfax


PACKAGE = str(pathlib.Path(kfax.__file__).parent)
# Where there is what stands for a user's code: functions of the right calls, and layers that are given as functions.
OWN = str(pathlib.Path(__file__).parent), str(pathlib.Path(eqx.nn.__file__).parent)
WRONG = {
    "None": None,
    "text": "text",
    "3": 3,
    "0.5": 0.5,
    "-1": -1,
    "0": 0,
    "nan": float("nan"),
    "inf": float("inf"),
    "True": True,
    "list": [],
    "class": kfax.ExactGGN,
    "function": lambda *args, **options: None,
    "object": object(),
    "shape": jnp.ones((2, 7, 3)),
    "empty": jnp.ones((0,)),
    "integers": jnp.ones((4, 3), int),
    "booleans": jnp.ones((4, 3), bool),
    "complex": jnp.ones((4, 3), complex),
    "nans": jnp.full((4, 3), jnp.nan),
    "untagged": LINEAR,
    "other": OTHER,
    "tree": {"a": jnp.ones(2)},
}

# Left out for methods, which are dearer to call: others of their kind are tried.
RARE = ("3", "object", "class", "integers", "booleans")


def outcome(function, arguments, name):
    try:
        function(**arguments)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        notes = getattr(error, "__notes__", [])
        text = "\n".join([str(error), *notes])
        inner = frames[-1].filename
        if isinstance(error, ValueError | TypeError) and inner.startswith(PACKAGE) and f"`{name}`" in text:
            return "named", text
        if isinstance(error, ValueError | TypeError) and inner.startswith(PACKAGE) and "`" in text:
            return "clear", text
        if any(frame.filename.startswith(OWN) for frame in frames[2:]):
            return "own", text
        own = [f for f in frames if f.filename.startswith(PACKAGE)]
        where = f"{own[-1].filename.removeprefix(PACKAGE)}:{own[-1].lineno}" if own else ""
        return "unclear", f"{type(error).__name__} at {where}: {text}"
    return "accepted", ""


def named(function):
    """The parameters that have names."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sorted(name for name, each in inspect.signature(function).parameters.items() if each.kind not in several)


def main(every):
    warnings.simplefilter("ignore")
    print(json.dumps({name: (sorted(arguments), named(function_of(name))) for name, arguments in CALLS.items()}))
    place = 0
    for name, arguments in CALLS.items():
        function = function_of(name)
        try:
            function(**arguments)
        except Exception as error:
            print(json.dumps([name, "", "", "right", repr(error)]), flush=True)
            continue
        for argument, right in arguments.items():
            place += 1
            for number, (label, wrong) in enumerate(WRONG.items()):
                if (number + place) % every or wrong is right or ("." in name and label in RARE):
                    continue
                kind, text = outcome(function, arguments | {argument: wrong}, argument)
                print(json.dumps([name, argument, label, kind, text]), flush=True)


main(int(sys.argv[1]))
