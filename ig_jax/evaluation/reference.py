"""What samples are compared with: statistics on disk, pictures, or the data set itself.

Opening one checks all that can be checked in a moment; what takes long is computed (or read from
the cache) only then, by `OpenReference.statistics`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from ig_jax import record as record_lib
from ig_jax.errors import InputError, reading
from ig_jax.evaluation import features, statistics
from ig_jax.evaluation import images as images_lib
from ig_jax.evaluation.extractors import FeatureExtractor
from ig_jax.evaluation.images import DataImages, StoredImages
from ig_jax.evaluation.statistics import NpzImages, ReferenceStatistics
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import existing_file, resolve
from ig_jax.storage import files

# Vectors kept for precision and recall, as many as ADM's reference sets have.
KEPT = 10_000

log = logging.getLogger("ig_jax")


@dataclasses.dataclass(frozen=True)
class OpenReference:
    """A reference that is there and fits, before anything is computed.

    Attributes:
        name: for records and messages.
        count: how many pictures it is of; None where a file does not say.
        has_features: whether it has vectors, or pictures to take them from, besides moments.
        resolution: (H, W) of its pictures, or None.
        statistics: computes it or reads it from the cache.
    """

    name: str
    count: int | None
    has_features: bool
    resolution: tuple[int, int] | None
    statistics: Callable[[], ReferenceStatistics]


def open_reference(
    path: str, extractor: FeatureExtractor, data: DataImages | None, cache: epath.PathLike | None
) -> OpenReference:
    """Opens what samples are compared with; whatever has to be computed is cached.

    Args:
        path: ADM's reference `.npz`, statistics of ours, an `.npz` or folder of pictures, or empty
            for the data set.
        extractor: of the features.
        data: the data set; not needed with a path.
        cache: folder of cached statistics, or None to keep nothing.

    Returns:
        The reference. Its statistics' metadata name it, its hash, count and resolution (H, W) (None
        where a file does not say).

    Raises:
        InputError: a missing or damaged file, or one of other features.
    """

    if not path:
        key = f"{data.fingerprint()} {extractor.fingerprint}"
        make = functools.partial(_from_data, data, extractor)
        found = functools.partial(_cached, cache, key, make)
        return OpenReference(data.name, len(data), True, data.size, found)
    place = images_lib.pictures_in(resolve(path))
    members = [] if place.is_dir() else _members(place)
    if "mu" in members:
        return _open_statistics(place, "arr_0" in members, extractor, cache)
    images = images_lib.open_images(place)
    digest = None if place.is_dir() else record_lib.file_hash(place)
    found = functools.partial(_from_images, images, extractor, digest)
    if digest is not None:
        found = functools.partial(_cached, cache, f"{digest} {extractor.fingerprint}", found)
    return OpenReference(place.name, images.shape[0], True, images.shape[1:3], found)


def _open_statistics(
    path: epath.Path, has_images: bool, extractor: FeatureExtractor, cache: epath.PathLike | None
) -> OpenReference:
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
            f"{path}: statistics of another feature extractor ({str(made_by)[:8]}), expected "
            f"{extractor.name} ({extractor.fingerprint[:8]})"
        )
    digest = record_lib.file_hash(path)
    metadata = {
        "resolution": None,
        "count": stored.pool.count,
        **stored.metadata,
        "name": path.name,
        "hash": digest,
    }
    images = NpzImages(path) if stored.features is None and has_images else None
    if images is not None:
        metadata["resolution"] = list(images.shape[1:3])

    def complete() -> ReferenceStatistics:
        vectors = stored.features
        if images is not None:
            key = f"{digest} {extractor.fingerprint}"
            beside = _cached(cache, key, lambda: _from_images(images, extractor, digest))
            vectors = beside.features
        return dataclasses.replace(stored, features=vectors, metadata=metadata)

    has_features = images is not None or stored.features is not None
    count = images.shape[0] if images is not None else metadata["count"]
    return OpenReference(path.name, count, has_features, metadata["resolution"], complete)


def _members(path: epath.Path) -> list[str]:
    file = existing_file(path, "a reference .npz, or no path for the data set")
    with reading(path, "an .npz file"), file.open("rb") as stream, zipfile.ZipFile(stream) as found:
        return [name.removesuffix(".npy") for name in found.namelist()]


def _kept(count: int) -> np.ndarray:
    spread = np.linspace(0, count - 1, min(count, KEPT))
    return np.unique(spread.astype(np.int64))


def _from_data(data: DataImages, extractor: FeatureExtractor) -> ReferenceStatistics:
    return _compute(data.share(), len(data), extractor, data.name, None)


def _from_images(
    images: StoredImages, extractor: FeatureExtractor, digest: str | None
) -> ReferenceStatistics:
    pieces = images_lib.share(images)
    return _compute(pieces, images.shape[0], extractor, images.path.name, digest)


def _compute(
    pieces: images_lib.Pieces,
    count: int,
    extractor: FeatureExtractor,
    name: str,
    digest: str | None,
) -> ReferenceStatistics:
    found = features.extract(
        pieces, count, extractor, "reference features", rows=("pool",), kept=_kept(count)
    )
    metadata: dict[str, Any] = {
        "name": name,
        "hash": digest or found.digest,
        "count": found.shape[0],
        "resolution": list(found.shape[1:3]),
        "extractor": extractor.fingerprint,
    }
    return ReferenceStatistics(found.pool, found.spatial, found.rows["pool"], metadata)


def _cached(
    cache: epath.PathLike | None, key: str, make: Callable[[], ReferenceStatistics]
) -> ReferenceStatistics:
    """Statistics from the cache if they are there, else made and (by the primary) stored."""
    if cache is None:
        return make()
    file = resolve(cache) / f"reference-{files.digest(key)[:16]}.npz"
    stored = _read_cached(file)
    if hosts.primary_says(stored is not None):
        return stored or statistics.load_statistics(file)
    reference = make()
    if is_primary():
        statistics.save_statistics(file, reference)
    return reference


def _read_cached(file: epath.Path) -> ReferenceStatistics | None:
    """What is there, if it is whole; what is damaged can be computed again."""
    try:
        return statistics.load_statistics(file) if file.exists() else None
    except InputError as error:
        log.warning("%s: computing it again", error)
        return None
