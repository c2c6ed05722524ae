"""A benchmark in its smoke mode, in a process of its own, as a user runs it."""

import json
import pathlib
import subprocess
import sys

import pytest


PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "minibatch.py"
TASKS = ("digits", "convnet", "text", "rows", "teacher")


# All but the last are slow.
@pytest.mark.parametrize("task", [*(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[:-1]), TASKS[-1]])
def test_minibatch(task, tmp_path):
    command = [sys.executable, "-W", "error", PATH, "--smoke", "--tasks", task, "--results", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{task}, kfax, 10 steps, seed 1" in result.stdout
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["adamw", "muon", "soap", "kfac", "kfax"]
    assert rows[0]["seeds_that_reach"] == 2 and all(row["milliseconds"] > 0 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
