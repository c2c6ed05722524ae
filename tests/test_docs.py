"""The code in README and documentation runs, prints what they say it prints, and API pages list what exists."""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest

import kfax


ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))

# A line of its own, between what one block prints and what the next one does.
SEPARATOR = "\x1e"


def blocks(text):
    """The code blocks of a page as (language, index of the first line, lines)."""
    found, language, start = [], None, 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if language is None:
            language, start = line.strip().removeprefix("```"), i + 1
        else:
            found.append((language, start, lines[start:i]))
            language = None
    assert language is None, "a code block is not closed"
    return found


def as_script(page):
    """The Python blocks of a page on the lines where they stand there, with a separator printed after each."""
    text = page.read_text(encoding="utf-8")
    script = [""] * (len(text.splitlines()) + 1)
    for language, start, lines in blocks(text):
        if language == "python":
            script[start : start + len(lines)] = lines
            script[start + len(lines)] = f"print({SEPARATOR!r})"
    return "\n".join(script) + "\n"


def expected_outputs(page):
    """For each Python block what the page shows as its output, in a `text` block after it; else `None`."""
    found = [*blocks(page.read_text(encoding="utf-8")), ("", 0, [])]
    outputs = []
    for (language, _, _), (next_language, _, next_lines) in itertools.pairwise(found):
        if language == "python":
            outputs.append("\n".join(next_lines) if next_language == "text" else None)
    return outputs


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if expected_outputs(page)], ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, record_property):
    # In a process of its own: readers have JAX's defaults, not the settings of these tests.
    script = tmp_path / f"{page.stem}.py"
    script.write_text(as_script(page), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-X", "utf8", str(script)]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in less time
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, f"line numbers are those of {name_of(page)}:\n{result.stderr}"
    *printed, rest = result.stdout.split(f"{SEPARATOR}\n")
    assert rest == ""
    for output, expected in zip(printed, expected_outputs(page), strict=True):
        if expected is not None:
            assert output.rstrip("\n") == expected
    record_property("code blocks", len(printed))


@pytest.mark.parametrize("page", API_PAGES, ids=name_of)
def test_the_members_listed_on_an_api_page_exist(page):
    for name, options in re.findall(r"^::: kfax\.(\w+)\n((?: {4}.*\n)*)", page.read_text("utf-8"), re.M):
        missing = set(re.findall(r"^ +- (\w+)$", options, re.M)) - set(dir(getattr(kfax, name)))
        assert not missing, f"kfax.{name} has no {missing}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bkfax((?:\.[A-Za-z_]\w*)+)", text):
        functools.reduce(getattr, name.split(".")[1:], kfax)
    for path in re.findall(r"\b(?:benchmarks|docs|examples|kfax|tests)/[\w/-]+\.\w+", text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path  # links are relative to the page


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=name_of)
def test_every_example_has_a_page_with_its_code(example):
    page = ROOT / "docs" / "examples" / f"{example.stem}.md"
    assert f'--8<-- "examples/{example.name}"' in page.read_text(encoding="utf-8").splitlines()
    assert f"({page.name})" in (page.parent / "index.md").read_text(encoding="utf-8")
