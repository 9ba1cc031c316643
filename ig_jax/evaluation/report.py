"""Results for people and programs: a table, a plot, one line for a paper, and JSON.

Most scores that "cannot be reproduced" differ in something that was not written down, so every
number carries the whole record of how it was made (`compare` names what differs between two).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ig_jax import console, pictures
from ig_jax.errors import reading
from ig_jax.evaluation.metrics import METRICS, Metric
from ig_jax.evaluation.scoring import FOLDER
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import existing_file, resolve
from ig_jax.record import describe_guidance
from ig_jax.storage import files

# Fields of a record that say where or with what code, or what led there, but not how.
CIRCUMSTANCES = ("versions", "device", "epochs_to_fid")


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


def line(result: Result) -> str:
    """Scores and protocol in one line, for a paper or an issue."""
    p = result.protocol
    scores = ", ".join(f"{title(name, p)} {shown(name, v)}" for name, v in result.metrics.items())
    parts = [f"{p['num_samples']:,} samples at {p['resolution']}"]
    if p["sampler"] is None:
        parts.append(f"of {p['samples']} (sampling unknown)")
    else:
        parts += _sampling_parts(p)
    reference = f"reference {p['reference']} ({_short(p['reference_hash'])})"
    values = "uint8" if p["uint8"] else "float32"
    parts += [reference, f"{p['features']}, resize: {p['resize']}, {values}"]
    parts.append(", ".join(f"{name} {version}" for name, version in p["versions"].items()))
    return f"{scores} | {'; '.join(parts)}"


def metric(name: str) -> Metric:
    """A row of the table; a plain one for a name that only a stored result knows."""
    return METRICS.get(name) or Metric(name, lambda *_: float("nan"))


def title(name: str, record: Mapping[str, Any]) -> str:
    """What a metric is called; only Inception's Fréchet distance is called FID."""
    return metric(name).title_for(str(record["features"]))


def shown(name: str, value: float | None) -> str:
    """A metric's value as text."""
    return "" if value is None else f"{value:{metric(name).format}}"


def _sampling_parts(p: Mapping[str, Any]) -> list[str]:
    count = "" if p["num_steps"] is None else f" {p['num_steps']} steps"
    shift = "" if p["time_shift"] in (None, 1) else f" shifted {p['time_shift']:g}"
    parts = [
        f"{p['sampler']} ({p['sampler_kind']}){count}{shift}",
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
    with files.write_atomically(path) as partial:
        partial.write_text(json.dumps({"results": rows}, indent=2) + "\n")


def load(path: os.PathLike | str) -> list[Result]:
    """Reads what `save` wrote; raises `InputError` if the file is missing or something else."""
    file = existing_file(path, "a result of --mode=evaluate (.json)")
    with reading(path, "a result of --mode=evaluate, JSON with metrics and protocols"):
        rows = json.loads(file.read_text())["results"]
        results = [Result(r["metrics"], r["protocol"], tuple(r["notes"])) for r in rows]
        if not results or not all(isinstance(r.protocol, dict) for r in results):
            raise ValueError("no results")
        return results


def report(results: Sequence[Result], workdir: epath.PathLike) -> str:
    """Prints the table and writes JSON and (for several settings) a plot, on the primary process.

    Returns:
        A line that says where the files are.
    """
    folder = resolve(workdir) / FOLDER
    stem = _file_stem(results)
    path = folder / f"{stem}.json"
    if not is_primary():
        return str(path)
    print_results(results)
    save(path, results)
    if len(results) == 1:
        return f"{line(results[0])}\nscores with their protocol: {path}"
    pictures.save_figure(folder / f"{stem}.png", plot(results))
    return f"scores with their protocol: {path}, and a plot: {stem}.png"


def _table(results: Sequence[Result]) -> tuple[str, list[str], list[list[str]]]:
    """What results are of, the columns' titles, and a row for each result."""
    first = results[0].protocol
    found = {name for result in results for name in result.metrics}
    names = [name for name in METRICS if name in found]
    titles = [title(name, first) for name in names]
    rows = [
        [_setting(r.protocol), *(shown(name, r.metrics.get(name)) for name in names)]
        for r in results
    ]
    origin = first["samples"] if first["sampler"] is None else f"step {first['checkpoint_step']}"
    about = f"{first['num_samples']:,} samples of {origin} against {first['reference']}"
    return about, ["guidance", *titles], rows


def markdown(results: Sequence[Result]) -> str:
    """A table in Markdown with a row for each result, under a line of what they are of."""
    about, titles, rows = _table(results)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def print_results(results: Sequence[Result]) -> None:
    """Prints a table with a row for each result, and their notes."""
    console.print_table(*_table(results))
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"note: {note}")


def _setting(record: dict[str, Any]) -> str:
    if record["ig_scale"] is None:
        return "unknown"
    words = describe_guidance(record)
    return words + {0: " (auxiliary head)", 1: " (no IG)"}.get(record["ig_scale"], "")


def _file_stem(results: Sequence[Result]) -> str:
    """A name of the step and of the protocol, so that other protocols' results stay."""
    records = [{k: v for k, v in r.protocol.items() if k not in CIRCUMSTANCES} for r in results]
    digest = files.json_digest(records)[:6]
    step = records[0]["checkpoint_step"]
    name = "samples" if step is None else f"step_{step:07d}"
    return f"{name}-{digest}"


def plot(results: Sequence[Result]) -> Any:
    """A figure of every metric against the IG scale, a panel for each kind of unit."""
    results = sorted(results, key=lambda result: result.protocol["ig_scale"])
    record = results[0].protocol
    scales = [result.protocol["ig_scale"] for result in results]
    panels: dict[str, list[str]] = {}
    for name in METRICS:
        if all(name in result.metrics for result in results):
            panels.setdefault(metric(name).unit, []).append(name)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = pictures.make_figure(4.4 * columns, 3.2 * rows + 0.4)
    every_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in every_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, names) in zip(every_axes, panels.items(), strict=False):
        for name, marker in zip(names, itertools.cycle("os^vD"), strict=False):
            values = [result.metrics[name] for result in results]
            axes.plot(scales, values, marker=marker, label=title(name, record))
        axes.axvline(1, color=pictures.INK, linestyle=":", label="no guidance (w = 1)")
        axes.set(xlabel="IG scale w", ylabel=label)
        axes.grid(alpha=0.3)
        # Under the panel: inside, it would lie over the data of some run.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    figure.suptitle(
        f"{record['num_samples']:,} samples of step {record['checkpoint_step']}, "
        f"{record['sampler']}, labels {record['labels']}; reference: {record['reference']}",
        fontsize="medium",
    )
    return figure
