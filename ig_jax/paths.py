"""Paths as people type them, and whether a folder can be written before any work is done for it."""

from __future__ import annotations

import os
import pathlib
import re
import tempfile

from etils import epath

from ig_jax.errors import InputError

_LONGEST_SHOWN = 160


def resolve(path: epath.PathLike) -> epath.Path:
    """The one absolute form of a path as typed; every path from outside passes here.

    Args:
        path: relative, `.`, with `~` or a trailing slash; or a bucket's (`gs://…`), left alone.

    Returns:
        An absolute path, which stays what it is if resolved again.

    Raises:
        InputError: if it is empty, or of a scheme that cannot be read.
    """
    typed = os.fspath(path)
    if not typed:
        raise InputError("a path is empty: expected a file or folder")
    if "\0" in typed:
        raise InputError(f"{typed!r}: expected a path, without a character of code 0")
    if "://" in typed:
        try:
            return epath.Path(typed)
        except KeyError:
            raise InputError(f"{typed}: expected a local path, or one of gs://") from None
    typed = os.path.expanduser(typed)
    # Only the file system knows what `..` after a link leads to.
    absolute = os.path.realpath if ".." in pathlib.PurePath(typed).parts else os.path.abspath
    return epath.Path(absolute(typed))


def existing_file(path: epath.PathLike, expected: str) -> epath.Path:
    """The resolved path of a file; raises `InputError` for what is none, or for one of no end.

    Args:
        path: as typed; local or `gs://`.
        expected: what it should be, for the message.
    """
    file = resolve(path)
    found = ""
    if file.is_dir():
        found = "a folder"
    elif not file.exists():
        found = "no such file"
    elif "://" not in os.fspath(file) and not os.path.isfile(file):
        found = "a pipe or device"
    if found:
        raise InputError(f"{path}: found {found}, expected {expected}")
    return file


def check_writable(path: epath.PathLike, name: str) -> None:
    """Raises `InputError` unless a folder is, or can be made, at a local path; leaves nothing.

    Args:
        path: the folder; of a bucket nothing can be said beforehand.
        name: what to call it in the message, such as "config.data.path".
    """
    folder = resolve(path)
    if "://" in os.fspath(folder):
        return
    shown = os.fspath(folder)
    shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        found = "a link to nothing" if not nearest.exists() else "a file"
        raise InputError(f"{name} is {shown}: {nearest} is {found}, expected a folder")
    longest = os.pathconf(nearest, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if too_long := [part for part in folder.parts if len(os.fsencode(part)) > longest]:
        raise InputError(
            f"{name} is {shown}: expected names of at most {longest} bytes, one has "
            f"{len(os.fsencode(too_long[0]))}"
        )
    try:
        # Permissions say too little: read-only mounts, quotas, the superuser, network drives.
        os.rmdir(tempfile.mkdtemp(prefix=".ig_jax-", dir=nearest))
    except OSError as error:
        raise InputError(
            f"{name} is {shown}: {nearest} cannot be written to ({error.strerror}), expected a "
            "writable folder"
        ) from error


def check_workdir(path: epath.PathLike) -> None:
    """As `check_writable`, for a workdir; raises `InputError` as that and `check_name` do."""
    check_writable(path, "the workdir")
    check_name(path)


def check_name(workdir: epath.PathLike) -> None:
    """Raises `InputError` for a path that checkpoints cannot be written to, or read back from."""
    name = os.fspath(workdir)
    if re.search(r"\[.*\]", name):
        # TensorStore writes there, and takes the brackets for a pattern when it reads.
        raise InputError(f"the workdir is {name}: expected a path without [ and ]")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"the workdir is {name!a}: expected a path that is UTF-8") from None
