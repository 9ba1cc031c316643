"""The format of prepared latents: ArrayRecord shards, a JSON file beside each, and one index.

    plan.json                                what is being encoded, written first
    latents-00000-of-00313.arrayrecord       records
    latents-00000-of-00313.json              written when that shard is complete
    index.json                               written when all shards are

A record is a little-endian int32 label followed by the float32 arrays that the index names in
`fields` ("mean", "std", and with twins "mean_flip", "std_flip"), each of `shape` (H, W, C). Nothing
in the files depends on time, processes or interruptions. `python -m ig_jax.data.shards DIR` checks
every checksum.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ig_jax import console
from ig_jax.data.source import Example
from ig_jax.errors import InputError, reading
from ig_jax.paths import existing_file, resolve
from ig_jax.storage.files import file_digest, json_digest, write_atomically

FORMAT = "ig_jax latents 1"
PLAN, INDEX = "plan.json", "index.json"
# Of the index: the digest of its other fields.
DIGEST = "digest"
FIELDS = ("mean", "std")
TWIN_FIELDS = ("mean_flip", "std_flip")
# Uncompressed: float32 noise hardly shrinks, and one record is one read.
WRITER_OPTIONS = "group_size:1,uncompressed"


def shard_name(shard: int, num_shards: int) -> str:
    """File name of a shard."""
    return f"latents-{shard:05d}-of-{num_shards:05d}.arrayrecord"


def marker_name(shard: int, num_shards: int) -> str:
    """File name of what is known of a complete shard."""
    return shard_name(shard, num_shards).replace(".arrayrecord", ".json")


def encode_record(label: int, arrays: Sequence[np.ndarray]) -> bytes:
    """Serialises one example; `arrays` in the order of the index's fields, (H, W, C) each."""
    parts = [np.asarray(label, "<i4").tobytes()]
    return b"".join(parts + [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays])


def decode_record(record: bytes, fields: Sequence[str], shape: Sequence[int]) -> Example:
    """Reads one example without copying it."""
    values = np.frombuffer(record, "<f4", offset=4).reshape(len(fields), *shape)
    example: Example = dict(zip(fields, values, strict=True))
    example["label"] = np.int32(np.frombuffer(record, "<i4", count=1)[0])
    return example


def require_local(path: str) -> str:
    """Returns `path`; raises `InputError` for buckets, which allow no fast random access."""
    if "://" in path:
        raise InputError(
            f"config.data.path is {path!r}: expected a local path, mount the bucket (gcsfuse) or "
            "copy it to a disk"
        )
    return os.fspath(resolve(path)) if path else path


def write_json(path: str, values: Mapping[str, Any], partial_suffix: str = ".partial") -> None:
    """Writes a JSON file, whole or not at all."""
    with write_atomically(path, suffix=partial_suffix, durable=True) as partial:
        partial.write_bytes(json.dumps(values, ensure_ascii=False).encode())


def read_json(path: str) -> Any:
    """What a JSON file holds; None if there is none; raises `InputError` if it is damaged."""
    if not os.path.lexists(path):
        return None
    with existing_file(path, "a JSON file").open() as file, reading(path, "a JSON file"):
        return json.load(file)


def _read_object(path: str) -> dict[str, Any] | None:
    """As `read_json`, of one of ours; raises `InputError` for anything but an object."""
    if not os.path.lexists(path):
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, expected an object with fields")
    return found


def read_index(path: str) -> dict[str, Any]:
    """Reads the index of prepared latents.

    Args:
        path: their directory.

    Returns:
        The plan's entries ("images", "image_size", "autoencoder", "fingerprint", "twins",
        "examples_per_shard", "class_names") and "fields", "shape", "num_examples", "labels",
        "statistics" (per-channel "mean" and "std" of the latents), "shards" ("file", "examples",
        "bytes", "sha256"), "skipped", "converted", "enlarged" (names of irregular images).

    Raises:
        InputError: there is none, preparing is not finished, or it is of another format.
    """
    where = os.path.join(path, INDEX)
    index = _read_object(where)
    if index is None:
        plan = read_plan(path)
        if plan is None:
            raise InputError(f"{path}: found no {INDEX}, expected prepared latents")
        total = num_shards(plan)
        done = sum(os.path.exists(os.path.join(path, marker_name(i, total))) for i in range(total))
        raise InputError(
            f"{path}: found {done} of {total} shards, expected all of them: preparing was not "
            "finished, run the same --mode=prepare command again and it continues"
        )
    if index.get("format") != FORMAT:
        raise InputError(f"{where}: found format {index.get('format')!r}, expected {FORMAT!r}")
    with reading(where, "an index of latents"):
        written = index.pop(DIGEST, None)  # older versions wrote none
        if written not in (None, json_digest(index)):
            raise InputError(
                f"{where}: has another checksum than when it was written, run the same "
                "--mode=prepare command again to write it anew"
            )
        _check_index(where, index)
    return index


def _check_index(where: str, index: Mapping[str, Any]) -> None:
    """Raises `InputError` or another exception unless the fields that are read are as written."""
    kinds = {"shards": list, "fields": list, "shape": list, "class_names": list}
    for name, kind in (kinds | {"statistics": dict, "autoencoder": str}).items():
        if not isinstance(index[name], kind):
            raise InputError(f"{where}: {name} is {index[name]!r:.80}, expected a {kind.__name__}")
    fields, shape, shards = tuple(index["fields"]), index["shape"], index["shards"]
    if fields not in (FIELDS, FIELDS + TWIN_FIELDS):
        raise InputError(f"{where}: fields is {index['fields']}, expected {', '.join(FIELDS)}")
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"{where}: shape is {shape}, expected [H, W, C]")
    if names := [name for name in index["class_names"] if not isinstance(name, str)]:
        raise InputError(f"{where}: names the class {names[0]!r}, expected a text")
    record = 4 * (1 + len(fields) * math.prod(shape))
    for shard in shards:
        file, examples, size = shard["file"], shard["examples"], shard["bytes"]
        if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file:
            raise InputError(f"{where}: names the shard {file!r}, expected a file of this folder")
        if not isinstance(examples, int) or not 0 <= examples * record <= size:
            raise InputError(
                f"{where}: {file} has {examples!r} examples in {size!r} bytes, expected {record} "
                "bytes or more for each"
            )
    if not any(shard["examples"] for shard in shards):
        raise InputError(f"{where}: names no shards with examples, expected at least one")
    for name in ("mean", "std"):
        found = np.asarray(index["statistics"][name], np.float32)
        least = -np.inf if name == "mean" else 0
        if found.shape != (shape[-1],) or not (np.isfinite(found) & (found > least)).all():
            raise InputError(
                f"{where}: {name} of statistics is {found.tolist()}, expected a number for each of "
                f"{shape[-1]} channels{', above 0' if name == 'std' else ''}"
            )


def read_plan(path: str) -> dict[str, Any] | None:
    """What is being prepared in a folder; None if nothing is; raises `InputError`."""
    where = os.path.join(path, PLAN)
    plan = _read_object(where)
    if plan is not None:
        with reading(where, "a plan of latents"):
            num_shards(plan)
    return plan


def num_shards(plan: Mapping[str, Any]) -> int:
    """Number of shards that a plan makes of its images."""
    return -(-plan["images"]["count"] // plan["examples_per_shard"])


def damaged_shards(path: str, shards: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong with shards that are missing or not as long as the index says, by file."""
    problems = {}
    for shard in shards:
        try:
            size = os.path.getsize(os.path.join(path, shard["file"]))
        except FileNotFoundError:
            problems[shard["file"]] = "missing"
            continue
        if size != shard["bytes"]:
            problems[shard["file"]] = f"truncated, {size} of {shard['bytes']} bytes"
            if size > shard["bytes"]:
                problems[shard["file"]] = f"altered, {size} bytes instead of {shard['bytes']}"
    return problems


def verify(path: str) -> dict[str, str]:
    """Checks the checksum of every shard.

    Args:
        path: directory of prepared latents, complete or not.

    Returns:
        What is wrong, by file; empty if all is well. Raises `InputError` if there are no latents.
    """
    path = require_local(path)
    plan = read_plan(path)
    if plan is None:
        raise InputError(f"{path}: found no {PLAN}, expected prepared latents")
    total = num_shards(plan)
    markers = [read_json(os.path.join(path, marker_name(i, total))) for i in range(total)]
    shards = [marker for marker in markers if marker is not None]
    problems = {
        shard_name(i, total): "not complete" for i, marker in enumerate(markers) if marker is None
    }
    problems |= damaged_shards(path, shards)
    for shard in console.progress(shards, "verifying"):
        file = shard["file"]
        if file not in problems and file_digest(os.path.join(path, file)) != shard["sha256"]:
            problems[file] = "another checksum than when it was written"
    return dict(sorted(problems.items()))


class ShardSource:
    """Examples of prepared latents by index, in the order of the images.

    Args:
        path: the directory.
        index: as `read_index` returns it.
        shards: entries of `index["shards"]` to read.
    """

    def __init__(self, path: str, index: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]):
        self._fields, self._shape = tuple(index["fields"]), tuple(index["shape"])
        shards = [shard for shard in shards if shard["examples"]]
        self._files = [os.path.join(path, shard["file"]) for shard in shards]
        self._ends = list(itertools.accumulate(shard["examples"] for shard in shards))
        # Giving the range spares opening every file now; readers open when first used.
        instructions = [f"{os.path.join(path, s['file'])}[0:{s['examples']}]" for s in shards]
        self._records = ArrayRecordDataSource(instructions) if shards else []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        try:
            return decode_record(self._records[index], self._fields, self._shape)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            if not 0 <= index < len(self):
                raise IndexError(index) from error
            file = self.where(index)
            raise InputError(f"{file}: damaged, record of example {index} is unreadable") from error

    def where(self, index: int) -> str:
        """The file of an example."""
        return self._files[bisect.bisect_right(self._ends, index)]


@dataclasses.dataclass(frozen=True)
class Marker:
    """What is recorded of a complete shard; sums are over its examples and latent pixels.

    Attributes:
        file, examples, bytes, sha256: of the shard.
        labels: of its examples.
        shape: (H, W, C) of a latent; empty if there are no examples.
        sums: per channel, of mean, mean² and std².
        skipped: [name, reason] of images left out.
        converted: [name, mode] of images that were not RGB.
        enlarged: names of images smaller than the target.
    """

    file: str
    examples: int
    bytes: int
    sha256: str
    labels: list[int]
    shape: list[int]
    sums: dict[str, list[float]]
    skipped: list[list[str]]
    converted: list[list[str]]
    enlarged: list[str]


class ShardWriter:
    """Writes one shard under a temporary name; only `finish` makes it count.

    A context manager: leaving it unfinished removes what was written.

    Args:
        path: the directory.
        shard, total: which shard, of how many.
    """

    def __init__(self, path: str, shard: int, total: int):
        self._file = shard_name(shard, total)
        self._final = os.path.join(path, self._file)
        self._marker = os.path.join(path, marker_name(shard, total))
        self._partial = self._final + ".partial"
        self._labels: list[int] = []
        self._shape: list[int] = []
        self._sums: dict[str, np.ndarray | float] = {}

    def __enter__(self) -> ShardWriter:
        self._writer = ArrayRecordWriter(self._partial, WRITER_OPTIONS)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            os.remove(self._partial)

    def add(self, labels: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        """Appends examples: (B,) labels and the fields' (B, H, W, C) float32 arrays."""
        for i, label in enumerate(labels):
            self._writer.write(encode_record(label, [array[i] for array in arrays]))
        mean, std = arrays[0].astype(np.float64), arrays[1].astype(np.float64)
        values = {"mean": mean, "mean_squared": mean**2, "variance": std**2}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.sum(axis=(0, 1, 2))
        self._labels += labels
        self._shape = list(mean.shape[1:])

    def finish(self, **notes: list[Any]) -> None:
        """Gives the shard its name, then writes its marker; `notes` as `Marker` has them."""
        self._writer.close()
        # Its name must not become visible before its content is on the disk.
        with open(self._partial, "rb") as stream:
            os.fsync(stream.fileno())
        marker = Marker(
            file=self._file,
            examples=len(self._labels),
            bytes=os.path.getsize(self._partial),
            sha256=file_digest(self._partial),
            labels=self._labels,
            shape=self._shape,
            sums={name: np.asarray(value).tolist() for name, value in self._sums.items()},
            **notes,
        )
        os.replace(self._partial, self._final)
        write_json(self._marker, dataclasses.asdict(marker))


def make_index(plan: Mapping[str, Any], markers: Sequence[Marker]) -> dict[str, Any]:
    """Puts the index together from the plan and all shards, in their order."""
    full = [marker for marker in markers if marker.examples]
    shape = full[0].shape
    pixels = sum(marker.examples for marker in full) * shape[0] * shape[1]
    names = ("mean", "mean_squared", "variance")
    sums = {name: np.sum([marker.sums[name] for marker in full], axis=0) / pixels for name in names}
    # Variance of a sample: of the means, plus the mean of the variances.
    variance = sums["mean_squared"] - sums["mean"] ** 2 + sums["variance"]
    shards = [
        {"file": m.file, "examples": m.examples, "bytes": m.bytes, "sha256": m.sha256}
        for m in markers
    ]
    index = {
        **plan,
        "fields": [*FIELDS, *(TWIN_FIELDS if plan["twins"] else ())],
        "shape": shape,
        "num_examples": sum(marker.examples for marker in markers),
        "statistics": {
            "mean": sums["mean"].tolist(),
            "std": np.sqrt(np.maximum(variance, 1e-12)).tolist(),
        },
        "shards": shards,
        "skipped": [entry for marker in markers for entry in marker.skipped],
        "converted": [entry for marker in markers for entry in marker.converted],
        "enlarged": [name for marker in markers for name in marker.enlarged],
        "labels": [label for marker in markers for label in marker.labels],
    }
    return index | {DIGEST: json_digest(index)}


def main(argv: Sequence[str]) -> int:
    """Verifies the directory named on the command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m ig_jax.data.shards DIR   checks prepared latents", file=sys.stderr)
        return 2
    try:
        with console.speaking():
            problems = verify(argv[1])
    except InputError as error:
        print(f"ig_jax: {error}", file=sys.stderr)
        return 2
    for file, problem in problems.items():
        print(f"{file}: {problem}")
    if problems:
        print("delete these files and run --mode=prepare again: it encodes them alone")
        return 1
    print("all shards are as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
