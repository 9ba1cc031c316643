"""Pickled weight files: plain values are read, and nothing that a pickle asks for is ever run."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.storage import weight_files

pytestmark = pytest.mark.torch


def save(path: pathlib.Path, make: Callable[[Any], dict], **options: Any) -> None:
    """Writes what `make` makes of a tensor of two ones."""
    import torch

    torch.save(make(torch.ones(2)), path, **options)


def refusal(path: pathlib.Path) -> str:
    """The one line that refuses a file."""
    with pytest.raises(InputError) as error:
        weight_files.read_checkpoint(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    return str(error.value)


class Carrier:
    """A pickle of this calls a function when loaded."""

    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


NUMPY = {
    "best_fid": np.float64(2.5),
    "step": np.int32(7),
    "done": np.bool_(True),
    "when": np.str_("now"),
    "curve": np.arange(6, dtype=">f4").reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "names": np.array(["añu", "b"]),
    "empty": np.zeros((0, 3)),
    "state": ("MT19937", np.arange(4, dtype=np.uint32), 4, 0, 0.0),
}


@pytest.mark.parametrize("older", [False, True])
def test_numpy_values_are_data(tmp_path: pathlib.Path, older: bool) -> None:
    """Scalars and arrays beside the weights, as NumPy 2 and NumPy 1 name them in a pickle."""
    path = tmp_path / "a.pt"
    zipped = {"_use_new_zipfile_serialization": not older}
    save(path, lambda w: {"ema": {"w": w}, "metrics": NUMPY}, **zipped)
    if older:
        data = path.read_bytes()
        assert b"numpy._core.multiarray" in data
        path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    content = weight_files.read_checkpoint(path)
    np.testing.assert_array_equal(content["ema"]["w"], [1, 1])
    read = content["metrics"]
    assert list(read) == list(NUMPY)
    for name in set(NUMPY) - {"state"}:
        assert type(read[name]) is type(NUMPY[name]) and read[name].dtype == NUMPY[name].dtype
        np.testing.assert_array_equal(read[name], NUMPY[name])
    np.testing.assert_array_equal(read["state"][1], NUMPY["state"][1])


@pytest.mark.parametrize(
    "value",
    [
        np.array([print, "text"], object),
        np.array([Carrier()], object),
        np.zeros(2, [("a", "f4"), ("b", "O")]),
        np.void(b"1234"),
    ],
    ids=["objects", "code", "structure", "void"],
)
def test_numpy_arrays_that_point_elsewhere_are_refused(tmp_path, capsys, value) -> None:
    save(tmp_path / "a.pt", lambda w: {"w": w, "x": value})
    assert re.search("carries code .*, which is never run", refusal(tmp_path / "a.pt"))
    assert "must never run" not in capsys.readouterr().out


class Forged:
    """Pickles as a NumPy array whose bytes are claimed to be more than they are."""

    def __reduce__(self) -> tuple:
        make, arguments, (version, shape, kind, order, data) = np.ones(3).__reduce__()
        return make, arguments, (version, (10**6, *shape), kind, order, data)


def test_forged_numpy_arrays_are_refused(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "a.pt", lambda w: {"w": w, "x": Forged()})
    assert re.search("damaged.*too small", refusal(tmp_path / "a.pt"))


def test_code_in_a_pickle_is_refused(tmp_path: pathlib.Path, capsys) -> None:
    path = tmp_path / "hostile.pt"
    save(path, lambda w: {"model": {"w": w}, "x": Carrier()})
    message = refusal(path)
    assert "carries code" in message and "print" in message and "torch.save(" in message
    assert "never run" not in capsys.readouterr().out


class Network:
    """A whole network in a checkpoint, as some training scripts save it."""

    def state_dict(self) -> dict:
        import torch

        return {"w": torch.ones(2)}


RECIPE = "re-save its weights alone: "


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("flat.pt", lambda w: {"w": w}),
        ('it\'s "my" $HOME.pt', lambda w: {"w": w}),
        ("nested.ckpt", lambda w: {"state_dict": {"w": w}, "opt": {"state": {0: {"m": 1}}}}),
        ("network.pth", lambda w: {"ema": Network(), "names": ["a"]}),
    ],
)
def test_advice_for_a_refused_pickle_works(tmp_path, monkeypatch, name: str, make) -> None:
    """Runs the very command that the message gives, split as a shell splits it."""
    path = tmp_path / name
    save(path, lambda w: make(w) | {"hyper": pathlib.Path("x"), "x": print})
    python, flag, code, *arguments = shlex.split(refusal(path).partition(RECIPE)[2])
    assert (python, flag, arguments[0]) == ("python", "-c", str(path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [flag, *arguments])
    exec(code, {})
    weights = weight_files.network_weights(
        weight_files.read_checkpoint(arguments[1]), ("w",), "it", "it"
    )
    np.testing.assert_array_equal(weights["w"], [1, 1])


def test_advice_works_in_a_shell(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "it's.pt", lambda w: {"w": w, "x": print})
    command = refusal(tmp_path / "it's.pt").partition(RECIPE)[2]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    np.testing.assert_array_equal(
        weight_files.read_weights(tmp_path / "it's_weights.pt")["w"], [1, 1]
    )
