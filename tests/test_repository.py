"""The files beside the code can be read, and agree with pyproject.toml: workflows, issue forms, citation, support."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml


ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = [item.rpartition(" ")[2] for item in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", item)]
LOWER = dict(item.split(">=") for item in PROJECT["dependencies"])


def read(path):
    return yaml.safe_load(path.read_text("utf-8"))


def jobs(workflow):
    return read(ROOT / ".github" / "workflows" / f"{workflow}.yml")["jobs"]


def strings(node):
    """All strings in what was read, with their keys."""
    if isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from [(key, item)] if isinstance(item, str) else strings(item)


def name_of(path):
    return path.name


def test_the_oldest_python_is_the_one_that_is_required():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_support_and_getting_started_name_the_versions():
    support = (ROOT / "SUPPORT.md").read_text("utf-8").splitlines()
    assert f"| Python | {', '.join(PYTHONS)} |" in support
    assert f"| JAX | {LOWER['jax']} or newer |" in support
    assert f"| Equinox | {LOWER['equinox']} or newer |" in support
    oldest = [PYTHONS[0], *(LOWER[name] for name in ("jax", "equinox", "lineax", "optax", "jaxtyping"))]
    rows = (ROOT / "docs" / "getting-started.md").read_text("utf-8").splitlines()
    assert f"| oldest | {' | '.join(oldest)} |" in rows
    tested = {row.split(" | ")[1] for row in rows if row.startswith(("| oldest | ", "| newest | "))}
    assert tested == set(PYTHONS)


def test_the_citation_is_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert citation["title"] == PROJECT["name"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["abstract"] == PROJECT["description"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["license"] == PROJECT["license"]
    assert str(citation["version"]) == PROJECT["version"]
    assert citation.get("repository-code") == PROJECT.get("urls", {}).get("Repository")
    # Of a version that the changelog has, the date, and otherwise none.
    heading = rf"^## \[{re.escape(PROJECT['version'])}\] - (\S+)$"
    dates = re.findall(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert [str(citation[key]) for key in ("date-released",) if key in citation] == dates
    rest = {"cff-version", "message", "type", "title", "authors", "abstract", "keywords", "license", "version"}
    assert citation.keys() <= rest | {"repository-code", "date-released"}, "check the names of other keys"


def test_the_workflows_test_the_oldest_and_newest_versions():
    tests = jobs("tests")
    everything = {step["with"].get("python-version") for step in tests["everything"]["steps"] if "with" in step}
    rows = [(row["row"], row["python"]) for row in tests["versions"]["strategy"]["matrix"]["include"]]
    assert ("oldest", PYTHONS[0]) in rows
    assert {python for row, python in rows if row == "newest"} | everything - {None} == set(PYTHONS)
    for row, _ in rows:
        assert re.search(rf"^# - `{row}`", (ROOT / ".ci" / "versions").read_text("utf-8"), re.M)


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".readthedocs.yaml"], ids=name_of)
def test_pythons_and_scripts_exist(path):
    found = list(strings(read(path)))
    versions = {item for key, item in found if key in ("python", "python-version") and "matrix" not in item}
    assert versions and versions <= set(PYTHONS)
    for script in re.findall(r"\bbash (\S+)", "\n".join(item for key, item in found if key == "run")):
        assert (ROOT / script).is_file()
    for extra in re.findall(r"\.\[(\w+)\]", path.read_text("utf-8")):
        assert extra in PROJECT["optional-dependencies"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflows_can_do_no_more_than_they_must(path):
    allowed = {"deploy": {"pages": "write", "id-token": "write"}, "publish": {"id-token": "write"}}
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        if "uses" in job:  # another workflow
            assert (ROOT / job["uses"]).is_file() and "permissions" not in job
            continue
        assert job.get("permissions") == allowed.get(name)
        assert ("environment" in job) == (name in allowed)
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            action = step.get("uses")
            assert action is None or re.fullmatch(r"(actions/[\w-]+|pypa/[\w-]+)@(v|release/v)\d+", action)
            if action is not None and action.startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
        assert name not in allowed or all("run" not in step for step in job["steps"]), "no code runs with more rights"


def test_a_release_is_of_a_tag_that_version_and_changelog_have(tmp_path):
    release = jobs("release")
    assert release["publish"]["needs"] == ["tests", "build"]
    (check,) = (step["run"] for step in release["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", ""))
    version = PROJECT["version"]

    def runs(tag, heading):
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        (tmp_path / "CHANGELOG.md").write_text(f"## [Unreleased]\n\n{heading}\n")
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        result = subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        return result.returncode == 0

    assert runs(f"v{version}", f"## [{version}] - 2030-01-01")
    assert not runs(f"v{version}.1", f"## [{version}] - 2030-01-01")
    assert not runs(version, f"## [{version}] - 2030-01-01")
    assert not runs(f"v{version}", f"## [{version}.1] - 2030-01-01")
    assert not runs(f"v{version}", f"## [{version}] (not yet)")


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_issue_forms_ask_for_something(path):
    form = read(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert all(item["type"] in ("textarea", "input") and item["attributes"]["label"] for item in fields)
    names = [item["id"] for item in fields]
    assert len(set(names)) == len(names)
    assert any(item.get("validations", {}).get("required") is True for item in fields)


def test_the_command_of_the_bug_form_prints_the_versions():
    (field,) = (
        item for item in read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")["body"] if item["id"] == "versions"
    )
    (command,) = re.findall(r"^python .*$", field["attributes"]["description"], re.M)
    _, *arguments = shlex.split(command)
    result = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8", check=True)
    assert all(re.search(rf"\b{name}:? +\d+\.\d+", result.stdout) for name in ("kfax", "equinox", "jax", "python"))
