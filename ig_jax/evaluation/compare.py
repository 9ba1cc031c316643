"""`--compare`: what differs between the records of two results, with what is known to move FID."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ig_jax.evaluation import report
from ig_jax.evaluation.report import Result
from ig_jax.record import GUIDANCE_FIELDS, describe_guidance

# Differing there explains nothing by itself.
CIRCUMSTANCES = ("samples", "samples_hash", *report.CIRCUMSTANCES)

NOTES: dict[str, str] = {
    "model": "another network is another number",
    "weights": "EMA weights score well below raw ones",
    "weights_hash": "these are different weights",
    "checkpoint_step": "FID falls with training",
    "precision": "bfloat16 and float32 samples differ slightly; small, but not zero",
    "sampler": "SDE and ODE samplers have different FID at the same weights",
    "sampler_kind": "SDE and ODE samplers have different FID at the same weights",
    "num_steps": "fewer steps leave discretisation error, which raises FID",
    "time_shift": "moves the steps to other noise levels",
    "sampler_options": "an adaptive solver's step sizes, for one, follow from them",
    "ig_scale": "the strongest lever on FID after training",
    "ig_interval": "guidance at other noise levels moves FID a lot",
    "cfg_scale": "the strongest lever on FID after training",
    "cfg_interval": "guidance at other noise levels moves FID a lot",
    "tolerances": "an adaptive solver's step sizes follow from them",
    "guidance_options": "another weak source, rule or schedule is another guidance",
    "guidance": "another weak source, rule or schedule is another guidance",
    "weak_model": "Autoguidance with another network is another guidance",
    "labels": "balanced labels lower FID (the paper: 1.19 random, 1.07 balanced)",
    "seed": "random noise alone moves FID-50K by a percent or two",
    "autoencoder": "decoder variants (ft-ema, ft-mse) differ in sFID and FID",
    "autoencoder_hash": "these are different decoder weights",
    "decoder_precision": "bfloat16 and float32 pictures differ slightly; small, but not zero",
    "shift": "latents of another normalisation decode to other pictures",
    "scale": "latents of another normalisation decode to other pictures",
    "network": "another network is another number",
    "path": "a network samples on the path that it was trained on",
    "prediction": "what the network predicts; taken for something else it gives other pictures",
    "null_label": "the label of classifier-free guidance's other branch",
    "heads": "another network is another number",
    "shape": "another network is another number",
    "weak_network": "Autoguidance with another network is another guidance",
    "label_rule": "which label each sample gets",
    "imports": "rules, samplers and networks may be theirs",
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

# Fields in full, and the readable ones that say the same in short.
_DETAIL: dict[str, tuple[str, ...]] = {
    "network": ("model",),
    "heads": ("model", "network"),
    "null_label": ("model", "network"),
    "shape": ("model", "network"),
    "sampler_options": ("sampler",),
    "sampler_kind": ("sampler",),
    "guidance": (*GUIDANCE_FIELDS, "guidance_options"),
    "weak_network": ("weak_model",),
    "label_rule": ("labels", "seed"),
}


def compare(a_json: os.PathLike | str, b_json: os.PathLike | str) -> str:
    """Names the protocol fields in which two results differ, with what is known to move FID.

    Results of the same guidance are compared with each other; if the files have none in common,
    the best of each. Raises `InputError` if a file is not a result.
    """
    a, b = report.load(a_json), report.load(b_json)
    pairs = [(x, y) for x in a for y in b if _guidance(x) == _guidance(y)]
    if not pairs:
        pairs = [(_best(a), _best(b))]
    lines = [f"a: {a_json}", f"b: {b_json}"]
    for x, y in pairs:
        lines.append(f"\n{_title(x, y)}")
        lines += [f"  {text}" for text in _metric_lines(x, y)]
    lines.append("")
    fields, one_sided = {}, set()
    for x, y in pairs:
        fields |= differences(x.protocol, y.protocol)
        one_sided |= x.protocol.keys() ^ y.protocol.keys()
    lines += _difference_lines(fields)
    if one_sided:
        lines.append(f"  (recorded on one side only: {', '.join(sorted(one_sided))})")
    return "\n".join(lines)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that two records have and that differ, with both values, in the record's order.

    Of a field that spells out another (`_DETAIL`) nothing is said where that one differs already.
    """
    found = {n: (a[n], b[n]) for n in a if n in b and a[n] != b[n]}
    behind = [n for n, readable in _DETAIL.items() if any(name in found for name in readable)]
    return {n: pair for n, pair in found.items() if n not in behind}


def _difference_lines(fields: Mapping[str, tuple[Any, Any]]) -> Iterable[str]:
    shown = {n: pair for n, pair in fields.items() if n not in CIRCUMSTANCES}
    if shown:
        yield f"protocol fields that differ ({len(shown)}):"
    else:
        yield "The protocols are the same: what remains is hardware, versions or chance."
    for name, (x, y) in shown.items():
        unknown = " (unknown on one side)" if None in (x, y) else ""
        yield f"  {name}: {' | '.join(_texts(x, y))}{unknown}"
        yield f"      known to move FID: {NOTES.get(name, 'not known')}"
    for name in CIRCUMSTANCES:
        if name in fields:
            yield f"  ({name}: {' | '.join(_texts(*fields[name]))})"


def _texts(x: Any, y: Any) -> tuple[str, str]:
    """Two values as text; of two dictionaries only what differs."""
    if isinstance(x, dict) and isinstance(y, dict):
        x, y = ({k: v for k, v in p.items() if p.get(k) != q.get(k)} for p, q in ((x, y), (y, x)))
    return _text(x), _text(y)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return "; ".join(map(_text, value))
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
    for name, x in a.metrics.items():
        if name in b.metrics:
            y = b.metrics[name]
            change = f" ({100 * (y / x - 1):+.2f} %)" if x else ""
            yield f"{name}: {report.shown(name, x)} | {report.shown(name, y)}{change}"
