"""Files appear whole or not at all, and digests are those of data already on disks."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from ig_jax.errors import InputError
from ig_jax.storage import files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_when_it_is_complete(tmp_path: pathlib.Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with files.write_atomically(path, durable=durable) as partial:
        partial.write_text("after")
        assert partial == epath.Path(f"{path}.partial") and path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: pathlib.Path, error: type) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(error), files.write_atomically(str(path), suffix=".partial3") as partial:
        partial.write_text("half")
        assert partial.name == "a.txt.partial3"
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_what_cannot_be_written_is_one_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "missing" / "a.txt"
    with pytest.raises(InputError) as caught, files.write_atomically(path) as partial:
        partial.write_text("x")
    assert str(caught.value) == f"{path}: cannot be written: No such file or directory"
    full = OSError(28, "No space left on device")
    message = "a.txt: cannot be written: No space left on device"
    with pytest.raises(InputError, match=message), files.write_atomically(tmp_path / "a.txt"):
        raise full
    (tmp_path / "folder").mkdir()
    message = "folder: cannot be written: .* is a directory"
    folder = tmp_path / "folder"
    with pytest.raises(InputError, match=message), files.write_atomically(folder) as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == ["folder"]


def test_an_error_of_what_is_read_meanwhile_keeps_its_name(tmp_path: pathlib.Path) -> None:
    source, path = tmp_path / "source.png", tmp_path / "a.npz"
    with (
        pytest.raises(FileNotFoundError, match="source.png"),
        files.write_atomically(path) as partial,
    ):
        partial.write_bytes(source.read_bytes())
    assert not os.listdir(tmp_path)


def test_digests() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256("weight ü\n".encode() + b"\x00\xff" + array.T.tobytes())
    assert files.digest("weight ü\n", b"", b"\x00\xff", array.T) == expected.hexdigest()
    assert files.digest(np.float32(1.5)) == hashlib.sha256(np.float32(1.5).tobytes()).hexdigest()
    half = array.astype(ml_dtypes.bfloat16)
    assert files.digest(half) == hashlib.sha256(half.tobytes()).hexdigest()
    assert files.digest(np.zeros((0, 2))) == files.digest() == hashlib.sha256().hexdigest()


def test_digest_of_values_does_not_see_the_order_of_keys() -> None:
    value = {"b": [1, None, 0.1], "a": "ü"}
    expected = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    # A change of this text would orphan the folders and caches that are named by it.
    assert expected.startswith("0acd02")
    assert files.json_digest(value) == files.json_digest(dict(reversed(value.items()))) == expected


def test_digest_of_files(tmp_path: pathlib.Path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 3)
    monkeypatch.setattr(files, "_BLOCK", 100)
    assert files.file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="nothing.bin: found no such file, expected a file"):
        files.file_digest(tmp_path / "nothing.bin")
    with pytest.raises(InputError, match="found a folder, expected a file"):
        files.file_digest(tmp_path)
