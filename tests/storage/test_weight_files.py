"""Weight files: what is read, how it is widened, and the one line that says what is wrong."""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import pytest

from ig_jax.errors import InputError
from ig_jax.storage import weight_files


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint as the DiT family's training scripts write it."""
    import torch

    path = tmp_path / "0400000.pt"
    content = {
        "model": {"block.weight": torch.ones(2, 3)},
        "ema": {"block.weight": torch.full((2, 3), 2.0, dtype=torch.float16)},
        "opt": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-XL/2", encoder_depth=8),
        "steps": 400_000,
    }
    torch.save(content, path)
    return path


@pytest.mark.torch
def test_nested_checkpoint(checkpoint: pathlib.Path) -> None:
    content = weight_files.read_checkpoint(checkpoint)
    assert content["args"] == {"model": "SiT-XL/2", "encoder_depth": 8}
    assert content["steps"] == 400_000
    assert content["opt"]["param_groups"] == [{"lr": 1e-4}]
    np.testing.assert_array_equal(content["model"]["block.weight"], np.ones((2, 3)))
    assert content["ema"]["block.weight"].dtype == np.float32


@pytest.mark.torch
def test_arrays_of_nested_dicts_by_dotted_name(checkpoint: pathlib.Path) -> None:
    weights = weight_files.read_weights(checkpoint)
    assert set(weights) == {"model.block.weight", "ema.block.weight", "opt.state.0.step"}


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_number_types(tmp_path: pathlib.Path, kind: str, suffix: str) -> None:
    import safetensors.torch
    import torch

    tensor = torch.tensor([[0.0, 1.5, -3.0], [1e-3, 7.25, 96.0]]).to(getattr(torch, kind))
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pt" else safetensors.torch.save_file
    save({"w": tensor, "scalar": torch.tensor(3)}, str(path))
    read = weight_files.read_weights(path)
    expected = tensor.float().numpy() if kind.endswith("float16") else tensor.numpy()
    assert read["w"].dtype == expected.dtype
    np.testing.assert_array_equal(read["w"], expected)
    assert read["scalar"].shape == ()


@pytest.mark.torch
def test_legacy_pickle_format(tmp_path: pathlib.Path) -> None:
    import torch

    path = tmp_path / "old.pth"
    torch.save({"w": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(weight_files.read_weights(path)["w"], np.arange(4.0))


def test_written_file_reads_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.safetensors"
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    weight_files.write_safetensors(path, {"w": transposed, "n": np.int64(3)}, {"source": "here"})
    read = weight_files.read_weights(path)
    np.testing.assert_array_equal(read["w"], transposed)
    assert read["n"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_unwritable_file_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="missing/w.safetensors: cannot be written: No such file"):
        weight_files.write_safetensors(tmp_path / "missing/w.safetensors", {"w": np.ones(2)})
    with pytest.raises(InputError, match="found suffix '.npz', expected .safetensors"):
        weight_files.write_safetensors(tmp_path / "w.npz", {"w": np.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "suffix",
    [".safetensors", *(pytest.param(s, marks=pytest.mark.torch) for s in (".pt", ".legacy.pt"))],
)
@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.97])
def test_truncated_file_is_named(tmp_path: pathlib.Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        weight_files.write_safetensors(path, {"w": np.ones(300, np.float32)})
    else:
        import torch

        torch.save({"w": torch.ones(300)}, path, _use_new_zipfile_serialization=suffix == ".pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(InputError, match="cut.*(damaged|cannot be read as a saf)") as error:
        weight_files.read_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        pytest.param(
            "a.pt",
            b"hello, world",
            "damaged, truncated, or not a PyTorch weight",
            marks=pytest.mark.torch,
        ),
        ("a.safetensors", b"hello, world", "cannot be read as a safetensors"),
        ("a.npz", b"", "found a .npz file, expected weights as one of .safetensors, .pt"),
        ("a", b"", "found a suffixless file"),
        ("a.pt", None, "found no such file"),
    ],
)
def test_other_files(tmp_path: pathlib.Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        weight_files.read_checkpoint(path)
    assert one_line(error).startswith(str(path))


@pytest.mark.torch
def test_directory_and_contents_without_weights(tmp_path: pathlib.Path) -> None:
    import torch

    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match="found a folder"):
        weight_files.read_checkpoint(tmp_path / "folder.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="found a ndarray, expected a dict of weights"):
        weight_files.read_checkpoint(tmp_path / "tensor.pt")
    torch.save({"steps": 3}, tmp_path / "empty.pt")
    with pytest.raises(InputError, match="found no arrays, only steps"):
        weight_files.read_weights(tmp_path / "empty.pt")


def test_no_pytorch(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (checkpoint := tmp_path / "0400000.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r'pip install "ig_jax\[convert\]"'):
        weight_files.read_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_weight(value: float) -> None:
    good = {"a": np.ones(3), "n": np.arange(3)}
    weight_files.check_finite(good, "file.pt")
    bad = good | {"b.weight": np.array([1.0, value, value])}
    with pytest.raises(InputError, match="file.pt: weight b.weight has 2 NaN or infinite of 3"):
        weight_files.check_finite(bad, "file.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.weight": None}, "1 missing of 3 weights: blocks.0.weight$"),
        ({"extra": (1,)}, "1 unexpected: extra$"),
        ({"bias": (4,)}, r"1 of another shape: bias has \(4,\), expected \(2,\)$"),
        (
            {"blocks.0.weight": None, "block.0.weight": (2, 3)},
            "missing.*blocks.0.weight; did you mean block.0.weight.*unexpected: block.0.weight",
        ),
        ({f"e{i}": (1,) for i in range(5)}, "5 unexpected: e0, e1, e2, …$"),
    ],
)
def test_match_keys(change: dict, message: str) -> None:
    expected = {"blocks.0.weight": (2, 3), "bias": (2,), "scale": ()}
    weight_files.match_keys(expected, {k: np.zeros(s) for k, s in expected.items()}, "x.pt")
    shapes = {k: s for k, s in (expected | change).items() if s is not None}
    with pytest.raises(InputError, match="^x.pt: .*" + message) as error:
        weight_files.match_keys(expected, {k: np.zeros(s) for k, s in shapes.items()}, "x.pt")
    one_line(error)
