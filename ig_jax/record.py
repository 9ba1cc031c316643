"""What made a number: hashes of weights, files and pictures, and the record of a sampling.

A record is made from the values that the sampling was built from, all of their fields, so that no
list of what matters has to be kept in mind; where a score differs, one of them does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, reading
from ig_jax.models.functional import Params
from ig_jax.paths import existing_file, resolve
from ig_jax.storage import files

HASH_BYTES = 16
# Arrays up to this size are shown in a record, others are hashed.
_SHOWN = 64

# What the readable part of a sampling record is made of; None where it is not known. The record of
# an older version may lack the others.
SAMPLING_FIELDS = (
    "model",
    "weights",
    "weights_hash",
    "checkpoint_step",
    "precision",
    "sampler",
    "sampler_kind",
    "num_steps",
    "time_shift",
    "ig_scale",
    "ig_interval",
    "cfg_scale",
    "cfg_interval",
    "weak_model",
    "labels",
    "seed",
    "autoencoder",
    "autoencoder_hash",
)
GUIDANCE_FIELDS = ("ig_scale", "ig_interval", "cfg_scale", "cfg_interval")


def plain(value: Any) -> Any:
    """A value in JSON's types, such that different values give different results.

    Dataclasses become their fields, with the class's name unless it is clear from the fields; small
    arrays their numbers, large ones a hash; dtypes and functions their names.

    Raises:
        InputError: a value of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.size <= _SHOWN:
            return array.tolist()
        return f"{array.dtype} {array.shape} {files.digest(array)[:16]}"
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise InputError(f"{value!r} cannot be recorded: expected plain values, arrays or a dataclass")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of a network, and what is known of them.

    Attributes:
        params: nested dict of arrays.
        step: the training step that they are of, or None.
        ema: whether they are the moving average.
        decay: of that average in the training that made them, or None.
    """

    params: Params
    step: int | None = None
    ema: bool = True
    decay: float | None = None

    def record(self) -> dict[str, Any]:
        """Their fields in a sampling record."""
        decay = "" if self.decay is None else f" {self.decay:g}"
        return {
            "weights": f"EMA{decay}" if self.ema else "raw",
            "weights_hash": self.hash,
            "checkpoint_step": self.step,
        }

    @functools.cached_property
    def hash(self) -> str:
        """`weights_hash` of the parameters."""
        return weights_hash(self.params)


def guidance_record(guidance: GuidanceOptions) -> dict[str, Any]:
    """Scales and intervals as plain values; an interval in which nothing acts is None."""
    ig, cfg = float(guidance.ig_scale), float(guidance.cfg_scale)
    return {
        "ig_scale": ig,
        "ig_interval": None if ig == 1 else [float(v) for v in guidance.ig_interval],
        "cfg_scale": cfg,
        "cfg_interval": None if cfg == 1 else [float(v) for v in guidance.cfg_interval],
        "guidance_options": _uncommon(guidance) or None,
    }


def _uncommon(guidance: GuidanceOptions) -> dict[str, Any]:
    """Fields of a setting beyond scales and intervals that are not as usual."""
    usual = GuidanceOptions(*(getattr(guidance, name) for name in GUIDANCE_FIELDS))
    fields = dataclasses.asdict(guidance)
    return {k: v for k, v in fields.items() if v != getattr(usual, k)}


def describe_guidance(p: Mapping[str, Any]) -> str:
    """Guidance of a record in a few words: "IG 1.4, CFG 1.35 on [0, 0.7] by projected"."""
    options = p.get("guidance_options") or {}

    def part(name: str) -> str:
        scale, interval = p[f"{name}_scale"], p[f"{name}_interval"]
        own = {k.removeprefix(f"{name}_"): v for k, v in options.items() if k.startswith(name)}
        words = f"{name.upper()} {scale:g}"
        if "schedule" in own:
            words += f" on {own['schedule']}"
        elif interval is not None and tuple(interval) != (0, 1):
            words += f" on [{interval[0]:g}, {interval[1]:g}]"
        words += f" from {own['source']}" if "source" in own else ""
        words += f" by {own['rule']}" if "rule" in own else ""
        words += f" of {own['channels']} channels" if "channels" in own else ""
        return words + (f" (∅: {own['null_scale']})" if "null_scale" in own else "")

    return ", ".join([part("ig"), *([part("cfg")] if p["cfg_scale"] != 1 else [])])


def describe(guidance: GuidanceOptions) -> str:
    """A setting in a few words."""
    return describe_guidance(guidance_record(guidance))


def save_sampling(
    path: os.PathLike | str, record: Mapping[str, Any], count: int, pictures_hash: str = ""
) -> None:
    """Stores a sampling record beside the `count` pictures that it is of, and their hash."""
    values = {"num_samples": count, "samples_hash": pictures_hash, "protocol": dict(record)}
    with files.write_atomically(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def load_sampling(path: os.PathLike | str, count: int) -> tuple[dict[str, Any] | None, str]:
    """Reads what `save_sampling` wrote.

    Returns:
        (record, hash): the record, or None if it is of another number of pictures; the hash of the
        pictures, empty if an older version wrote the file. Raises `InputError` if the file is
        something else.
    """
    what = f"JSON with num_samples and a protocol of {', '.join(SAMPLING_FIELDS)}"
    with reading(path, what):
        values = json.loads(resolve(path).read_text())
        record = dict.fromkeys(SAMPLING_FIELDS) | values["protocol"]
        if record["weights_hash"] is None:
            raise KeyError("weights_hash")
        same = values["num_samples"] == count
        return (record if same else None), str(values.get("samples_hash", ""))


def picture_hash(image: np.ndarray) -> bytes:
    """`HASH_BYTES` bytes that tell one (H, W, C) uint8 picture from others."""
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=HASH_BYTES).digest()


def pictures_hash(hashes: Iterable[bytes]) -> str:
    """Hash of a set of pictures from the `picture_hash` of each, in order."""
    return files.digest(*hashes)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from importlib import metadata

    names = ("ig_jax", "jax", "flax", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


@functools.lru_cache(maxsize=16)
def _file_hash(path: str, length: int, modified: float) -> str:
    return files.file_digest(path)


def file_hash(path: os.PathLike | str) -> str:
    """SHA-256 of a file in hex; raises `InputError` if there is no such file."""
    file = existing_file(path, "a file")
    stat = file.stat()
    return _file_hash(os.fspath(file), stat.length, stat.mtime)


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two sums of an array's positions and bits, (2,) uint32.

    A program a shape, which networks share, and not one for each network.
    """
    # Position by broadcast iotas: flattening a sharded array would gather it.
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position, stride = position + index * np.uint32(stride), stride * x.shape[axis] % 2**32
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    h = words ^ (position * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    sums = []
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 15)) * np.uint32(multiplier)
        h = h ^ (h >> 13)
        sums.append(h.sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def weights_hash(params: Params) -> str:
    """A 16-digit hash of parameters' names, shapes and every bit of their values.

    Positions and bits are mixed and summed as integers on the devices, whose order cannot matter,
    so the hash is the same however the arrays are sharded, and nothing is gathered.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksum(jnp.asarray(leaf)) for _, leaf in named])
    parts: list[str | np.ndarray] = []
    for (path, leaf), pair in zip(named, sums, strict=True):
        parts += [f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}", np.asarray(pair)]
    return files.digest(*parts)[:16]
