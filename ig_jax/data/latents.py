"""Latents encoded ahead of training, read from any of three layouts behind one `DataSource`.

They are this package's ArrayRecord shards, the `.npy` files of SiT, REPA and EDM2, and the
safetensors shards of LightningDiT.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from ig_jax import pictures
from ig_jax.data import images, shards
from ig_jax.data.source import DataSource, Example, RandomAccess, hold_out
from ig_jax.errors import InputError, reading, suggest
from ig_jax.models.autoencoder import AUTOENCODERS
from ig_jax.storage import files, weight_files

# Examples that per-channel statistics are computed from where a layout brings none; LightningDiT's
# own code takes as many.
STATISTICS_EXAMPLES = 10_000
# Files of per-channel statistics, the preferred first; LightningDiT's code writes the last.
STATISTICS = ("latents_stats.safetensors", "latents_stats.npz", "latents_stats.pt")

# As many as a network may have.
MOST_CLASSES = 2**24

log = logging.getLogger("ig_jax")


def open_latents(
    path: str,
    *,
    autoencoder: str | None = None,
    expected_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    num_validation: int = 0,
    skip_damaged: bool = False,
) -> DataSource:
    """Opens prepared latents; the layout is recognised by its files.

    Args:
        path: a directory of our shards (`index.json`), of the SiT/REPA/EDM2 layout (`dataset.json`
            and `00000/img-latents-*.npy`, or `vae-sd` with them inside), or of LightningDiT's
            (`latents_rank*_shard*.safetensors`, `latents_stats.pt`).
        autoencoder: the one the latents must be of. Only our shards record theirs; of the others
            this is taken to be true (default for 4 channels: "sd-vae-ft-ema").
        expected_shape: (H, W, C) that the model needs.
        num_classes: that the model has, for the layouts that do not record it (default: the
            largest label plus one). Latents without labels have 0.
        num_validation: number of examples to hold out, the same for all layouts.
        skip_damaged: leave damaged shards out, with a warning that names them, instead of raising.

    Returns:
        A `DataSource`. Our shards and `.npy` files hold posteriors ("mean", "std"), LightningDiT's
        hold samples ("x"), with "_flip" twins where stored.

    Raises:
        InputError: nothing there (says how to prepare it), latents of another autoencoder or size,
            no labels for `num_classes`, damaged files (named).
    """
    if not path:
        raise _no_data(path, "it is empty")
    path = shards.require_local(path)
    if not os.path.isdir(path):
        alone = os.path.isfile(path)
        raise _no_data(path, "it is a file" if alone else "there is no such directory")
    if any(os.path.exists(os.path.join(path, n)) for n in (shards.INDEX, shards.PLAN)):
        opened = _open_shards(path, num_classes, skip_damaged)
    elif folder := _npy_folder(path):
        opened = _open_npy(folder, autoencoder, num_classes)
    elif names := _safetensors_names(path):
        opened = _open_safetensors(path, names, autoencoder, num_classes, skip_damaged)
    else:
        inside = ", ".join(sorted(os.listdir(path))[:3]) or "nothing"
        raise _no_data(path, f"it holds {inside}")
    source, values = opened
    _check_fit(path, values, autoencoder, expected_shape)
    train, validation = hold_out(source, num_validation)
    return DataSource(train=train, validation=validation, **values)


def _no_data(path: str, found: str) -> InputError:
    return InputError(
        f"config.data.path is {path!r}: {found}, expected prepared latents (to sample from "
        f"converted weights, {STATISTICS[-1]} is enough). Prepare them with "
        "`python -m ig_jax.main --mode=prepare --config=sit_xl_ig "
        "--config.data.images=/path/to/imagenet --config.data.path=/path/to/latents "
        "--config.data.autoencoder_path=/path/to/weights`, or train without any data: "
        "`python -m ig_jax.main --config=digits_ig --workdir=…`"
    )


def _check_fit(
    path: str,
    values: Mapping[str, Any],
    autoencoder: str | None,
    expected_shape: tuple[int, int, int] | None,
) -> None:
    """Refuses latents of another autoencoder or size than the config's."""
    found = values["autoencoder"]
    if autoencoder and found != autoencoder:
        raise InputError(
            f"{path}: holds latents of {found}, expected {autoencoder} (config.data.autoencoder)"
        )
    shape = values["shape"]
    published = AUTOENCODERS.get(found)
    if published is not None and published.spec.latent_channels != shape[-1]:
        raise InputError(
            f"{path}: holds latents of {shape[-1]} channels, expected "
            f"{published.spec.latent_channels}, as {found} has (config.data.autoencoder)"
        )
    if expected_shape is not None and shape != tuple(expected_shape):
        factor = 1 if published is None else published.spec.downsampling
        size = f", of {shape[0] * factor}-pixel images" if published is not None else ""
        raise InputError(
            f"{path}: holds latents of shape {shape}{size}, expected {tuple(expected_shape)} "
            "(config.model.input_size and channels)"
        )


def _normalisation(
    autoencoder: str | None, mean: Sequence[float], std: Sequence[float]
) -> dict[str, np.ndarray]:
    """Published shift and scale of an autoencoder if it has them, else per-channel statistics."""
    published = AUTOENCODERS.get(autoencoder)
    if published is not None and published.shift is not None:
        mean, std = [published.shift], [published.scale]
    return {"shift": np.asarray(mean, np.float32), "scale": np.asarray(std, np.float32)}


def known_statistics(
    path: str, autoencoder: str, channels: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Per-channel statistics of latents, which need not be there themselves.

    Args:
        path: a file `{"mean", "std"}`, or a folder with one (see `STATISTICS`) or with the index
            of our shards.
        autoencoder: whose latents they must be of, where that is recorded.
        channels: of the latents.

    Returns:
        Mean and standard deviation, (C,) float32 each; None if `path` has none. Raises `InputError`
        for a damaged file or one of other latents.
    """
    if not path:
        return None
    path = shards.require_local(path)
    if os.path.exists(os.path.join(path, shards.INDEX)):
        index = shards.read_index(path)
        _check_fit(path, {**index, "shape": tuple(index["shape"])}, autoencoder, None)
        return _checked_statistics(path, index["statistics"], channels)
    places = [path, *(os.path.join(path, name) for name in STATISTICS)]
    found = next(filter(os.path.isfile, places), None)
    return None if found is None else read_statistics(found, channels)


def read_statistics(file: os.PathLike | str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads per-channel statistics of latents.

    Args:
        file: `{"mean", "std"}` of C values each, in any shape: `.safetensors`, `.npz` or `.pt`.
        channels: C.

    Returns:
        Mean and standard deviation, (C,) float32 each. Raises `InputError`.
    """
    if not os.fspath(file).endswith(".npz"):
        return _checked_statistics(file, weight_files.read_checkpoint(file), channels)
    with files.open_npz(file, "statistics in an .npz file") as content:
        return _checked_statistics(file, dict(content), channels)


def _checked_statistics(
    where: os.PathLike | str, content: Mapping[str, Any], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    if not {"mean", "std"} <= set(content):
        found = ", ".join(map(str, content)) or "nothing"
        raise InputError(f"{where}: found {found}, expected mean and std")
    with reading(where, "numbers of mean and std"):
        mean, std = (
            np.asarray(content[name]).astype(np.float32, casting="same_kind").reshape(-1)
            for name in ("mean", "std")
        )
    if not len(mean) == len(std) == channels:
        raise InputError(
            f"{where}: found {len(mean)} values of mean and {len(std)} of std, expected one a "
            f"channel, {channels}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise InputError(
            f"{where}: found mean {mean.tolist()} and std {std.tolist()}, expected finite numbers "
            "and std above 0"
        )
    return mean, std


def _sampled_statistics(source: RandomAccess) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and std of the latents, from evenly spaced examples."""
    indices = np.unique(np.linspace(0, len(source) - 1, STATISTICS_EXAMPLES).astype(int))
    log.info("computing the statistics of %d latents", len(indices))
    sums = np.zeros(3)
    for i in indices:
        example = source[int(i)]
        x = np.asarray(example.get("mean", example.get("x")), np.float64)
        std = np.asarray(example.get("std", 0.0), np.float64) + np.zeros_like(x)
        sums = sums + np.stack([a.mean(axis=(0, 1)) for a in (x, x**2, std**2)], axis=-1)
    mean, squared, variance = np.moveaxis(sums / len(indices), -1, 0)
    return mean, np.sqrt(np.maximum(squared - mean**2 + variance, 1e-12))


def _classes(where: str, labels: np.ndarray, num_classes: int | None) -> dict[str, Any]:
    """Number and names of classes, for the layouts without names."""
    count, most = int(labels.max()) + 1, num_classes or MOST_CLASSES
    if count > most:
        raise InputError(
            f"{where}: found label {count - 1}, expected labels below {most} "
            "(config.model.num_classes)"
        )
    count = num_classes or count
    if labels.min() < 0:
        raise InputError(f"{where}: found label {labels.min()}, expected labels from 0 on")
    return {"num_classes": count, "class_names": class_names(count)}


def _unlabelled(found: str, num_classes: int | None) -> dict[str, Any]:
    """Number and names of classes where there are no labels; refuses a model that needs some."""
    if num_classes:
        raise InputError(
            f"{found}, so that these latents have no labels: config.model.num_classes is "
            f"{num_classes}, expected 0 (an unconditional model), or labels"
        )
    return {"num_classes": 0, "class_names": ()}


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names where none are recorded: ImageNet's words for 1,000 classes, else numbers."""
    if num_classes == 1000:
        return images.imagenet_names()
    return tuple(str(i) for i in range(num_classes))


def resolve_classes(wanted: str | Sequence[int | str], names: Sequence[str]) -> tuple[int, ...]:
    """Class numbers from numbers and names.

    Args:
        wanted: e.g. "207, golden retriever" or [207, "golden retriever"].
        names: of the classes in label order; each may be several, separated by ", ". A whole name
            is preferred to one of those several ("harp" to "harmonica, mouth organ, harp"),
            whatever its case.

    Returns:
        Labels in the order of `wanted`.

    Raises:
        InputError: a number out of range, an unknown name (suggests close ones), or one of several
            classes.
    """
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        pieces = _pieces(name)
        whole.setdefault(", ".join(pieces), []).append(label)
        for piece in dict.fromkeys(pieces):
            parts.setdefault(piece, []).append(label)
    items = _split_classes(wanted, whole) if isinstance(wanted, str) else wanted
    found = tuple(_resolve_class(str(item).strip(), names, whole, parts) for item in items)
    if not found:
        raise InputError("no class named: expected class numbers or names, separated by commas")
    return found


def _pieces(text: str) -> list[str]:
    return [piece for part in text.split(",") if (piece := part.strip().lower())]


def _split_classes(text: str, whole: Mapping[str, Any]) -> list[str]:
    """Splits at commas, but not inside a class's whole name, which may hold some."""
    pieces, items = _pieces(text), []
    longest = max((name.count(",") + 1 for name in whole), default=1)
    while pieces:
        for length in range(min(longest, len(pieces)), 0, -1):
            item = ", ".join(pieces[:length])
            if length == 1 or item in whole:
                break
        items.append(item)
        del pieces[:length]
    return items


def _resolve_class(
    text: str,
    names: Sequence[str],
    whole: Mapping[str, list[int]],
    parts: Mapping[str, list[int]],
) -> int:
    # A data set's own names come first: the digits' names are numbers.
    key = ", ".join(_pieces(text))
    labels = whole.get(key) or parts.get(key)
    if labels and len(labels) > 1:
        choices = " or ".join(f"{label} ({names[label]})" for label in labels)
        raise InputError(f"class {text!r} is {choices}: expected the number of one")
    if labels:
        return labels[0]
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < len(names):
            raise InputError(f"class {text} does not exist: expected 0…{len(names) - 1}")
        return int(text)
    raise InputError(
        f"class {text!r} does not exist: expected a number 0…{len(names) - 1} or a name"
        f"{suggest(text.lower(), tuple(parts))}"
    )


Opened = tuple[RandomAccess, dict[str, Any]]


def _channels_last(x: np.ndarray) -> np.ndarray:
    """(C, H, W) to (H, W, C), float32, in that order in memory: a batch of views would keep theirs,
    which cannot go through shared memory (Grain would hang) nor to a device without a copy."""
    return np.ascontiguousarray(np.moveaxis(x, 0, -1), np.float32)


# Our shards.


def _open_shards(path: str, num_classes: int | None, skip_damaged: bool) -> Opened:
    index = shards.read_index(path)
    problems = shards.damaged_shards(path, index["shards"])
    _report_damage(path, problems, len(index["shards"]), skip_damaged, "run --mode=prepare again")
    whole = [shard for shard in index["shards"] if shard["file"] not in problems]
    names = tuple(index["class_names"])
    unlabelled = f"{os.path.join(path, shards.INDEX)}: names no classes"
    classes = {"num_classes": len(names), "class_names": names}
    statistics = index["statistics"]
    return shards.ShardSource(path, index, whole), {
        "shape": tuple(index["shape"]),
        **(classes if names else _unlabelled(unlabelled, num_classes)),
        "autoencoder": index["autoencoder"],
        **_normalisation(index["autoencoder"], statistics["mean"], statistics["std"]),
    }


def _report_damage(
    path: str, problems: Mapping[str, str], total: int, skip: bool, remedy: str
) -> None:
    """Names damaged shards: in a warning if they are to be skipped, else in an error."""
    if not problems:
        return
    file, problem = next(iter(problems.items()))
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"{os.path.join(path, file)}: {problem}{others}"
    if skip and len(problems) < total:
        log.warning("%s; left out, %d of %d shards are read", message, total - len(problems), total)
        return
    raise InputError(
        f"{message}; the other {total - len(problems)} of {total} shards are whole: {remedy} to "
        "replace it"
    )


# SiT, REPA and EDM2: one .npy file an image, (2·C, H, W) float32, the mean and then the std.


_LABELS = '{"labels": [["00000/img-latents-00000000.npy", 12], …]}'


class NpySource:
    """Posteriors in `.npy` files.

    Args:
        folder: that holds `dataset.json`.
        names: (N,) bytes, relative paths.
        labels: (N,) int32.

    Attributes:
        shape: (H, W, C) of every latent, which is the first one's.
    """

    shape: tuple[int, ...] | None = None

    def __init__(self, folder: str, names: np.ndarray, labels: np.ndarray):
        self._folder, self._names, self._labels = folder, names, labels
        self.shape = self[0]["mean"].shape

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        file = self.where(index)
        with reading(file, "a NumPy file"), open(file, "rb") as stream:
            moments = _parse_npy(stream.read())
        if moments.ndim != 3 or len(moments) % 2 or not moments.size:
            raise InputError(
                f"{file}: found shape {moments.shape}, expected (2·C, H, W), mean and then std"
            )
        if self.shape not in (None, (*moments.shape[1:], len(moments) // 2)):
            raise InputError(
                f"{file}: found shape {moments.shape}, expected "
                f"{(2 * self.shape[2], *self.shape[:2])} as {self.where(0)} has"
            )
        mean, std = map(_channels_last, np.split(moments, 2))
        if not std.min() >= 0:
            raise InputError(
                f"{file}: found a std of {std.min()}, expected none below 0 (the first half of the "
                "channels is the mean, the second the std)"
            )
        return {"mean": mean, "std": std, "label": self._labels[index]}

    def where(self, index: int) -> str:
        """The file of an example."""
        return os.path.join(self._folder, os.fsdecode(self._names[index]))


_header_lock = threading.Lock()


@functools.lru_cache(maxsize=16)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if header[6] not in read or header[7]:
        raise ValueError(f"version {header[6]}.{header[7]} of the format")
    return read[header[6]](io.BytesIO(header[8:]))


def _parse_npy(data: bytes) -> np.ndarray:
    """Reads the content of an `.npy` file; raises ValueError.

    Not by `np.load`, which evaluates each header as Python source: slow, and in Python 3.11 not
    safe in several threads (SystemError, "AST constructor recursion depth mismatch").
    """
    if not data.startswith(b"\x93NUMPY") or len(data) < 12:
        raise ValueError("no NumPy header")
    first, size = (10, 2) if data[6] == 1 else (12, 4)
    start = first + int.from_bytes(data[8 : 8 + size], "little")
    with _header_lock:
        shape, fortran, dtype = _npy_header(data[:start])
    if dtype.kind not in "fiu":
        raise ValueError(f"values of type {dtype}")
    if len(data) != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _npy_folder(path: str) -> str | None:
    """The directory with `dataset.json`, or with latents that have none."""
    for folder in filter(os.path.isdir, (path, os.path.join(path, "vae-sd"))):
        found, folders = pictures.list_folder(folder)
        latents = any(name.endswith(".npy") for name in found)
        if "dataset.json" in found or "00000" in folders or latents:
            return folder
    return None


def _open_npy(folder: str, autoencoder: str | None, num_classes: int | None) -> Opened:
    # In the order of REPA's and EDM2's loaders.
    names = sorted(name for name in pictures.walk_files(folder) if name.endswith(".npy"))
    if not names:
        raise InputError(f"{folder}: holds no .npy files, expected latents beside dataset.json")
    labels, classes = _npy_classes(os.path.join(folder, "dataset.json"), names, num_classes)
    source = NpySource(folder, np.array(list(map(os.fsencode, names))), labels)
    shape = source.shape
    if autoencoder is None and shape[-1] == 4:
        autoencoder = "sd-vae-ft-ema"
    published = AUTOENCODERS.get(autoencoder)
    known = published is not None and published.shift is not None
    mean, std = ([0.0], [1.0]) if known else _sampled_statistics(source)
    return source, {
        "shape": shape,
        "autoencoder": autoencoder,
        **classes,
        **_normalisation(autoencoder, mean, std),
    }


def _npy_classes(
    where: str, names: Sequence[str], num_classes: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The label of every file, and their classes; `dataset.json` may be missing or without any."""
    content = shards.read_json(where)
    unlabelled = f"{where}: no such file" if content is None else f"{where}: its labels are null"
    entries = content.get("labels") if isinstance(content, dict) else content
    if entries is None or _all_null(entries):
        return np.zeros(len(names), np.int32), _unlabelled(unlabelled, num_classes)
    labels = _npy_labels(where, entries, names)
    return labels, _classes(where, labels, num_classes)


def _all_null(entries: Any) -> bool:
    """Whether entries name files, and a null as the label of each."""
    pairs = entries and isinstance(entries, list) and all(isinstance(e, list) for e in entries)
    return bool(pairs) and all(len(entry) == 2 and entry[1] is None for entry in entries)


def _whole(label: Any) -> int:
    """A label from JSON; raises `ValueError` and others for what is no whole number of 32 bits."""
    number = int(label)
    if isinstance(label, bool) or number != float(label) or not -(2**31) <= number < 2**31:
        raise ValueError(f"label {label}, expected a whole number below 2**31")
    return number


def _npy_labels(where: str, entries: Any, names: Sequence[str]) -> np.ndarray:
    """The label of every file, from `[["00000/img….npy", 12], …]`."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: found no labels, expected {_LABELS}")
    try:
        labels = {name.replace("\\", "/"): _whole(label) for name, label in entries}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{where}: found other entries than expected, {_LABELS} ({error})"
        ) from error
    unlabelled = [name for name in names if name not in labels]
    if unlabelled:
        raise InputError(
            f"{where}: has no label for {len(unlabelled)} of {len(names)} files, such as "
            f"{unlabelled[0]}{suggest(unlabelled[0], tuple(itertools.islice(labels, 1000)), 1)}"
        )
    if len(labels) > len(names):
        present = set(names)
        missing = [name for name in labels if name not in present]
        raise InputError(
            f"{where}: labels {len(missing)} files that are not there, such as {missing[0]}: "
            "expected all latents to be copied"
        )
    return np.array([labels[name] for name in names], np.int32)


# LightningDiT: safetensors shards of samples, (N, C, H, W), and mirrored twins.

_DTYPES: dict[str, type] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
}


class SafetensorsSource:
    """Samples in safetensors shards, read one example at a time, never whole.

    Args:
        files: paths of the shards.
        headers: of each, name → {"dtype", "shape", "start"} with the byte where the data starts.
        labels: (N,) int32.
    """

    def __init__(
        self, files: Sequence[str], headers: Sequence[Mapping[str, Any]], labels: np.ndarray
    ):
        self._files, self._headers, self._labels = list(files), list(headers), labels
        self._ends = list(itertools.accumulate(header["latents"]["shape"][0] for header in headers))
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors and locks do not travel to worker processes.
        return {k: v for k, v in vars(self).items() if k not in ("_descriptors", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard - 1] if shard else 0)
        example: Example = {"x": self._read(shard, "latents", position)}
        if "latents_flip" in self._headers[shard]:
            example["x_flip"] = self._read(shard, "latents_flip", position)
        return example | {"label": self._labels[index]}

    def where(self, index: int) -> str:
        """The file of an example."""
        return self._files[bisect.bisect_right(self._ends, index)]

    def _read(self, shard: int, name: str, position: int) -> np.ndarray:
        entry = self._headers[shard][name]
        _, *shape = entry["shape"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        length = int(np.prod(shape)) * dtype.itemsize
        # Not mapped: touched pages would count as this process's memory, and grow to the data set.
        with reading(self._files[shard], "a safetensors file"):
            data = os.pread(self._descriptor(shard), length, entry["start"] + position * length)
        if len(data) < length:
            raise InputError(f"{self._files[shard]}: truncated, example {position} is not there")
        return _channels_last(_values(data, entry["dtype"]).reshape(shape))

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self._files[shard], os.O_RDONLY)
            return self._descriptors[shard]


def _values(data: bytes, kind: str) -> np.ndarray:
    """The numbers of a tensor of a type that `_DTYPES` has, flat."""
    values = np.frombuffer(data, _DTYPES[kind])
    if kind == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _safetensors_names(path: str) -> list[str]:
    """Shards in sorted order, as LightningDiT's loader has them."""
    return sorted(
        name
        for name in pictures.list_folder(path)[0]
        if name.endswith(".safetensors") and not name.startswith("latents_stats")
    )


def _safetensors_header(file: str) -> dict[str, Any]:
    """Where the tensors of a file are; raises `InputError` for a damaged or foreign one."""
    size = os.path.getsize(file)
    with reading(file, "a safetensors file"), open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < size:
            raise ValueError("truncated, or another kind of file")
        content = json.loads(stream.read(length))
        entries = {k: v for k, v in content.items() if k != "__metadata__"}
        end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
        if size < end:
            raise InputError(f"{file}: truncated, {size} of {end} bytes")
        # The tensors must fill the file, as the format demands.
        with safetensors.safe_open(file, framework="np"):
            pass
    if "latents" not in entries:
        raise InputError(
            f"{file}: found {', '.join(entries) or 'nothing'}, expected latents, and perhaps "
            "labels and latents_flip"
        )
    header = {
        name: {
            "dtype": entries[name]["dtype"],
            "shape": entries[name]["shape"],
            "start": 8 + length + entries[name]["data_offsets"][0],
        }
        for name in ("latents", "latents_flip", "labels")
        if name in entries
    }
    for name, entry in header.items():
        axes = "[N]" if name == "labels" else "[N, C, H, W]"
        if len(entry["shape"]) != axes.count(",") + 1:
            raise InputError(f"{file}: {name} has shape {entry['shape']}, expected {axes}")
    counts = {name: entry["shape"][0] for name, entry in header.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{file}: found {counts}, expected as many labels as latents")
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{file}: {name} is of type {entry['dtype']}, expected {', '.join(_DTYPES)}"
            )
    return header


def _read_labels(file: str, header: Mapping[str, Any]) -> np.ndarray:
    entry = header["labels"]
    with open(file, "rb") as stream:
        stream.seek(entry["start"])
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        data = stream.read(entry["shape"][0] * dtype.itemsize)
    values = _values(data, entry["dtype"])
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.int32)
    if (wrong := np.flatnonzero(labels != values)).size:
        raise InputError(
            f"{file}: found label {values[wrong[0]]}, expected whole numbers below 2**31"
        )
    return labels


def _safetensors_classes(
    whole: Sequence[str], headers: Sequence[Mapping[str, Any]], num_classes: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The label of every latent, and their classes; all shards have labels, or none."""
    without = [file for file, header in zip(whole, headers, strict=True) if "labels" not in header]
    if not without:
        parts = [_read_labels(*pair) for pair in zip(whole, headers, strict=True)]
        # The file that a line on a label is about, should there be one.
        extremes = ((p.min(initial=0) < 0, p.max(initial=0)) for p in parts)
        _, where = max(zip(extremes, whole, strict=True))
        labels = np.concatenate(parts)
        return labels, _classes(where, labels, num_classes)
    if len(without) < len(whole):
        raise InputError(
            f"{without[0]}: holds no labels, expected some as the other shards have "
            f"({len(whole) - len(without)} of {len(whole)})"
        )
    count = sum(header["latents"]["shape"][0] for header in headers)
    return np.zeros(count, np.int32), _unlabelled(f"{without[0]}: holds no labels", num_classes)


def _open_safetensors(
    path: str,
    names: Sequence[str],
    autoencoder: str | None,
    num_classes: int | None,
    skip_damaged: bool,
) -> Opened:
    whole, headers, problems = [], [], {}
    for name in names:
        file = os.path.join(path, name)
        try:
            headers.append(_safetensors_header(file))
            whole.append(file)
        except InputError as error:
            problems[name] = str(error).removeprefix(f"{file}: ")
    _report_damage(path, problems, len(names), skip_damaged, "copy or encode it again")
    shape = tuple(np.roll(headers[0]["latents"]["shape"][1:], -1).tolist())
    for file, header in zip(whole, headers, strict=True):
        for name in set(header) - {"labels"}:
            if header[name]["shape"][1:] != headers[0]["latents"]["shape"][1:]:
                raise InputError(
                    f"{file}: {name} has shape {header[name]['shape']}, expected the shape of "
                    f"{whole[0]}'s, {headers[0]['latents']['shape']}"
                )
    if not any(header["latents"]["shape"][0] for header in headers):
        raise InputError(f"{path}: the shards are empty, expected latents")
    labels, classes = _safetensors_classes(whole, headers, num_classes)
    source = SafetensorsSource(whole, headers, labels)
    mean, std = known_statistics(path, autoencoder or "", shape[-1]) or _sampled_statistics(source)
    return source, {
        "shape": shape,
        "autoencoder": autoencoder,
        **classes,
        **_normalisation(autoencoder, mean, std),
    }
