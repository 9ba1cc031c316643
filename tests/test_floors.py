"""The plan of the house: imports look down, functions fit on a screen, sources can be looked up."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ig_jax"
LINES = 60
# Longer ones, but plain tables. The list can only shrink.
TABLES: set[str] = set()


def lint_imports(root):
    """Checks the contracts of `root`'s pyproject.toml on `root`'s ig_jax."""
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        + ["--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_imports_look_down():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_an_import_inside_a_function_is_seen(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "ig_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "ig_jax/models/layers.py", "a") as file:
        file.write("\n\ndef _above():\n    from ig_jax.diffusion import loss\n")
    (tmp_path / "ig_jax/attic.py").write_text('"""A room on no floor."""\n')
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "ig_jax.models.layers -> ig_jax.diffusion.loss" in done.stdout
    assert "attic" in done.stdout


def long_functions(path, name):
    """Functions of a file that, without their docstrings, have over `LINES` lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            text = ast.get_docstring(node, clean=False) is not None
            length = node.end_lineno - node.lineno + 1
            if length - text * (first.end_lineno - first.lineno + 1) > LINES:
                yield f"{name} {node.name}"


def test_functions_fit_on_a_screen(tmp_path):
    files = {str(path.relative_to(ROOT)): path for path in PACKAGE.rglob("*.py")}
    assert {f for name, path in files.items() for f in long_functions(path, name)} == TABLES
    (tmp_path / "long.py").write_text(
        'def read():\n    """' + "\n" * 70 + '"""\n\ndef run():\n' + "    print()\n" * LINES
    )
    assert list(long_functions(tmp_path / "long.py", "long.py")) == ["long.py run"]


def test_sources_are_those_that_a_reader_has():
    """A section of a paper, an equation or a file of the release; not notes that are not here."""
    files = [ROOT / "README.md", *(ROOT / "configs").glob("*"), *(ROOT / "tests").rglob("*.py")]
    files += [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "launch").glob("*.*"),
        *(ROOT / "docs").rglob("*.md"),
    ]
    notes = re.compile("SPEC" + r"(\.md|\W{0,3}§)")
    for path in files:
        if path.suffix != ".png" and path.is_file():
            assert not notes.search(path.read_text()), path
