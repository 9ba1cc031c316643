"""Sets of pictures to score or to compare with: files on disk and the data set itself.

However pictures arrive, they reach the feature extractor in the same batches in order of index, so
a stored `.npz` scores exactly as the samples did that it was written from.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from ig_jax import pictures
from ig_jax import record as record_lib
from ig_jax.data import pipeline
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError, reading
from ig_jax.evaluation.extractors import CHUNK
from ig_jax.evaluation.statistics import NpzImages
from ig_jax.experiment import ToImages
from ig_jax.paths import resolve
from ig_jax.storage import files

log = logging.getLogger("ig_jax")

# Pictures of a set with their positions (n,) in it, (n, H, W, C) uint8.
Pieces = Iterator[tuple[np.ndarray, np.ndarray]]


class StoredImages(Protocol):
    """Pictures on disk, read in order.

    Attributes:
        path: where they are.
        shape: (N, H, W, C).
    """

    path: epath.Path
    shape: tuple[int, int, int, int]

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yields (≤ size, H, W, C) uint8 arrays that together are the whole set."""
        ...


class PngFolder:
    """The PNG files of a folder and its subfolders, in natural order of their names.

    Which ones count is the rule of `pictures.walk_files`.

    Attributes:
        path: the folder.
        shape: (N, H, W, C), C being 1 (grey) or 3 (RGB); size and mode are the first file's.
    """

    def __init__(self, path: os.PathLike | str):
        """Lists the files and reads the first; raises `InputError` if there is none."""
        self.path = resolve(path)
        found = list(filter(pictures.is_picture, pictures.walk_files(self.path)))
        names = sorted((name for name in found if name.lower().endswith(".png")), key=_natural)
        others = [name for name in found if not name.lower().endswith(".png")]
        if not names:
            instead = f", only others such as {pictures.printable(others[0])}" if others else ""
            raise InputError(f"{path}: holds no .png files{instead}; expected a folder of PNGs")
        if others:
            log.warning(
                "%s: %d pictures that are no PNG, such as %s, are not scored",
                *(path, len(others), pictures.printable(others[0])),
            )
        self.files = [self.path / name for name in names]
        self.shape = (len(self.files), *pictures.read_image(self.files[0]).shape)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yields (≤ size, H, W, C) uint8 arrays; raises `InputError` if files differ."""
        for start in range(0, len(self.files), size):
            images = []
            for file in self.files[start : start + size]:
                picture = pictures.read_image(file)
                if picture.shape != self.shape[1:]:
                    raise InputError(
                        f"{file}: picture of shape {picture.shape}, "
                        f"expected {self.shape[1:]} as {self.files[0].name} has"
                    )
                images.append(picture)
            yield np.stack(images)


def _natural(name: str) -> list[Any]:
    """Sorts "img2.png" before "img10.png"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def open_images(path: os.PathLike | str) -> NpzImages | PngFolder:
    """Opens an `.npz` (`arr_0` uint8), a folder of PNGs, or the folder that `--mode=sample` wrote.

    Returns:
        The pictures; their `path` says where they were found. Raises `InputError`.
    """
    place = pictures_in(resolve(path))
    if place.is_dir():
        return PngFolder(place)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder; expected an .npz or a folder of PNGs")
    return NpzImages(place)


def pictures_in(place: epath.Path) -> epath.Path:
    """Where the pictures are in what `--mode=sample` wrote, beside its grid; else `place` itself.

    The `.npz` first: `images` may hold more of them than the last run asked for.
    """
    if (place / "protocol.json").exists():
        for name in ("samples.npz", "images"):
            if (place / name).exists():
                return place / name
    return place


@dataclasses.dataclass(frozen=True)
class StoredFacts:
    """What `--mode=sample` left beside its pictures; None where there is no such file.

    Attributes:
        labels: (N,) labels that were asked for.
        record: the sampling record.
        digest: hash of the pictures that both are of; empty where it was not stored.
    """

    labels: np.ndarray | None = None
    record: dict[str, Any] | None = None
    digest: str = ""

    def of(self, digest: str) -> tuple[StoredFacts, tuple[str, ...]]:
        """These facts if they are of the pictures with this hash, else none and a note."""
        if self.digest in ("", digest):
            return self, ()
        note = "the pictures are not those that protocol.json beside them is of: origin unknown"
        return StoredFacts(), (note,)


def stored_facts(path: os.PathLike | str, count: int) -> StoredFacts:
    """Reads `labels.txt` and `protocol.json` beside pictures.

    Args:
        path: the `.npz` or folder of PNGs.
        count: how many pictures it holds; facts about another number belong to other pictures.

    Returns:
        The facts. Raises `InputError` if the files are something else.
    """
    beside = resolve(path).parent
    labels, record, digest = None, None, ""
    if (beside / "labels.txt").exists():
        with reading(beside / "labels.txt", "lines of index, label and name"):
            lines = (beside / "labels.txt").read_text(encoding="utf-8").splitlines()
            labels = np.asarray([int(line.split()[1]) for line in lines], np.int32)
        labels = labels if len(labels) == count else None
    if (beside / "protocol.json").exists():
        record, digest = record_lib.load_sampling(beside / "protocol.json", count)
    return StoredFacts(labels, record, digest if record is not None else "")


def share(images: StoredImages) -> Pieces:
    """This process's share of stored pictures, chunk by chunk."""
    for i, chunk in enumerate(images.chunks(CHUNK)):
        if i % jax.process_count() == jax.process_index():
            yield i * CHUNK + np.arange(len(chunk)), chunk


class DataImages:
    """The data set's own pictures, training and held-out: pixels as they are, latents decoded.

    Args:
        source: the data set.
        to_images: from model space to uint8 pictures.
        name: of the data set, for records.
        size: (height, width) of its pictures.
    """

    def __init__(self, source: DataSource, to_images: ToImages, name: str, size: tuple[int, int]):
        self._source, self._to_images, self.size = source, to_images, size
        self.name = f"{name} data set"
        if source.autoencoder:
            self.name += f" decoded by {source.autoencoder}"

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def _parts(self) -> list[Any]:
        source = self._source
        return [source.train] + ([source.validation] if source.validation is not None else [])

    def fingerprint(self) -> str:
        """Hash of the size, of examples spread over the data set, and of how they are decoded."""
        about = [self.name, list(self._source.shape), len(self), self._to_images.record()]
        parts: list[str | np.ndarray] = [files.json_digest(about)]
        for part in self._parts:
            for i in np.unique(np.linspace(0, len(part) - 1, 64).astype(int)):
                example = part[int(i)]
                parts += [example[name] for name in sorted(example)]
        return files.digest(*parts)

    def share(self) -> Pieces:
        """This process's share of all pictures, batch by batch."""
        process, processes = jax.process_index(), jax.process_count()
        first = 0
        for part in self._parts:
            batches = pipeline.epoch_batches(part, CHUNK, process, processes)
            for i, batch in enumerate(batches):
                images = self._pictures(batch)
                yield first + (process + i * processes) * CHUNK + np.arange(len(images)), images
            first += len(part)

    def _pictures(self, batch: pipeline.Batch) -> np.ndarray:
        if "mean" not in batch and batch["x"].dtype == np.uint8:
            return batch["x"]
        x = np.asarray(batch.get("mean", batch.get("x")), np.float32)
        in_model_space = (x - self._source.shift) / self._source.scale
        return self._to_images(in_model_space, None, f" of the {self.name}")
