"""Docstrings of public names (a summary, every argument, shapes where arrays go in or out, the
errors that are raised), and what the README and `--help` texts name."""

import ast
import dataclasses
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from flax import nnx

import ig_jax
from ig_jax import extensions, fields, main, sections

ROOT = pathlib.Path(ig_jax.__file__).parent

# "(B, H, W, C)", "(N,)", "()", "(1, 32, 1, 1)"; "{name: array}" for weights by name.
SHAPE = re.compile(
    r"\((?:[A-Za-z0-9·²'/]+(?: [+−·] [A-Za-z0-9]+)?,? ?(?:…,? ?)?)*\)|by name|shaped"
)
# Functions whose input cannot be wrong.
NEVER_RAISE = ("to_pytorch",)
ARRAYS = ("jax.Array", "np.ndarray", "jnp.ndarray")


def exported():
    return {name: getattr(ig_jax, name) for name in ig_jax.__all__}


def summary_and_text(documented):
    text = inspect.getdoc(documented)
    assert text, f"{documented.__name__} has no docstring"
    return text.partition("\n\n")[0], text


def fields_of(thing):
    """Names that a person passes or reads: arguments of a function, fields of a class."""
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    if inspect.isclass(thing) and issubclass(thing, nnx.Module):
        thing = thing.__init__
    if inspect.isclass(thing):
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def describes(text, name):
    """Whether a line "name: …", "name, other: …" or a sentence with the name is there."""
    return re.search(rf"(^|[\s`,(*]){re.escape(name)}($|[\s`,:.)])", text) is not None


@pytest.mark.parametrize("name", ig_jax.__all__)
def test_exported_names(name):
    thing = exported()[name]
    summary, text = summary_and_text(thing)
    assert re.match(r"[A-Z]", summary) and re.search(r"[.)]$", summary), f"{name}: {summary!r}"
    assert len(summary) < 200, f"{name}: the summary is not short: {summary!r}"
    for field in fields_of(thing):
        assert describes(text, field), f"{name}: {field} is not described"
    if inspect.isfunction(thing):
        assert re.search(r"^(Returns|Raises|Yields):", text, re.M), f"{name}: what does it return?"
        assert "InputError" in text or name in NEVER_RAISE, f"{name}: which errors does it raise?"
    signature = str(getattr(thing, "__annotations__", {}))
    if any(kind in signature for kind in ARRAYS):
        assert SHAPE.search(text), f"{name}: the docstring has no shape"


def public_methods(thing):
    own = vars(thing).items() if inspect.isclass(thing) else ()
    for name, member in own:
        member = getattr(member, "__func__", member)
        is_call = name == "__call__"
        if inspect.isfunction(member) and (is_call or not name.startswith("_")):
            yield name, member


@pytest.mark.parametrize(
    "name", [n for n, thing in exported().items() if any(public_methods(thing))]
)
def test_methods_of_exported_classes(name):
    for method, function in public_methods(exported()[name]):
        if method == "replace":  # added by flax.struct
            continue
        text = inspect.getdoc(function)
        assert text, f"{name}.{method} has no docstring"
        for field in fields_of(function):
            assert describes(text, field), f"{name}.{method}: {field} is not described"
        if any(kind in str(function.__annotations__) for kind in ARRAYS):
            assert SHAPE.search(text), f"{name}.{method}: the docstring has no shape"


MODULES = [
    m.name for m in pkgutil.walk_packages([str(ROOT)], "ig_jax.") if "__main__" not in m.name
]


def public_functions(module):
    """(qualified name, node) of the public functions and methods that a file defines."""
    tree = ast.parse(pathlib.Path(inspect.getsourcefile(module)).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def raises_input_error(node):
    return any(
        isinstance(inner, ast.Raise)
        and isinstance(inner.exc, ast.Call)
        and getattr(inner.exc.func, "id", "") == "InputError"
        for inner in ast.walk(node)
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_what_it_raises(name):
    """Each file says what it is for, and each public function that raises says so."""
    module = importlib.import_module(name)
    assert re.search(r"[.:]$", (module.__doc__ or "").strip()), f"{name}: no module docstring"
    silent = []
    for function, node in public_functions(module):
        if function.split(".")[-1].startswith("_") or not raises_input_error(node):
            continue
        text = ast.get_docstring(node) or ""
        if not re.search(r"InputError|[Rr]aise|[Rr]efuse", text):
            silent.append(function)
    assert not silent, f"{name}: raised errors are not documented in {', '.join(silent)}"


CHECKOUT = ROOT.parent
README = (CHECKOUT / "README.md").read_text()


def test_configs_that_are_named_exist():
    """In the README, in `--help` texts and in messages."""
    named = {}
    for file in (CHECKOUT / "README.md", *CHECKOUT.glob("launch/*"), *ROOT.rglob("*.py")):
        text = file.read_bytes().decode(errors="ignore")
        named |= dict.fromkeys(re.findall(r"configs/[\w./-]+\.py", text), file.name)
    named |= dict.fromkeys(f"configs/{name}" for name in re.findall(r"`(\w+_ig\.py)`", README))
    missing = {name: file for name, file in named.items() if not (CHECKOUT / name).exists()}
    assert len(named) > 4 and not missing


def test_python_versions_are_those_that_install():
    """The README promises what pyproject.toml admits, less the newest, which only resolves."""
    admitted = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"][
        "requires-python"
    ]
    low, past = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", admitted).groups()
    *run, last, newest = (f"3.{minor}" for minor in range(int(low), int(past)))
    assert f"Python {', '.join(run)} or {last} and" in README
    assert f"**Python {newest}** was not at hand" in README


STUB = """#!/usr/bin/env bash
# python3 -m venv PLACE: a virtual environment whose programs only say what they were called with.
mkdir -p "$3/bin"
for name in pip python pytest; do
  printf '#!/bin/bash\necho "%s $*" >>"%s/log"; env >>"%s/env"; ls -A ~ >>"%s/home"\n' \
    "$name" "$LOG" "$LOG" "$LOG" >"$3/bin/$name"
done
printf 'mkdir -p "%s/digits/evaluation" && touch "%s/digits/evaluation/a.png"\n' "$LOG" "$LOG" \
  >>"$3/bin/python"
printf '[[ $* != *broken* ]]\n' >>"$3/bin/pytest"
chmod +x "$3"/bin/*
"""


def run_ci(directory, readme):
    """Runs `.ci/run` beside another README, with stubs for Python: (exit code, calls)."""
    (directory / ".ci").mkdir()
    shutil.copy(CHECKOUT / ".ci" / "run", directory / ".ci" / "run")
    (directory / "README.md").write_text(readme.replace("/tmp/digits", f"{directory}/digits"))
    (directory / "bin").mkdir()
    (directory / "bin" / "python3").write_text(STUB)
    (directory / "bin" / "python3").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{directory}/bin:{os.environ['PATH']}",
        "LOG": str(directory),
        "PYTHONPATH": "/elsewhere",
        "PIP_TIMEOUT": "180",
        "TMPDIR": str(directory),
    }
    done = subprocess.run([directory / ".ci" / "run"], env=environment, capture_output=True)
    log = directory / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_ci_runs_the_readmes_commands_as_they_stand(tmp_path):
    (tmp_path / "digits").mkdir()  # an earlier run, which must not be continued
    code, calls = run_ci(tmp_path, README)
    install = "pip install -e .[test]"
    plain = "pip install -e ."
    digits = f"--config=configs/digits_ig.py --workdir={tmp_path}/digits"
    assert code == 0
    assert calls[:4] == [plain, f"python -m ig_jax.main {digits}", install, "pytest "]
    assert calls[4].startswith("pip install -q torch==")
    assert calls[5:] == ["pytest -m torch and not slow", "pytest -m slow"]
    seen = (tmp_path / "env").read_text()
    assert "PIP_TIMEOUT=180" in seen and "PYTHONPATH" not in seen and "JAX_PLATFORMS" not in seen
    assert seen.count("IG_JAX_TESTS_NEED_TORCH=1") == 2
    assert (tmp_path / "home").read_text() == ""


@pytest.mark.parametrize(
    "change",
    [
        ("&& pytest\n", "&& pytest tests/broken\n"),
        ("&& pytest\n", "&& pytest\npytest\n"),
        ("## Run it", "## Run"),
    ],
)
def test_ci_fails_with_a_broken_readme(tmp_path, change):
    assert change[0] in README
    code, calls = run_ci(tmp_path, README.replace(*change, 1))
    assert code != 0 and "pytest -m slow" not in calls


PAGES = sorted((CHECKOUT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_there_is(page):
    """Configs, modes and config fields of the commands, and what is imported."""
    text = page.read_text()
    declared = fields.every(sections.Config)
    rows = declared | dict.fromkeys(fields.sections(sections.Config))
    for config in re.findall(r"--config=(?:configs/)?([\w/]+)", text):
        assert config in extensions.built_in_configs(), config
    for mode in re.findall(r"--mode=(\w+)", text):
        assert mode in main.MODES, mode
    for field in re.findall(r"(?:--|`)config\.([a-z_]+(?:\.[a-z_]+)?)", text):
        assert field in rows, field
    for module, names in re.findall(r"^from (ig_jax[\w.]*) import (.*)$", text, re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), (module, name)
    for path in re.findall(r"`((?:ig_jax|launch|configs)/[\w./]+\.\w+)`", text):
        assert (CHECKOUT / path).exists(), path


def test_every_public_name_is_on_a_page():
    shown = set(re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in PAGES), re.M))
    for name, thing in exported().items():
        names = {f"ig_jax.{name}", f"{thing.__module__}.{thing.__qualname__}"}
        assert names & shown, f"{name} is on no page of docs/"


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    def build(root):
        command = ["mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml"]
        return subprocess.run(
            [sys.executable, "-m", *command, "--site-dir", tmp_path / "site"],
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
        )

    done = build(CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert {page.stem for page in PAGES} <= {path.stem for path in tmp_path.glob("site/*.html")}
    text = (tmp_path / "site/guidance.html").read_text()
    assert "innermost first" in text and "The guided velocity" not in text
    shutil.copytree(CHECKOUT / "docs", tmp_path / "docs")
    shutil.copy(CHECKOUT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "library.md").write_text("# Library\n\n[nothing](nothing.md)\n")
    assert "nothing.md" in build(tmp_path).stderr
    assert build(tmp_path).returncode == 1
