"""Lint, format, and who may import what: the walls between rooms, and declared distributions."""

import ast
import contextlib
import pathlib
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ig_jax"


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types(tmp_path):
    """The public names, the networks and the mathematics, strictly; and a use of them."""
    (tmp_path / "use.py").write_text(USE)
    check = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    for files, found in (([], "no issues found"), ([tmp_path / "use.py"], "in 1 file")):
        done = subprocess.run([*check, *files], cwd=ROOT, capture_output=True, text=True)
        assert found in done.stdout, done.stdout + done.stderr
    lines = set(re.findall(r"use.py:(\d+): error", done.stdout))
    assert lines == {str(USE.splitlines().index(WRONG) + 1)}, done.stdout


WRONG = "ig_jax.sample(model, [1], seeds=3)"
USE = f"""
import jax
import ig_jax

model = ig_jax.from_pretrained("sit-xl-2-ig").model
one: jax.Array = ig_jax.sample(model, [1], guidance=ig_jax.Guidance(1.4), seed=3)
two: ig_jax.Samples = ig_jax.sample(model, [1], trajectory=True)
three: jax.Array = model(one, one[:, 0, 0, 0], one[:, 0, 0, 0]).strong
{WRONG}
"""


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def imports(path, nested):
    """Names that a file imports, inside `try`, `if` and classes too; functions' if `nested`."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif nested or not isinstance(node, FUNCTIONS):
            nodes += ast.iter_child_nodes(node)


def test_models_and_diffusion_are_pure():
    allowed = {"jax", "flax", "numpy", *sys.stdlib_module_names}
    # The ground floor: each needs jax and numpy at most.
    ground = ("checks", "errors", "fields", "recipes", "streams", "tables")
    inside = tuple(f"ig_jax.{name}" for name in ("models", "diffusion", *ground))
    files = [*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "diffusion").glob("*.py")]
    assert len(files) > 8
    for path in files:
        for name in imports(path, nested=True):
            assert name.split(".")[0] in allowed or name.startswith(inside), (path, name)


def test_heavy_packages_are_imported_inside_functions():
    heavy = {"tensorflow", "tensorflow_datasets", "torch", "huggingface_hub", "matplotlib"}
    heavy_clu = ("clu.metric_writers", "clu.periodic_actions")
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path, nested=False):
            assert name.split(".")[0] not in heavy and not name.startswith(heavy_clu), (path, name)


def test_plots_need_no_screen():
    """pyplot has a state, and loads whatever backend the environment names."""
    pyplot = re.compile("pyplot|matplotlib.use")
    assert not [path for path in PACKAGE.rglob("*.py") if pyplot.search(path.read_text())]


def test_paths_are_made_in_one_place():
    """Every path from outside passes `ig_jax.paths.resolve`, which alone knows how."""
    makers = re.compile(r"\b(epath\.Path|pathlib\.\w*Path|expanduser|abspath)\(")
    found = {path.name for path in PACKAGE.rglob("*.py") if makers.search(path.read_text())}
    # The hub's cache is no path that anyone types.
    assert found == {"paths.py", "hub.py"}, "expected ig_jax.paths.resolve"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared for others, who import them without saying so.
FOR_OTHERS = {"tensorflow", "tensorflow-cpu", "importlib-resources", "zstandard"}


def distributions(requirements):
    """Distribution names of requirements, normalised."""
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def foreign(folder, nested):
    """(file, distributions that provide it, import) of imports from outside this checkout."""
    providers = metadata.packages_distributions()
    for path in sorted(folder.rglob("*.py")):
        for name in imports(path, nested):
            top = name.split(".")[0]
            if top not in {"ig_jax", "tests", *sys.stdlib_module_names}:
                yield path, set(map(normalised, providers.get(top, [top]))), name


@pytest.mark.parametrize("folder,extras", [("ig_jax", ()), ("tests", ("test",))])
def test_what_is_imported_is_declared(folder, extras):
    """What an import of a file needs is there after `pip install` of the part it belongs to."""
    extra = (PROJECT["optional-dependencies"][name] for name in extras)
    declared = distributions([*PROJECT["dependencies"], *(line for part in extra for line in part)])
    seen = set()
    for path, found, name in foreign(ROOT / folder, nested=False):
        assert found & declared, f"{path.relative_to(ROOT)} imports {name}: {found} not declared"
        seen |= found
    assert len(seen) > 4


def test_what_is_declared_is_imported():
    used = set().union(*(found for _, found, _ in foreign(PACKAGE, nested=True)))
    unused = distributions(PROJECT["dependencies"]) - used - FOR_OTHERS
    assert not unused, f"declared in pyproject.toml, but nothing imports it: {unused}"


def test_imports_are_found_wherever_they_run(tmp_path):
    (tmp_path / "a.py").write_text(
        "import a1\ntry:\n    import a2\nexcept ImportError:\n    from a3 import x\n"
        "if x:\n    import a4\nclass C:\n    import a5\n"
        "def f():\n    import b1\n    class D:\n        import b2\n"
    )
    names = [{n.split(".")[0] for n in imports(tmp_path / "a.py", nested)} for nested in (0, 1)]
    assert names[0] == {"a1", "a2", "a3", "a4", "a5"}
    assert names[1] == names[0] | {"b1", "b2"}


@pytest.mark.parametrize(
    "marked,needed,outcome",
    [
        (False, True, None),
        (True, False, pytest.skip.Exception),
        (True, True, pytest.fail.Exception),
    ],
)
def test_without_pytorch(monkeypatch, marked, needed, outcome):
    """A test that needs it skips, but fails where CI has installed it."""
    monkeypatch.setattr(conftest.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("IG_JAX_TESTS_NEED_TORCH", "1" if needed else "")
    item = types.SimpleNamespace(get_closest_marker=lambda name: name if marked else None)
    with pytest.raises(outcome) if outcome else contextlib.nullcontext():
        conftest.pytest_runtest_setup(item)


def test_the_marker_is_the_only_way_to_need_pytorch():
    """pytest's own way would skip where CI has to notice."""
    other = re.compile(r"importorskip\(")
    assert not [path for path in ROOT.glob("tests/**/*.py") if other.search(path.read_text())]
