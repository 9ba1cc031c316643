"""Sets of pictures to score: files on disk, the data set itself, and what is compared with them.

However pictures arrive, they reach the feature extractor in the same batches in order of index, so
a stored `.npz` scores exactly as the samples did that it was written from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from ig_jax import console, pictures
from ig_jax.data import pipeline
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError
from ig_jax.evaluation import protocol, statistics
from ig_jax.evaluation.features import FeatureExtractor
from ig_jax.evaluation.statistics import (
    GaussianStatistics,
    NpzImages,
    ReferenceStatistics,
    RunningStatistics,
)
from ig_jax.experiment import ToImages
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve

# Pictures per call of the extractor; part of what makes two routes agree to the last bit.
CHUNK = 256
# Reference vectors kept for precision and recall, as many as ADM's reference sets have.
REFERENCE_FEATURES = 10_000
_DIGEST_BYTES = 16

log = logging.getLogger("ig_jax")


class ImageSet(Protocol):
    """Pictures that can be read in order: `shape` (N, H, W, C) and `chunks(size)` of uint8."""

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
        self.shape = (len(self.files), *self._read(self.files[0]).shape)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yields (≤ size, H, W, C) uint8 arrays; raises `InputError` if files differ."""
        for start in range(0, len(self.files), size):
            images = []
            for file in self.files[start : start + size]:
                picture = self._read(file)
                if picture.shape != self.shape[1:]:
                    raise InputError(
                        f"{file}: picture of shape {picture.shape}, "
                        f"expected {self.shape[1:]} as {self.files[0].name} has"
                    )
                images.append(picture)
            yield np.stack(images)

    @staticmethod
    def _read(file: epath.Path) -> np.ndarray:
        from PIL import Image

        try:
            with file.open("rb") as stream, Image.open(stream) as picture:
                if picture.mode not in ("L", "RGB"):
                    raise InputError(
                        f"{file}: PNG of mode {picture.mode}, expected 8-bit grey (L) or RGB"
                    )
                pixels = np.asarray(picture, np.uint8)
        except InputError:
            raise
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise InputError(f"{file}: not a readable PNG ({error})") from error
        return pixels[..., None] if pixels.ndim == 2 else pixels


def _natural(name: str) -> list[Any]:
    """Sorts "img2.png" before "img10.png"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def open_images(path: os.PathLike | str) -> NpzImages | PngFolder:
    """Opens an `.npz` (`arr_0` uint8), a folder of PNGs, or the folder that `--mode=sample` wrote.

    Returns:
        The pictures; their `path` says where they were found. Raises `InputError`.
    """
    place = _pictures_in(resolve(path))
    if place.is_dir():
        return PngFolder(place)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder; expected an .npz or a folder of PNGs")
    return NpzImages(place)


def _pictures_in(place: epath.Path) -> epath.Path:
    """Where the pictures are in what `--mode=sample` wrote, beside its grid; else `place` itself.

    The `.npz` first: `images` may hold more of them than the last run asked for.
    """
    if (place / "protocol.json").exists():
        for name in ("samples.npz", "images"):
            if (place / name).exists():
                return place / name
    return place


def stored_facts(
    path: os.PathLike | str, count: int
) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """What `--mode=sample` left beside its pictures: `labels.txt` and `protocol.json`.

    Args:
        path: the `.npz` or folder of PNGs.
        count: how many pictures it holds; facts about another number belong to other pictures.

    Returns:
        (labels, protocol): the (count,) labels asked for and the sampling record, each None if
        there is no such file. Raises `InputError` if they are something else.
    """
    beside = resolve(path).parent
    labels, record = None, None
    if (beside / "labels.txt").exists():
        lines = (beside / "labels.txt").read_text().splitlines()
        try:
            labels = np.asarray([int(line.split()[1]) for line in lines], np.int32)
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{beside}/labels.txt: expected lines of index, label and name ({error})"
            ) from error
        labels = labels if len(labels) == count else None
    if (beside / "protocol.json").exists():
        record = protocol.load_sampling(beside / "protocol.json", count)
    return labels, record


@dataclasses.dataclass(frozen=True)
class SetFeatures:
    """What scoring needs to know of N pictures, the same on every process.

    Attributes:
        pool: statistics of the pooled features.
        spatial: statistics of the spatial features, or None.
        features: (n, D) float32 pooled features, in order; n may be below N (see `kept`).
        probabilities: (N, classes) float32 in order, or None.
        shape: (N, H, W, C) of the pictures.
        digest: hash of all pixels, the same for the same pictures from any source.
    """

    pool: GaussianStatistics
    spatial: GaussianStatistics | None
    features: np.ndarray
    probabilities: np.ndarray | None
    shape: tuple[int, int, int, int]
    digest: str


class FeatureAccumulator:
    """Extracts features of pictures as they arrive and folds them into a `SetFeatures`.

    Every process adds its own pictures; moments are merged, and of the rest only what scoring needs
    row by row is gathered.

    Args:
        extractor: what turns pictures into features.
        kept: ascending positions whose pooled features are kept; all of them if None.
        probabilities: whether class probabilities are kept.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        kept: np.ndarray | None = None,
        probabilities: bool = True,
    ):
        self._extractor = extractor
        self._kept = kept
        self._wants_probabilities = probabilities
        self._pool = RunningStatistics(extractor.width)
        spatial = extractor.spatial_width
        self._spatial = None if spatial is None else RunningStatistics(spatial)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._shape = (0, 0, 0)
        # Starting empty: a process may get no pictures at all.
        self._positions = [np.zeros(0, np.int64)]
        self._digests = [np.zeros((0, _DIGEST_BYTES), np.uint8)]
        self._probabilities: list[np.ndarray] = []
        self._rows = [np.zeros((0, extractor.width), np.float32)]

    def add(self, positions: np.ndarray, images: np.ndarray) -> None:
        """Adds (n, H, W, C) uint8 pictures that are number `positions` (n,) of the set."""
        self._waiting.append((positions, images))
        count = sum(len(p) for p, _ in self._waiting)
        if count >= CHUNK:
            positions, images = map(np.concatenate, zip(*self._waiting, strict=True))
            full = count - count % CHUNK
            for start in range(0, full, CHUNK):
                self._extract(positions[start : start + CHUNK], images[start : start + CHUNK])
            self._waiting = [(positions[full:], images[full:])]

    def finish(self, count: int) -> SetFeatures:
        """Returns the result for all `count` pictures; every process must call it, once."""
        if any(len(positions) for positions, _ in self._waiting):
            self._extract(*map(np.concatenate, zip(*self._waiting, strict=True)))
        positions = np.concatenate(self._positions)
        kept = np.arange(count) if self._kept is None else self._kept
        places = np.searchsorted(kept, positions[np.isin(positions, kept)])
        probabilities = None
        if self._wants_probabilities and anywhere(bool(self._probabilities)):
            rows = self._probabilities or [np.zeros((0, 0), np.float32)]
            probabilities = in_order(np.concatenate(rows), positions, count)
        digests = in_order(np.concatenate(self._digests), positions, count)
        return SetFeatures(
            pool=self._pool.over_processes().result(),
            spatial=self._spatial and self._spatial.over_processes().result(),
            features=in_order(np.concatenate(self._rows), places, len(kept)),
            probabilities=probabilities,
            shape=(count, *(int(size) for size in _gathered(np.asarray(self._shape)).max(0))),
            digest=hashlib.sha256(digests.tobytes()).hexdigest(),
        )

    def _extract(self, positions: np.ndarray, images: np.ndarray) -> None:
        found = self._extractor(images)
        self._shape = images.shape[1:]
        self._pool.update(found.pool)
        if self._spatial is not None:
            self._spatial.update(found.spatial)
        if self._wants_probabilities and found.probabilities is not None:
            self._probabilities.append(found.probabilities)
        wanted = np.isin(positions, self._kept) if self._kept is not None else slice(None)
        self._rows.append(found.pool[wanted])
        self._positions.append(positions)
        digests = [hashlib.blake2b(image, digest_size=_DIGEST_BYTES).digest() for image in images]
        self._digests.append(np.frombuffer(b"".join(digests), np.uint8).reshape(len(images), -1))


def _gathered(array: np.ndarray) -> np.ndarray:
    """Stacks every process's array, (P, …)."""
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(_gathered(np.asarray(flag, np.int32)).any())


def primary_says(flag: bool) -> bool:
    """The primary process's flag, on all of them: what it saw on disk decides for all."""
    return bool(_gathered(np.asarray(flag, np.int32))[0])


def in_order(rows: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """Collects all processes' rows (n, D) into one (count, D) array by their `places` (n,)."""
    sizes = _gathered(np.asarray(rows.shape, np.int32))
    share, width = sizes.max(0)
    padded = np.zeros((share, width), rows.dtype)
    padded[: len(rows), : rows.shape[1]] = rows
    filled = np.full(share, -1, np.int32)
    filled[: len(rows)] = places
    filled, stacked = _gathered(filled), _gathered(padded)
    ordered = np.zeros((count, width), rows.dtype)
    ordered[filled[filled >= 0]] = stacked[filled >= 0]
    return ordered


def file_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    description: str,
    *,
    kept: np.ndarray | None = None,
    probabilities: bool = True,
) -> SetFeatures:
    """Features of stored pictures; the processes share the chunks among themselves."""
    accumulator = FeatureAccumulator(extractor, kept=kept, probabilities=probabilities)
    with console.progress_bar(images.shape[0], description) as advance:
        for i, chunk in enumerate(images.chunks(CHUNK)):
            if i % jax.process_count() == jax.process_index():
                accumulator.add(i * CHUNK + np.arange(len(chunk)), chunk)
            advance(len(chunk))
    return accumulator.finish(images.shape[0])


class DataImages:
    """The data set's own pictures, training and held-out: pixels as they are, latents decoded.

    Args:
        source: the data set.
        to_images: from model space to uint8 pictures.
        name: of the data set, for records.
    """

    def __init__(self, source: DataSource, to_images: ToImages, name: str):
        self._source, self._to_images = source, to_images
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
        """Hash of the size and of examples spread over the data set."""
        digest = hashlib.sha256(f"{self.name} {self._source.shape} {len(self)}".encode())
        for part in self._parts:
            for i in np.unique(np.linspace(0, len(part) - 1, 64).astype(int)):
                example = part[int(i)]
                for name in sorted(example):
                    digest.update(np.ascontiguousarray(example[name]).tobytes())
        return digest.hexdigest()

    def features(
        self, extractor: FeatureExtractor, kept: np.ndarray, description: str
    ) -> SetFeatures:
        """Features of all pictures; each process reads its share of the batches."""
        accumulator = FeatureAccumulator(extractor, kept=kept, probabilities=False)
        process, processes = jax.process_index(), jax.process_count()
        first = 0
        with console.progress_bar(len(self), description) as advance:
            for part in self._parts:
                batches = pipeline.epoch_batches(part, CHUNK, process, processes)
                for i, batch in enumerate(batches):
                    images = self._pictures(batch)
                    start = first + (process + i * processes) * CHUNK
                    accumulator.add(start + np.arange(len(images)), images)
                    advance(len(images) * processes)
                first += len(part)
        return accumulator.finish(len(self))

    def _pictures(self, batch: pipeline.Batch) -> np.ndarray:
        if "mean" not in batch and batch["x"].dtype == np.uint8:
            return batch["x"]
        x = np.asarray(batch.get("mean", batch.get("x")), np.float32)
        in_model_space = (x - self._source.shift) / self._source.scale
        return self._to_images(in_model_space, None, f" of the {self.name}")


def open_reference(
    path: str, extractor: FeatureExtractor, data: DataImages | None, cache: epath.PathLike | None
) -> ReferenceStatistics:
    """What samples are compared with; whatever had to be computed is cached.

    Args:
        path: ADM's reference `.npz`, statistics of ours, an `.npz` or folder of pictures, or empty
            for the data set.
        extractor: of the features.
        data: the data set; not needed with a path.
        cache: folder of cached statistics, or None to keep nothing.

    Returns:
        Statistics whose metadata name the reference, its hash, count and resolution (H, W) (None
        where a file does not say).

    Raises:
        InputError: a missing or damaged file, or one of other features.
    """
    if not path:
        make = functools.partial(_from_data, data, extractor)
        return _cached(cache, f"{data.fingerprint()} {extractor.fingerprint}", make)
    place = _pictures_in(resolve(path))
    if place.is_dir():
        images: ImageSet = PngFolder(place)
        return _from_images(images, extractor, place.name, None)
    path = os.fspath(place)
    members = _members(path)
    if "mu" not in members:
        images = NpzImages(path)
        digest = protocol.file_hash(path)
        make = functools.partial(_from_images, images, extractor, place.name, digest)
        return _cached(cache, f"{digest} {extractor.fingerprint}", make)
    return _from_statistics(path, "arr_0" in members, extractor, cache)


def _from_statistics(
    path: str, has_images: bool, extractor: FeatureExtractor, cache: epath.PathLike | None
) -> ReferenceStatistics:
    """Stored statistics, completed by the features of the images beside them (ADM's files)."""
    stored = statistics.load_statistics(path)
    found = stored.pool.mean.size
    if found != extractor.width:
        raise InputError(
            f"{path}: statistics of {found} features, expected {extractor.width} of "
            f"{extractor.name}"
        )
    made_by = stored.metadata.get("extractor")
    if made_by not in (None, extractor.fingerprint):
        raise InputError(
            f"{path}: statistics of another feature extractor ({made_by[:8]}), expected "
            f"{extractor.name} ({extractor.fingerprint[:8]})"
        )
    digest = protocol.file_hash(path)
    metadata = {
        "resolution": None,
        "count": stored.pool.count,
        **stored.metadata,
        "name": resolve(path).name,
        "hash": digest,
    }
    if stored.features is None and has_images:
        images = NpzImages(path)
        make = functools.partial(_from_images, images, extractor, resolve(path).name, digest)
        beside = _cached(cache, f"{digest} {extractor.fingerprint}", make)
        metadata["resolution"] = beside.metadata["resolution"]
        stored = dataclasses.replace(stored, features=beside.features)
    return dataclasses.replace(stored, metadata=metadata)


def _members(path: str) -> list[str]:
    place = resolve(path)
    if not place.exists():
        raise InputError(f"{path}: no such file; expected a reference .npz, or empty for the data")
    try:
        with place.open("rb") as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: not an .npz file, or truncated ({error})") from error


def _kept(count: int) -> np.ndarray:
    spread = np.linspace(0, count - 1, min(count, REFERENCE_FEATURES))
    return np.unique(spread.astype(np.int64))


def _from_data(data: DataImages, extractor: FeatureExtractor) -> ReferenceStatistics:
    found = data.features(extractor, _kept(len(data)), "reference features")
    return _reference(found, extractor, data.name, found.digest)


def _from_images(
    images: ImageSet, extractor: FeatureExtractor, name: str, digest: str | None
) -> ReferenceStatistics:
    kept = _kept(images.shape[0])
    found = file_features(images, extractor, "reference features", kept=kept, probabilities=False)
    return _reference(found, extractor, name, digest or found.digest)


def _reference(
    found: SetFeatures, extractor: FeatureExtractor, name: str, digest: str
) -> ReferenceStatistics:
    metadata = {
        "name": name,
        "hash": digest,
        "count": found.shape[0],
        "resolution": list(found.shape[1:3]),
        "extractor": extractor.fingerprint,
    }
    return ReferenceStatistics(found.pool, found.spatial, found.features, metadata)


def _cached(
    cache: epath.PathLike | None, key: str, make: Callable[[], ReferenceStatistics]
) -> ReferenceStatistics:
    """Statistics from the cache if they are there, else made and (by the primary) stored."""
    if cache is None:
        return make()
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = resolve(cache) / f"reference-{key}.npz"
    if primary_says(file.exists()):
        return statistics.load_statistics(file)
    reference = make()
    if is_primary():
        statistics.save_statistics(file, reference)
    return reference
