"""The protocol record: everything a score depends on, stored beside it and compared between two.

Most scores that "cannot be reproduced" differ in one of these fields, so each number carries them
all: as JSON, as one line for a paper, and in `compare`, which names the fields that differ.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.models.functional import Params
from ig_jax.paths import resolve

# Metric → (what tables call it, format).
METRICS: dict[str, tuple[str, str]] = {
    "fid": ("FID", ".4g"),
    "sfid": ("sFID", ".4g"),
    "inception_score": ("IS", ".4g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "label_accuracy": ("label accuracy", ".1%"),
}

# What pictures were drawn with; None in a record where it is not known.
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
    "tolerances",
    "ig_scale",
    "ig_interval",
    "cfg_scale",
    "cfg_interval",
    "guidance_options",
    "weak_model",
    "labels",
    "seed",
    "autoencoder",
    "autoencoder_hash",
)
GUIDANCE_FIELDS = ("ig_scale", "ig_interval", "cfg_scale", "cfg_interval")

# Fields that say where or with what code, but not how: differing there explains nothing by itself.
_CIRCUMSTANCES = ("samples", "samples_hash", "versions", "device")

_NOTES: dict[str, str] = {
    "model": "another network is another number",
    "weights": "EMA weights score well below raw ones",
    "weights_hash": "these are different weights",
    "checkpoint_step": "FID falls with training",
    "precision": "bfloat16 and float32 samples differ slightly; small, but not zero",
    "sampler": "SDE and ODE samplers have different FID at the same weights",
    "sampler_kind": "SDE and ODE samplers have different FID at the same weights",
    "num_steps": "fewer steps leave discretisation error, which raises FID",
    "time_shift": "moves the steps to other noise levels",
    "tolerances": "an adaptive solver's step sizes follow from them",
    "ig_scale": "the strongest lever on FID after training",
    "ig_interval": "guidance at other noise levels moves FID a lot",
    "cfg_scale": "the strongest lever on FID after training",
    "cfg_interval": "guidance at other noise levels moves FID a lot",
    "guidance_options": "another weak source, rule or schedule is another guidance",
    "weak_model": "Autoguidance with another network is another guidance",
    "labels": "balanced labels lower FID (the paper: 1.19 random, 1.07 balanced)",
    "seed": "random noise alone moves FID-50K by a percent or two",
    "autoencoder": "decoder variants (ft-ema, ft-mse) differ in sFID and FID",
    "autoencoder_hash": "these are different decoder weights",
    "num_samples": "FID is biased upwards by about 1/N: compare equal N only",
    "resolution": "FID at different resolutions cannot be compared",
    "features": "distances in different feature spaces cannot be compared",
    "features_hash": "these are different feature extractors",
    "resize": "antialiased or half-pixel resizing shifts FID systematically",
    "uint8": "rounding to uint8 (a PNG round trip) shifts FID; JPEG far more",
    "reference": "FID to another reference set is another number",
    "reference_hash": "these are different reference sets",
    "reference_count": "statistics of fewer reference images are biased",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one set of pictures with everything they depend on.

    Attributes:
        metrics: name of `METRICS` → value; what could not be computed is absent.
        protocol: the record, plain JSON values; None stands for unknown.
        notes: warnings about these numbers, a line each.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    notes: tuple[str, ...] = ()


def sampling_record(
    config: ConfigDict,
    guidance: GuidanceOptions,
    *,
    step: int | None,
    weights: str,
    ema: bool,
    weak: str | None = None,
) -> dict[str, Any]:
    """What pictures drawn with a config depend on: the `SAMPLING_FIELDS`.

    Args:
        config: of the run; its seed is the seed of noise and labels.
        guidance: scales and intervals used.
        step: training step of the weights, if known.
        weights: `weights_hash` of the parameters.
        ema: whether they are the EMA.
        weak: `weights_hash` of Autoguidance's network, if there is one.
    """
    model, data, s = config.model, config.data, config.sampler
    sampler = config_lib.sampler(config)
    adaptive = not sampler.fixed_grid
    spec = config_lib.model_spec(config)
    return {
        "model": f"{model.family} {spec.depth}x{spec.width}/{spec.patch_size}, "
        f"auxiliary head after {', '.join(map(str, spec.auxiliary_depths)) or None}",
        "weights": f"EMA {config.train.ema_decay:g}" if ema else "raw",
        "weights_hash": weights,
        "checkpoint_step": step,
        "precision": config_lib.compute_dtype(model.dtype).name,
        "sampler": s.name,
        "sampler_kind": "SDE" if sampler.stochastic else "ODE",
        "num_steps": None if adaptive else s.num_steps,
        "time_shift": None if adaptive else s.time_shift,
        "tolerances": [s.rtol, s.atol] if adaptive else None,
        **guidance_record(guidance),
        "weak_model": weak,
        "labels": s.labels,
        "seed": config.seed,
        "autoencoder": data.autoencoder or None,
        "autoencoder_hash": file_hash(data.autoencoder_path) if data.autoencoder_path else None,
    }


def save_sampling(path: os.PathLike | str, record: Mapping[str, Any], count: int) -> None:
    """Stores a `sampling_record` beside the `count` pictures that it is of."""
    values = {"num_samples": count, "protocol": dict(record)}
    resolve(path).write_text(json.dumps(values, indent=1) + "\n")


def load_sampling(path: os.PathLike | str, count: int) -> dict[str, Any] | None:
    """Reads what `save_sampling` wrote, or None if it is of another number of pictures.

    Raises:
        InputError: if the file is something else.
    """
    try:
        values = json.loads(resolve(path).read_text())
        record = {name: values["protocol"][name] for name in SAMPLING_FIELDS}
        return record if values["num_samples"] == count else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the protocol of a sample set, expected JSON with num_samples and a "
            f"protocol of {', '.join(SAMPLING_FIELDS)}"
        ) from error


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


def versions() -> dict[str, str]:
    """Versions of what computes, and the kind of device."""
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
    digest = hashlib.sha256()
    with resolve(path).open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: os.PathLike | str) -> str:
    """SHA-256 of a file in hex; raises `InputError` if there is no such file."""
    file = resolve(path)
    if not file.exists() or file.is_dir():
        raise InputError(f"{path}: no such file")
    stat = file.stat()
    return _file_hash(os.fspath(file), stat.length, stat.mtime)


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def words(x: jax.Array) -> jax.Array:
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)

    def mixed(x: jax.Array) -> jax.Array:
        # Position by broadcast iotas: flattening a sharded array would gather it.
        position, stride = jnp.uint32(0), 1
        for axis in reversed(range(x.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            position, stride = position + index * np.uint32(stride), stride * x.shape[axis] % 2**32
        h = words(x) ^ (position * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
        sums = []
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):
            h = (h ^ (h >> 15)) * np.uint32(multiplier)
            h = h ^ (h >> 13)
            sums.append(h.sum(dtype=jnp.uint32))
        return jnp.stack(sums)

    return [mixed(x) for x in leaves]


def weights_hash(params: Params) -> str:
    """A 16-digit hash of parameters' names, shapes and every bit of their values.

    Positions and bits are mixed and summed as integers on the devices, whose order cannot matter,
    so the hash is the same however the arrays are sharded, and nothing is gathered.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_checksums([jnp.asarray(leaf) for _, leaf in named]))
    digest = hashlib.sha256()
    for (path, leaf), pair in zip(named, sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.asarray(pair).tobytes())
    return digest.hexdigest()[:16]


def line(result: Result) -> str:
    """Scores and protocol in one line, for a paper or an issue."""
    p = result.protocol
    names = dict(METRICS) | ({} if is_fid(p) else {"fid": ("Fréchet distance", ".4g")})
    scores = ", ".join(
        f"{names[name][0]} {value:{names[name][1]}}" for name, value in result.metrics.items()
    )
    parts = [f"{p['num_samples']:,} samples at {p['resolution']}"]
    if p["sampler"] is None:
        parts.append(f"of {p['samples']} (sampling unknown)")
    else:
        parts += _sampling_parts(p)
    reference = f"reference {p['reference']} ({_short(p['reference_hash'])})"
    parts += [reference, f"{p['features']}, resize: {p['resize']}, uint8"]
    parts.append(", ".join(f"{name} {version}" for name, version in p["versions"].items()))
    return f"{scores} | {'; '.join(parts)}"


def is_fid(protocol: Mapping[str, Any]) -> bool:
    """Whether the Fréchet distance is FID proper, that is, of Inception's features."""
    return str(protocol["features"]).startswith("inception")


def describe_guidance(p: Mapping[str, Any]) -> str:
    """GuidanceOptions in a few words: "IG 1.4, CFG 1.35 on [0, 0.7]"."""

    def part(name: str, scale: float, interval: Sequence[float] | None) -> str:
        everywhere = interval is None or tuple(interval) == (0, 1)
        on = "" if everywhere else f" on [{interval[0]:g}, {interval[1]:g}]"
        return f"{name} {scale:g}{on}"

    words = [part("IG", p["ig_scale"], p["ig_interval"])]
    if p["cfg_scale"] != 1:
        words.append(part("CFG", p["cfg_scale"], p["cfg_interval"]))
    return ", ".join(words)


def _sampling_parts(p: Mapping[str, Any]) -> list[str]:
    count = f"rtol {p['tolerances'][0]:g}" if p["tolerances"] else f"{p['num_steps']} steps"
    shift = "" if p["time_shift"] in (None, 1) else f" shifted {p['time_shift']:g}"
    parts = [
        f"{p['sampler']} ({p['sampler_kind']}) {count}{shift}",
        describe_guidance(p),
        f"labels {p['labels']}, seed {p['seed']}",
        f"{p['model']}, {p['weights']} weights of step {p['checkpoint_step']} "
        f"({_short(p['weights_hash'])}), {p['precision']}",
    ]
    if p["autoencoder"]:
        parts.append(f"{p['autoencoder']} ({_short(p['autoencoder_hash'])})")
    return parts


def _short(digest: str | None) -> str:
    return digest[:8] if digest else "hash unknown"


def save(path: os.PathLike | str, results: Sequence[Result]) -> None:
    """Writes results as JSON, each with its own full record and its line."""
    rows = [{**dataclasses.asdict(result), "line": line(result)} for result in results]
    path = resolve(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": rows}, indent=2) + "\n")


def load(path: os.PathLike | str) -> list[Result]:
    """Reads what `save` wrote; raises `InputError` if the file is missing or something else."""
    file = resolve(path)
    if not file.exists() or file.is_dir():
        raise InputError(f"{path}: no such file; expected a result of --mode=evaluate (.json)")
    try:
        rows = json.loads(file.read_text())["results"]
        results = [Result(r["metrics"], r["protocol"], tuple(r["notes"])) for r in rows]
        if not results or not all(isinstance(r.protocol, dict) for r in results):
            raise ValueError("no results")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a result of --mode=evaluate, expected JSON with results, each with "
            "metrics and protocol"
        ) from error
    return results


def compare(a_json: os.PathLike | str, b_json: os.PathLike | str) -> str:
    """Names the protocol fields in which two results differ, with what is known to move FID.

    Results of the same guidance are compared with each other; if the files have none in common,
    the best of each. Raises `InputError` if a file is not a result.
    """
    a, b = load(a_json), load(b_json)
    pairs = [(x, y) for x in a for y in b if _guidance(x) == _guidance(y)]
    if not pairs:
        pairs = [(_best(a), _best(b))]
    lines = [f"a: {a_json}", f"b: {b_json}"]
    for x, y in pairs:
        lines.append(f"\n{_title(x, y)}")
        lines += [f"  {text}" for text in _metric_lines(x, y)]
    lines.append("")
    fields = {}
    for x, y in pairs:
        fields |= differences(x.protocol, y.protocol)
    return "\n".join([*lines, *_difference_lines(fields)])


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two records that differ, with both values, in the record's order."""
    names = [*a, *(name for name in b if name not in a)]
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}


def _difference_lines(fields: Mapping[str, tuple[Any, Any]]) -> Iterable[str]:
    protocol = {n: pair for n, pair in fields.items() if n not in _CIRCUMSTANCES}
    if protocol:
        yield f"protocol fields that differ ({len(protocol)}):"
    else:
        yield "The protocols are the same: what remains is hardware, versions or chance."
    for name, (x, y) in protocol.items():
        unknown = " (unknown on one side)" if None in (x, y) and name in _NOTES else ""
        yield f"  {name}: {_text(x)} | {_text(y)}{unknown}"
        yield f"      known to move FID: {_NOTES.get(name, 'not known')}"
    for name in _CIRCUMSTANCES:
        if name in fields:
            yield f"  ({name}: {_text(fields[name][0])} | {_text(fields[name][1])})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return "none" if value is None else str(value)


def _guidance(result: Result) -> tuple:
    return tuple(json.dumps(result.protocol.get(name)) for name in GUIDANCE_FIELDS)


def _best(results: Sequence[Result]) -> Result:
    return min(results, key=lambda r: r.metrics.get("fid", float("inf")))


def _title(a: Result, b: Result) -> str:
    names = [
        "unknown guidance" if p["ig_scale"] is None else describe_guidance(p)
        for p in (a.protocol, b.protocol)
    ]
    return names[0] if names[0] == names[1] else f"{names[0]} | {names[1]}"


def _metric_lines(a: Result, b: Result) -> Iterable[str]:
    for name, (_, spec) in METRICS.items():
        if name in a.metrics and name in b.metrics:
            x, y = a.metrics[name], b.metrics[name]
            change = f" ({100 * (y / x - 1):+.2f} %)" if x else ""
            yield f"{name}: {x:{spec}} | {y:{spec}}{change}"
