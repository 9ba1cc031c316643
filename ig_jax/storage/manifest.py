"""Checksums of a checkpoint's files: written just before it is committed, compared when it is read.

The manifest lies in the checkpoint's folder, names its step, and counts for every mode that reads.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import logging
from collections.abc import Collection, Iterator

import jax
import numpy as np
from etils import epath

from ig_jax.errors import InputError
from ig_jax.parallel import hosts
from ig_jax.storage import files

log = logging.getLogger("ig_jax")

FILE = "manifest.json"
_FORMAT = "ig_jax checksums 1"
_THREADS = 4
_PROBLEMS = ("", "is missing", "has another size", "has another checksum")


class UntrustedError(InputError):
    """A checkpoint that is not what was written; `reason` says why, without naming it."""

    def __init__(self, folder: epath.Path, reason: str, remedy: str = ""):
        self.folder, self.reason = folder, reason
        super().__init__(f"{folder} is not trusted: {reason}{remedy}")


def write(folder: epath.Path, step: int) -> None:
    """Writes the manifest of a checkpoint whose items (subfolders of `folder`) are complete."""
    names = sorted(_walk(folder))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: files.file_checksum(folder / name), names)
        content = {
            "format": _FORMAT,
            "step": step,
            "files": {n: [(folder / n).stat().length, s] for n, s in zip(names, sums, strict=True)},
        }
    with files.write_atomically(folder / FILE, durable=True) as partial:
        partial.write_text(json.dumps(content | {"digest": files.json_digest(content)}))


def check(
    folder: epath.Path, items: Collection[str], *, content: bool = True, shared: bool = False
) -> bool:
    """Compares items of a checkpoint with its manifest.

    Where there is none, a line says so when weights are read.

    Args:
        folder: of the checkpoint, named after its step.
        items: what is about to be read.
        content: whether to compare checksums, or that files are there in their size alone.
        shared: whether the processes of the run, all of which then call this, share the reading.

    Returns:
        Whether there is a manifest.

    Raises:
        UntrustedError: something differs, on any process.
    """
    if not (folder / FILE).exists():
        if shared and jax.process_index() == 0:
            _warn(folder)
        return False
    expected = _read(folder)
    names = sorted(name for name in expected if name.partition("/")[0] in items)
    absent = set(items) - {name.partition("/")[0] for name in names}
    if absent:
        raise UntrustedError(folder, f"{min(absent)} is missing")
    mine = names
    if shared:
        mine = names[jax.process_index() :: jax.process_count()]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder / name, *expected[name], content), mine)
        found = [(names.index(n), p) for n, p in zip(mine, problems, strict=True) if p]
    first = np.asarray(min(found, default=(len(names), 0)), np.int64)
    index, problem = min(map(tuple, hosts.gather(first))) if shared else first
    if problem:
        raise UntrustedError(folder, f"{names[index]} {_PROBLEMS[problem]}")
    return True


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files of all items; what lies beside the items is no part of a manifest."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        elif prefix:
            yield f"{prefix}{path.name}"


def _read(folder: epath.Path) -> dict[str, tuple[int, int]]:
    try:
        content = json.loads((folder / FILE).read_text())
        digest = content.pop("digest")
        step, expected = content["step"], content["files"]
        whole = digest == files.json_digest(content)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise UntrustedError(folder, f"{FILE} is damaged")
    if str(step) != folder.name:
        raise UntrustedError(folder, f"it is a copy of step {step}")
    return expected


def _problem(file: epath.Path, size: int, checksum: int, content: bool) -> int:
    """What is wrong with a file, as an index of `_PROBLEMS`; 0 if nothing is."""
    try:
        if file.stat().length != size:
            return 2
        return 3 if content and files.file_checksum(file) != checksum else 0
    except OSError:
        return 1


@functools.cache
def _warn(folder: epath.Path) -> None:
    log.warning("%s has no %s, as of older versions: it cannot be verified", folder, FILE)
