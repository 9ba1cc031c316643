"""The notebook from top to bottom: trained on digits in a real kernel, and with published weights
(small random ones in their place) in this process.

As a program, `python tests/launch/test_notebook.py`, it runs the whole of it on the digits, some
minutes, and saves the outputs, which GitHub shows.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

import jax
import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from PIL import Image

import ig_jax
from ig_jax import hub
from tests.release import random_weights, release_shapes

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "internal_guidance.ipynb"
PICTURES = ("side", "choose", "heads", "trajectory")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def fingerprint(notebook):
    """Of all code: outputs are of the code that they were saved with."""
    return hashlib.sha256("".join(c.source for c in code(notebook).values()).encode()).hexdigest()


def test_committed_with_the_outputs_of_its_code(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata["executed"] == fingerprint(notebook), f"run python {__file__}"
    cells = code(notebook)
    assert [c.execution_count for c in cells.values()] == list(range(1, len(cells) + 1))
    for name in PICTURES:
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    said = "".join(output.get("text", "") for output in cells["train"].outputs)
    assert "training 1,000 of 1,000: took" in said
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert str(ROOT) not in NOTEBOOK.read_text()


def test_the_badge_opens_this_notebook(notebook):
    """In Colab: by its address, once the project has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository", "").removeprefix("https://github.com/")
    path = f"{address}/blob/main/launch/{NOTEBOOK.name}" if address else ""
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/github/{path}"
    assert f"[![Open in Colab]({badge})]({link})" in notebook.cells[0].source


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("", f"{ROOT.as_uri()}"),
        ("{wheel}", "file://{wheel}"),
        ("git+https://github.com/a/ig_jax", "git+https://github.com/a/ig_jax"),
        ("/nowhere.whl", None),
    ],
)
def test_installs_what_a_constant_names(notebook, package, expected, tmp_path, monkeypatch):
    wheel = tmp_path / "ig_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    source = code(notebook)["install"].source
    assert source.count('\nPACKAGE = ""\n') == 1
    source = source.replace('PACKAGE = ""', f"PACKAGE = {package.format(wheel=wheel)!r}")
    monkeypatch.chdir(ROOT / "launch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    accelerator = bool(package)  # on a CPU it trains, which needs no extra
    monkeypatch.setattr(shutil, "which", lambda name: accelerator and "/usr/bin/nvidia-smi")
    called = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: called.append(words))
    if expected is None:
        with pytest.raises(RuntimeError, match="/nowhere.whl is no wheel and no checkout"):
            exec(source, {})
        return
    exec(source, {})
    [[*pip, target]] = called
    assert pip == [sys.executable, "-m", "pip", "install", "-q"]
    extras = "[hub,convert,cuda]" if accelerator else ""
    assert target == f"ig_jax{extras} @ {expected.format(wheel=wheel)}"


def test_its_commands_exist(notebook):
    """The commands it ends with name a config and modes that there are."""
    from ig_jax import main

    text = notebook.cells[-1].source
    assert "own data" in text and "--config.data.num_validation=0" in text
    for word in text.split():
        if word.startswith("--config=configs/"):
            assert (ROOT / word.removeprefix("--config=")).exists(), word
        if word.startswith("--mode="):
            assert word.removeprefix("--mode=") in main.MODES, word


def execute(notebook, folder, timeout=300, **environment):
    """Runs all cells in a kernel of their own, on the digits."""
    environment |= {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "IPYTHONDIR": str(folder / "ipython"),
        "IG_JAX_NOTEBOOK_SOURCE": "digits",
    }
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | environment)


@pytest.mark.slow
def test_digits_in_a_kernel(notebook, tmp_path):
    execute(notebook, tmp_path, TMPDIR=str(tmp_path), IG_JAX_NOTEBOOK_STEPS="3")
    cells = code(notebook)
    assert all(cell.execution_count for cell in cells.values())
    for name in PICTURES:
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    text = "".join(output.get("text", "") for output in cells["train"].outputs)
    assert "trained model: " in text
    errors = [o for cell in cells.values() for o in cell.outputs if o.get("name") == "stderr"]
    assert not errors, errors


class Widgets:
    """Stands in for ipywidgets: the button is pressed at once, with the sliders moved."""

    def __init__(self):
        self.moved = {}

    def __getattr__(self, kind):
        return lambda **options: options["value"]

    def interact_manual(self, function, **values):
        self.moved = values | dict(label=3, ig_scale=0.5, seed=5)
        function(**self.moved)


def test_published_weights_in_this_process(notebook, monkeypatch, capsys):
    shapes = release_shapes(
        width=32, depth=2, heads=2, patch=2, channels=3, tokens=16, classes=1000
    )  # fmt: skip
    model = ig_jax.from_pytorch(random_weights(shapes), heads=2, auxiliary_depth=1)
    published = hub.PUBLISHED["sit-xl-2-ig"]
    found = ig_jax.Pretrained(model, ig_jax.Decoder(), published, "sit.pt", None)
    asked = []
    monkeypatch.setattr(hub, "from_pretrained", lambda name: asked.append(name) or found)
    monkeypatch.setenv("IG_JAX_NOTEBOOK_SOURCE", "hub")
    widgets = Widgets()
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    matplotlib.use("Agg")
    names: dict = {}
    for cell in code(notebook).values():
        exec(compile(cell.source, cell.id, "exec"), names)
    assert asked == ["sit-xl-2-ig"] and "FID 1.75" in capsys.readouterr().out
    assert len(shown) == len(PICTURES) + 1 and widgets.moved["ig_scale"] == 0.5
    assert names["class_names"][207] == "golden retriever"
    plt.close("all")


def test_no_weights_no_network_means_digits(notebook, monkeypatch, capsys):
    def refuse(name):
        raise ig_jax.InputError("no network")

    monkeypatch.setattr(hub, "from_pretrained", refuse)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    names: dict = {}
    for cell in ("imports", "source"):
        exec(code(notebook)[cell].source, names)
    assert names["SOURCE"] == "digits" and "so digits: no network" in capsys.readouterr().out
    monkeypatch.setenv("IG_JAX_NOTEBOOK_SOURCE", "hub")
    with pytest.raises(ig_jax.InputError, match="no network"):
        exec(code(notebook)["source"].source, names)


def smaller(png):
    """A picture in base64 with fewer pixels, so that the file stays small."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    size = [round(0.65 * side) for side in picture.size]
    packed = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def main():
    """Saves the notebook with the outputs of a whole run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, pathlib.Path(folder), timeout=3600)
    for cell in code(notebook).values():
        cell.metadata.pop("execution", None)  # times
        # Sliders need a kernel behind them.
        widget = "application/vnd.jupyter.widget-view+json"
        cell.outputs = [o for o in cell.outputs if widget not in o.get("data", {})]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata.pop("widgets", None)
    notebook.metadata["executed"] = fingerprint(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
