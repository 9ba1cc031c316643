"""The notebook from top to bottom: trained on digits in a real kernel, and with published weights
(small random ones in their place) in this process."""

from __future__ import annotations

import os
import pathlib
import sys

import jax
import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

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


def test_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in code(notebook).values():
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert notebook.cells[-1].cell_type == "markdown" and "own data" in notebook.cells[-1].source


def test_its_commands_exist(notebook):
    """The commands it ends with name a config and modes that there are."""
    from ig_jax import main

    text = notebook.cells[-1].source
    for word in text.split():
        if word.startswith("--config=configs/"):
            assert (ROOT / word.removeprefix("--config=")).exists(), word
        if word.startswith("--mode="):
            assert word.removeprefix("--mode=") in main.MODES, word


def test_digits_in_a_kernel(notebook, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "TMPDIR": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "IG_JAX_NOTEBOOK_SOURCE": "digits",
        "IG_JAX_NOTEBOOK_STEPS": "3",
    }
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=environment)
    cells = code(notebook)
    assert all(cell.execution_count for cell in cells.values())
    for name in PICTURES:
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    text = "".join(output.get("text", "") for output in cells["train"].outputs)
    assert "[3] " in text and "loss=" in text and "trained model: " in text
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
