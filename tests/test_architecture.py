"""The house: imports go down only, files stay small, classes are abstract or final, everything public is documented."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import kfax


ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "kfax"

# Top to bottom. A room imports only from rows below its own; rooms of one row do not import each other.
HOUSE = [
    ["__init__"],
    ["_optimizer", "_influence", "_laplace"],
    ["_estimators"],
    ["_capture"],
    ["_layers"],
    ["_blocks"],
    ["_operations", "_losses", "_slot"],
    ["_example_axis"],
    ["_math"],
]
ROW = {name: row for row, names in enumerate(HOUSE) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
OTHER_FILES = [path for name in ("tests", "examples", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]
MODULES = [
    importlib.import_module(f"kfax.{info.name}") if "." not in info.name else importlib.import_module(info.name)
    for info in pkgutil.walk_packages(kfax.__path__)
]


def room(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path):
    """The kfax modules that a file imports, as paths relative to the package."""
    package = ("kfax", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module.split(".") if node.module else ()))[1:]
            yield from ([module] if module else [(alias.name,) for alias in node.names])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0] == "kfax" for name in names), f"{path}: import kfax relatively"


def _num_lines(node):
    return (node.end_lineno or 0) - node.lineno + 1


def classes():
    found = {}
    for path in FILES:
        module = ".".join(("kfax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for _, item in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            if item.__module__.startswith("kfax"):
                found[item.__module__ + "." + item.__qualname__] = item
    return list(found.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = room(path)
    assert own in ROW, f"give `{own}` its row in HOUSE"
    for module in imports(path):
        other = module[0]
        if other == own:
            continue
        assert ROW[other] > ROW[own], f"{path.name} imports {other}, which is not below it"


def drawing():
    """Which room imports which, as a table: its lines top to bottom, and its columns."""
    rooms = [name for row in HOUSE for name in row]
    edges = {(room(path), module[0]) for path in FILES for module in imports(path)}
    lower = rooms[1:]
    lines = [f"| imports | {' | '.join(f'`{name}`' for name in lower)} |", "|---" * (len(lower) + 1) + "|"]
    for name in rooms[:-1]:
        marks = ["●" if (name, other) in edges and name != other else "" for other in lower]
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return "\n".join(re.sub(" +", " ", line) for line in lines)


def test_contributing_draws_the_imports():
    assert drawing() in (ROOT / "CONTRIBUTING.md").read_text(), f"draw them as they are:\n\n{drawing()}"


@pytest.mark.parametrize("folder", [p for p in PACKAGE.iterdir() if (p / "__init__.py").exists()], ids=lambda p: p.name)
def test_files_of_a_folder_do_not_import_each_other_in_circles(folder):
    edges = {p.stem: {m[1] for m in imports(p) if m[0] == folder.name and len(m) > 1} for p in folder.glob("*.py")}
    edges.pop("__init__")
    while edges:
        free = [name for name, needs in edges.items() if not needs & edges.keys()]
        assert free, f"circular imports among {sorted(edges)}"
        for name in free:
            del edges[name]


@pytest.mark.parametrize("path", FILES + OTHER_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert path.read_text().count("\n") <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_small(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            length = _num_lines(node)
            if docstring is not None:
                length -= _num_lines(docstring)
            assert length <= 60, f"{node.name} has {length} lines"
        assert not (isinstance(node, ast.FunctionDef) and any(
            isinstance(child, ast.Import | ast.ImportFrom) for child in ast.walk(node)
        )), "no import inside a function"  # fmt: skip


def test_no_global_state_and_no_private_jax():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"^\s*global\s", text, re.MULTILINE), path
        assert "jax._src" not in text and "equinox._" not in text and "jax.interpreters" not in text, path
        assert path.name not in ("utils.py", "misc.py", "helpers.py")


def test_one_file_calls_lapack():
    """It sees to it that no two calls can wait for each other."""
    for path in FILES:
        calls = re.findall(r"linalg\.(?:cholesky|eigh|eigvalsh|inv|pinv|solve|svd|qr|det|slogdet)\(", path.read_text())
        own = re.findall(r"lax\.linalg|jsp\.linalg|scipy\.linalg|jnp\.linalg\.(?!norm)", path.read_text())
        assert path.name == "linalg.py" or (not own and set(calls) <= {"linalg.eigh("}), path


def test_importing_kfax_does_not_start_jax():
    """Users choose precision and devices after their imports."""
    code = "import kfax, jax; jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices('cpu')) == 3"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_classes_are_abstract_or_final():
    """Nothing concrete is overridden, and no concrete class is subclassed."""
    for cls in classes():
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith("kfax"):
                continue
            assert inspect.isabstract(base), f"{cls.__name__} subclasses the concrete {base.__name__}"
            concrete = {
                name
                for name, item in vars(base).items()
                if inspect.isfunction(item) and not name.startswith("__") and not hasattr(item, "__isabstractmethod__")
            }
            overridden = {name for name in concrete & vars(cls).keys() if vars(cls)[name] is not vars(base)[name]}
            assert not overridden, f"{cls.__name__} overrides {overridden} of {base.__name__}"


def public_names():
    return sorted(name for name, item in vars(kfax).items() if not name.startswith("_") and not inspect.ismodule(item))


def documented():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    return re.findall(r"^::: kfax\.(\w+)$", pages, re.MULTILINE)


def test_every_public_name_is_on_an_api_page_once():
    assert sorted(documented()) == public_names()


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_explained(name):
    item = getattr(kfax, name)
    if inspect.isclass(item) or inspect.isfunction(item):
        assert len(inspect.getdoc(item) or "") > 20


def _bullets(docstring):
    """The parameters that the **Arguments:** list of a docstring names."""
    match = re.search(r"\*\*Arguments:\*\*\n(.*?)(?=\n\s*\*\*|\n\s*\?\?\?|\Z)", docstring, re.DOTALL)
    if match is None:
        return None
    heads = re.findall(r"^\s*- ((?:`\w+`(?:, )?)+):", match.group(1), re.MULTILINE)
    return [name for head in heads for name in re.findall(r"`(\w+)`", head)]


def _functions():
    for name in public_names():
        item = getattr(kfax, name)
        if inspect.isfunction(item):
            yield item
        elif inspect.isclass(item):
            for member in vars(item).values():
                if inspect.isfunction(member) and member.__module__.startswith("kfax"):
                    yield member


@pytest.mark.parametrize("function", list(_functions()), ids=lambda f: f.__qualname__)
def test_argument_lists_name_the_parameters(function):
    bullets = _bullets(inspect.getdoc(function) or "")
    if not bullets:
        return
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    assert bullets == parameters
