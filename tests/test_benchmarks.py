"""Benchmarks in their smoke mode, in a process of their own, as a user runs them."""

import json
import pathlib
import subprocess
import sys

import pytest


FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def all_but_last_slow(*names):
    return [*(pytest.param(name, marks=pytest.mark.slow) for name in names[:-1]), names[-1]]


def run(name, *options, cwd):
    command = [sys.executable, "-W", "error", FOLDER / name, "--smoke", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("task", all_but_last_slow("digits", "convnet", "text", "rows", "teacher"))
def test_minibatch(task, tmp_path):
    printed = run("minibatch.py", "--tasks", task, "--results", tmp_path, cwd=tmp_path)
    assert f"{task}, kfax, 10 steps, seed 1" in printed
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["adamw", "muon", "soap", "kfac", "kfax"]
    assert rows[0]["seeds_that_reach"] == 2 and all(row["milliseconds"] > 0 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", all_but_last_slow("adaptive", "kfac", "stochastic"))
def test_soak(method, tmp_path):
    """The script itself compares the bits of the two runs."""
    table = [line.split(" | ") for line in run("soak.py", "--methods", method, cwd=tmp_path).splitlines()]
    rows = [[cell.strip("| ") for cell in line] for line in table[2:]]
    assert [line[1:4] for line in rows] == [["killed", "2", "3"], ["neither", "1", "0"]]
    assert rows[0][-1] == rows[1][-1]
