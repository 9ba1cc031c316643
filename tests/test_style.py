"""Lint, format and the walls between rooms (which package may import what)."""

import ast
import pathlib
import subprocess
import sys

import pytest

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


def imports(path, nested):
    """Top-level packages a file imports; with `nested`, those inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if nested else ast.iter_child_nodes(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_models_and_diffusion_are_pure():
    allowed = {"jax", "flax", "numpy", *sys.stdlib_module_names}
    inside = ("ig_jax.models", "ig_jax.diffusion", "ig_jax.errors")
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
