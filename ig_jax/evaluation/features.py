"""Features of sets of pictures: extracted as pictures arrive, merged over processes, and kept row
by row where a metric asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from ig_jax import console
from ig_jax import record as record_lib
from ig_jax.evaluation import images as images_lib
from ig_jax.evaluation.extractors import CHUNK, FeatureExtractor
from ig_jax.evaluation.statistics import (
    GaussianStatistics,
    RunningStatistics,
    gaussian_statistics,
)
from ig_jax.parallel import hosts
from ig_jax.storage import files

# Rows that are the pictures themselves, beside those that an extractor gives.
IMAGES = "images"


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """What metrics read of N pictures, the same on every process.

    Attributes:
        pool: moments of the pooled features.
        spatial: moments of the spatial features, or None.
        rows: by name of `extractors.Features` (or "images"), one row for each picture in order:
            (n, D) float32, images (n, H, W, C) uint8. Those that were asked for; n is below N
            where only some were.
        shape: (N, H, W, C) of the pictures.
        digest: hash of all pixels, the same for the same pictures from any source.
        memo: results that two metrics share.
    """

    pool: GaussianStatistics
    spatial: GaussianStatistics | None
    rows: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    digest: str = ""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_rows(cls, rows: Mapping[str, np.ndarray], shape: tuple[int, ...] = ()) -> FeatureSet:
        """The set whose rows are these, "pool" among them; `shape` (H, W, C) is its pictures'."""
        spatial = gaussian_statistics(rows["spatial"]) if "spatial" in rows else None
        pool = gaussian_statistics(rows["pool"])
        return cls(pool, spatial, rows, (len(rows["pool"]), *shape))


class FeatureAccumulator:
    """Extracts features of pictures as they arrive and folds them into a `FeatureSet`.

    Every process adds its own pictures; moments are merged, and of the rest only what is asked for
    row by row is gathered.

    Args:
        extractor: what turns pictures into features.
        rows: names of rows to keep; those that the extractor does not give are left out.
        kept: ascending positions of which rows are kept; all of them if None.
    """

    def __init__(
        self, extractor: FeatureExtractor, rows: Collection[str], kept: np.ndarray | None = None
    ):
        self._extractor = extractor
        self._kept = kept
        self._pool = RunningStatistics(extractor.width)
        spatial = extractor.spatial_width
        self._spatial = None if spatial is None else RunningStatistics(spatial)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._shape = (0, 0, 0)
        # Starting empty: a process may get no pictures at all.
        self._positions = [np.zeros(0, np.int64)]
        self._digests = [np.zeros((0, record_lib.HASH_BYTES), np.uint8)]
        given = (*extractor.gives, IMAGES)
        self._rows: dict[str, list[np.ndarray]] = {n: [] for n in given if n in rows}

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

    def finish(self, count: int) -> FeatureSet:
        """Returns the result for all `count` pictures; every process must call it, once."""
        if any(len(positions) for positions, _ in self._waiting):
            self._extract(*map(np.concatenate, zip(*self._waiting, strict=True)))
        positions = np.concatenate(self._positions)
        kept = np.arange(count) if self._kept is None else self._kept
        places = np.searchsorted(kept, positions[np.isin(positions, kept)])
        rows = {}
        for name, parts in self._rows.items():
            nothing = np.zeros(0, np.uint8 if name == IMAGES else np.float32)
            mine = np.concatenate(parts) if parts else nothing
            rows[name] = hosts.in_order(mine, places, len(kept))
        digests = hosts.in_order(np.concatenate(self._digests), positions, count)
        return FeatureSet(
            pool=self._pool.over_processes().result(),
            spatial=self._spatial and self._spatial.over_processes().result(),
            rows=rows,
            shape=(count, *(int(size) for size in hosts.gather(np.asarray(self._shape)).max(0))),
            digest=files.digest(digests),
        )

    def _extract(self, positions: np.ndarray, images: np.ndarray) -> None:
        found = self._extractor(images)
        self._shape = images.shape[1:]
        self._pool.update(found.pool)
        if self._spatial is not None:
            self._spatial.update(found.spatial)
        wanted = np.isin(positions, self._kept) if self._kept is not None else slice(None)
        for name, parts in self._rows.items():
            parts.append((images if name == IMAGES else getattr(found, name))[wanted])
        self._positions.append(positions)
        hashes = b"".join(map(record_lib.picture_hash, images))
        self._digests.append(np.frombuffer(hashes, np.uint8).reshape(len(images), -1))


def extract(
    pieces: images_lib.Pieces,
    count: int,
    extractor: FeatureExtractor,
    description: str,
    rows: Collection[str],
    kept: np.ndarray | None = None,
) -> FeatureSet:
    """Features of a set of pictures, behind a progress bar.

    Args:
        pieces: this process's share of the pictures.
        count: how many there are on all processes.
        extractor: what turns pictures into features.
        description: for the progress bar.
        rows, kept: as for `FeatureAccumulator`.
    """
    accumulator = FeatureAccumulator(extractor, rows, kept)
    with console.progress_bar(count, description) as advance:
        for positions, images in pieces:
            accumulator.add(positions, images)
            advance(len(images) * jax.process_count())
    return accumulator.finish(count)
