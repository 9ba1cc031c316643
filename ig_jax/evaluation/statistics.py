"""Feature means and covariances in float64: streamed, merged over processes, stored as `.npz`.

The files share ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`), so ADM's reference sets are
read as they are; arrays that would need unpickling are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np

from ig_jax.errors import InputError, reading
from ig_jax.parallel import hosts
from ig_jax.paths import existing_file, resolve
from ig_jax.storage.files import Arrays, open_npz, write_atomically

# Rows are folded in blocks of this many, whatever sizes they arrive in, so that the result does not
# depend (not even in the last bit) on batch sizes.
BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """Moments of a set of feature vectors.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased (divided by count − 1), as `np.cov` and ADM have it.
        count: number of feature vectors; None where a file does not say (ADM's).
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self):
        width = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (width, width):
            raise InputError(
                f"statistics: mean has shape {self.mean.shape} and covariance "
                f"{self.covariance.shape}, expected (D,) and (D, D)"
            )
        if not (np.all(np.isfinite(self.mean)) and np.all(np.isfinite(self.covariance))):
            raise InputError("statistics: mean or covariance has NaN or infinite values")

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """L (D, rank) with `Σ = L Lᵀ`; raises `InputError` if there is none.

        Eigenvalues below rounding error are dropped: their square roots are 1e8 times larger than
        they are, and two thousand of them would be seen in a distance.
        """
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        scale = np.abs(values).max(initial=0.0)
        if values.min(initial=0.0) < -1e-4 * scale:
            raise InputError(
                f"statistics: the covariance has eigenvalues down to {values[0]:.3g}, "
                "expected none below 0"
            )
        keep = values > scale * len(values) * np.finfo(np.float64).eps
        return vectors[:, keep] * np.sqrt(values[keep])


class RunningStatistics:
    """Accumulates mean and covariance of feature vectors that arrive in batches.

    Keeps (count, mean, scatter about the mean) and merges by the pairwise update of Chan, Golub &
    LeVeque (1979), which loses no digits when the mean is large against the spread. Memory is one
    D × D float64 matrix and one block of rows.
    """

    def __init__(self, width: int):
        self.width = width
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))
        self._pending: list[np.ndarray] = []

    def update(self, features: np.ndarray) -> None:
        """Adds (N, D) features.

        Raises:
            InputError: if they are not (N, D) or not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.width:
            raise InputError(f"features: shape {features.shape}, expected (N, {self.width})")
        if not np.all(np.isfinite(features)):
            raise InputError("features: NaN or infinite values")
        self._pending.append(features)
        if sum(map(len, self._pending)) >= BLOCK:
            rows = np.concatenate(self._pending)
            full = len(rows) - len(rows) % BLOCK
            for start in range(0, full, BLOCK):
                self._fold(*_moments(rows[start : start + BLOCK]))
            self._pending = [rows[full:]]

    def merge(self, other: RunningStatistics) -> None:
        """Adds everything that `other` has seen; raises `InputError` for another width."""
        if other.width != self.width:
            raise InputError(f"statistics: merging width {other.width} into {self.width}")
        self._flush()
        self._fold(*other._parts())

    def result(self) -> GaussianStatistics:
        """Returns the statistics of everything seen so far; more can be added afterwards.

        Raises:
            InputError: if fewer than two vectors were seen.
        """
        count, mean, scatter = self._parts()
        if count < 2:
            raise InputError(f"statistics: {count} feature vectors, expected at least 2")
        return GaussianStatistics(mean, scatter / (count - 1), count)

    def over_processes(self) -> RunningStatistics:
        """Returns the accumulator of all processes' vectors together, the same on each of them.

        Only moments travel (D² numbers of each process, in slices), never the features. With one
        process this is a copy. Every process must call it.
        """
        total = RunningStatistics(self.width)
        count, mean, scatter = self._parts()
        if jax.process_count() == 1:
            total._fold(count, mean, scatter)
            return total
        counts = hosts.gather(np.asarray([count], np.float64))[:, 0]
        means = hosts.gather(mean)
        # A matrix of every process at once would be 32 MiB × processes at 2048; fold by row slices.
        # Chan's update of a slice of rows needs only those rows and the two mean vectors.
        for start in range(0, self.width, 256):
            rows = slice(start, start + 256)
            seen, running = 0.0, np.zeros(self.width)
            for n, m, part in zip(counts, means, hosts.gather(scatter[rows]), strict=True):
                if n > 0:
                    delta = m - running
                    weight = seen * n / (seen + n)
                    total._scatter[rows] += part + np.outer(delta[rows], delta) * weight
                    running = running + delta * (n / (seen + n))
                    seen += n
            total._mean = running
        total.count = int(counts.sum())
        return total

    def _parts(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(count, mean, scatter) with the pending rows folded in, leaving `self` unchanged."""
        whole = RunningStatistics(self.width)
        whole.count, whole._mean = self.count, self._mean
        whole._scatter, whole._pending = self._scatter.copy(), self._pending
        whole._flush()
        return whole.count, whole._mean, whole._scatter

    def _flush(self) -> None:
        rows = sum(map(len, self._pending))
        if rows:
            self._fold(*_moments(np.concatenate(self._pending)))
        self._pending = []

    def _fold(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total


def gaussian_statistics(features: np.ndarray) -> GaussianStatistics:
    """Returns mean and unbiased covariance of (N, D) features, N ≥ 2."""
    running = RunningStatistics(np.shape(features)[-1])
    running.update(features)
    return running.result()


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """What samples are compared with.

    Attributes:
        pool: statistics of the pooled features (FID; 2048 wide for Inception).
        spatial: statistics of the spatial features (sFID; 2023 wide), or None.
        features: (N, D) float32 pooled features for precision and recall, or None (ADM's files hold
            images in their place, see `NpzImages`).
        metadata: plain values that say what this was computed from.
    """

    pool: GaussianStatistics
    spatial: GaussianStatistics | None = None
    features: np.ndarray | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_statistics(path: os.PathLike | str, reference: ReferenceStatistics) -> None:
    """Writes statistics as an `.npz` that `load_statistics` (and ADM's evaluator, for FID) reads.

    The file is complete or absent: it is written beside its place and moved there.
    """
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.pool.count is not None:
        arrays["count"] = np.asarray(reference.pool.count, np.int64)
    arrays["metadata"] = np.asarray(json.dumps(dict(reference.metadata), sort_keys=True))
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: os.PathLike | str) -> ReferenceStatistics:
    """Reads statistics written by `save_statistics`, or ADM's `VIRTUAL_*.npz` (images unread).

    Raises:
        InputError: if the file is missing, damaged, pickled, or has no `mu` and `sigma`.
    """
    with open_npz(path, "statistics in an .npz file") as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise InputError(
                f"{path}: holds {', '.join(file.files) or 'nothing'}, expected mu and sigma "
                "(and mu_s, sigma_s)"
            )
        count = int(_member(file, path, "count")) if "count" in file.files else None
        spatial = None
        if {"mu_s", "sigma_s"} <= set(file.files):
            spatial = _gaussian(file, path, "mu_s", "sigma_s", count)
        pool, features, metadata = _gaussian(file, path, "mu", "sigma", count), None, {}
        if "features" in file.files:
            features = _member(file, path, "features")
            if features.shape[1:] != pool.mean.shape or features.dtype.kind != "f":
                raise InputError(
                    f"{path}: features is {features.dtype} {features.shape}, expected floats "
                    f"(N, {pool.mean.size})"
                )
        if "metadata" in file.files:
            metadata = dict(json.loads(str(_member(file, path, "metadata"))))
        return ReferenceStatistics(pool, spatial, features, metadata)


class NpzImages:
    """The images `arr_0` of a sample or reference `.npz`, read in order and in chunks.

    50,000 images of 256×256 are 9.8 GB, so the array is never held whole.

    Attributes:
        shape: (N, H, W, C) of the stored uint8 array.
    """

    def __init__(self, path: os.PathLike | str, key: str = "arr_0"):
        """Opens the header only.

        Raises:
            InputError: if the file is missing, damaged or pickled, lacks `key`, or the array is not
                (N, H, W, C) uint8.
        """
        self.path, self.key = existing_file(path, "an .npz file"), key
        with self._stream() as stream:
            self.shape = self._read_header(stream)

    def __len__(self) -> int:
        return self.shape[0]

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yields (≤ size, H, W, C) uint8 arrays that together are the whole array.

        Raises `InputError` for a damaged or truncated file.
        """
        with self._stream() as stream:
            self._read_header(stream)
            row_bytes = int(np.prod(self.shape[1:]))
            for start in range(0, len(self), size):
                rows = min(size, len(self) - start)
                data = stream.read(rows * row_bytes)
                if len(data) != rows * row_bytes:
                    raise InputError(f"{self.path}: {self.key} ends early, the file is truncated")
                yield np.frombuffer(data, np.uint8).reshape(rows, *self.shape[1:])
            # Only at the end is the checksum compared, of the header too.
            if stream.read(1):
                raise InputError(f"{self.path}: {self.key} is longer than its header says")

    @contextlib.contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        member = f"{self.key}.npy"
        with (
            reading(self.path, "an .npz of pictures"),
            self.path.open("rb") as file,
            zipfile.ZipFile(file) as archive,
        ):
            if member not in archive.namelist():
                found = ", ".join(archive.namelist()) or "nothing"
                raise InputError(f"{self.path}: holds {found}; expected {member}")
            with archive.open(member) as stream:
                yield stream

    def _read_header(self, stream: IO[bytes]) -> tuple[int, int, int, int]:
        form = np.lib.format
        # Version 2 differs from 1 by longer headers; 3 is for field names, which images lack.
        first = form.read_magic(stream) == (1, 0)
        read = form.read_array_header_1_0 if first else form.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise InputError(_pickled(self.path, self.key))
        if dtype != np.uint8 or len(shape) != 4 or min(shape) < 0 or fortran:
            raise InputError(
                f"{self.path}: {self.key} is {dtype} {shape}{' in Fortran order' * fortran}, "
                "expected uint8 (N, height, width, channels)"
            )
        return shape


def _moments(rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    mean = rows.mean(0)
    centred = rows - mean
    return len(rows), mean, centred.T @ centred


def _member(file: Arrays, path: os.PathLike | str, key: str) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise InputError(_pickled(path, key)) from error
        raise


def _pickled(path: os.PathLike | str, key: str) -> str:
    return f"{path}: {key} holds pickled Python objects, refused; expected plain numbers"


def _gaussian(
    file: Arrays,
    path: os.PathLike | str,
    mean: str,
    covariance: str,
    count: int | None,
) -> GaussianStatistics:
    arrays = [_member(file, path, key) for key in (mean, covariance)]
    try:
        found = GaussianStatistics(
            *(np.asarray(a).astype(np.float64, casting="same_kind") for a in arrays), count
        )
        _ = found.factor  # what has none is said now, and not once there are samples
    except InputError as error:
        raise InputError(f"{path}: {mean}, {covariance}: {error}") from error
    return found
