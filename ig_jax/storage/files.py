"""Files that appear whole or not at all, SHA-256 digests of files, arrays and plain values, and
checksums of files.

Digests name folders, caches and weights that are already on people's disks: what they are computed
from may not change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ig_jax.errors import InputError, reading
from ig_jax.paths import existing_file, resolve

_BLOCK = 1 << 22


@contextlib.contextmanager
def write_atomically(
    path: os.PathLike | str, *, suffix: str = ".partial", durable: bool = False
) -> Iterator[epath.Path]:
    """Gives a file its name only once it is complete.

    Args:
        path: local or `gs://`; its folder exists. A file of that name is replaced.
        suffix: of the temporary name; processes that may write the same file at the same time need
            different ones.
        durable: whether a local file's content reaches the disk before its name does, so that even
            a machine that loses power leaves no hollow file (a picture takes 1 to 20 ms more).

    Yields:
        The temporary path, `path` + `suffix`, for the body to write. It is moved to `path` when the
        body ends, and removed when the body raises.

    Raises:
        InputError: one line, if `path` cannot be written (no folder, no permission, a full disk).
    """
    path = resolve(path)
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        if durable and os.path.exists(partial):
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # An error with another file's name is of something that the body read.
        ours = (None, os.fspath(partial), os.fspath(path))
        if isinstance(error, OSError) and error.filename in ours:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of an open `.npz`, by name.

    Each is read whole, so that its checksum is compared, which is of its header too: NumPy stops
    where a header that was changed says that the array ends.
    """

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        members = (name for name in archive.namelist() if name.endswith(".npy"))
        self.files = [name.removesuffix(".npy") for name in members]

    def __getitem__(self, name: str) -> np.ndarray:
        stream = io.BytesIO(self._archive.read(f"{name}.npy"))
        found = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise ValueError(f"{name} is longer than its header says")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@contextlib.contextmanager
def open_npz(path: os.PathLike | str, what: str) -> Iterator[Arrays]:
    """Opens an `.npz`; arrays that would need unpickling are refused.

    Args:
        path: local or `gs://`.
        what: what it should hold, for the message.

    Yields:
        Its arrays by name. Whatever is wrong with the file, also where an array is read inside, is
        raised as one line, an `InputError`.
    """
    file = existing_file(path, what)
    with (
        reading(path, what),
        file.open("rb") as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        yield Arrays(archive)


def digest(*parts: str | bytes | np.ndarray) -> str:
    """Returns the SHA-256, in hex, of parts one after another.

    Args:
        *parts: texts (as UTF-8), bytes, or arrays of any shape (their bytes in C order, without
            shape and type: put these in a text beside).
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | np.generic):
            # As bytes, since not every type (bfloat16) has a buffer of its own.
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def json_digest(value: Any) -> str:
    """Returns the SHA-256, in hex, of a value made of JSON's types; the order of keys is free."""
    return digest(json.dumps(value, sort_keys=True))


def file_digest(path: os.PathLike | str) -> str:
    """Returns the SHA-256, in hex, of a file's content, local or `gs://`, read block by block.

    Raises:
        InputError: if there is no such file.
    """
    found = hashlib.sha256()
    for block in _blocks(existing_file(path, "a file")):
        found.update(block)
    return found.hexdigest()


def file_checksum(file: epath.Path) -> int:
    """Returns the CRC-32 of a file's content, which finds accidents in half a second a GiB."""
    return functools.reduce(lambda found, block: zlib.crc32(block, found), _blocks(file), 0)


def _blocks(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield block
