"""Sampled pictures on disk: numbered PNGs that a stopped run goes on filling, and one `.npz`."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ig_jax import pictures
from ig_jax.paths import resolve
from ig_jax.storage import files

# The last chunk of every PNG: its length, name and checksum.
_END = b"\0\0\0\0IEND\xaeB`\x82"


def folder_name(record: dict[str, Any]) -> str:
    """A folder name for a sampling record: readable, and different for different records."""
    digest = files.json_digest(record)[:12]
    sampler = record["sampler"].partition("(")[0]
    return (
        f"step{record['checkpoint_step']}_ig{record['ig_scale']:g}_cfg{record['cfg_scale']:g}"
        f"_{sampler}{record['num_steps'] or ''}_seed{record['seed']}_{digest}"
    )


class PictureFolder:
    """A folder of numbered PNGs that a stopped sampling run can go on filling.

    Every picture is written whole or not at all, so that whatever is there counts, but for one that
    a machine without power or a copy left empty or cut.

    Args:
        directory: local or `gs://`; of one sampling record only (see `folder_name`).
    """

    def __init__(self, directory: epath.PathLike):
        self.directory = resolve(directory)

    def path(self, index: int) -> epath.Path:
        """Where picture `index` is."""
        return self.directory / f"{index:06d}.png"

    def done(self) -> set[int]:
        """Indices of the pictures that are there."""
        if not self.directory.exists():
            return set()
        names, _ = pictures.list_folder(self.directory)
        numbered = (re.fullmatch(r"(\d{6}|[1-9]\d{6,})\.png", name) for name in names)
        indices = (int(found[1]) for found in numbered if found)
        return {index for index in indices if _is_whole(self.path(index))}

    def write(self, index: int, image: np.ndarray) -> None:
        """Writes one (H, W, C) uint8 picture, whole or not at all."""
        with files.write_atomically(self.path(index)) as partial:
            pictures.save_image(partial, pictures.from_array(image))

    def read(self, index: int) -> np.ndarray:
        """Reads one (H, W, C) uint8 picture."""
        return pictures.read_image(self.path(index))


def _is_whole(path: epath.Path) -> bool:
    """Whether a file on a local disk ends as a PNG does; buckets hold no parts of files."""
    if "://" in os.fspath(path):
        return True
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - len(_END), 0))
        return file.read() == _END


def write_npz(path: epath.PathLike, images: Iterator[np.ndarray], count: int, shape: Any) -> None:
    """Writes `arr_0`, uint8 (count, *shape), picture by picture: 50,000 need no memory.

    The file appears under its name only when it is complete.
    """
    path = resolve(path)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    with (
        files.write_atomically(path) as partial,
        partial.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for image in images:
            member.write(np.ascontiguousarray(image).tobytes())
