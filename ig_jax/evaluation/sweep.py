"""`--mode=sweep`: finds the best guidance by racing settings against each other.

All settings start on the same few noise samples and labels; the worse part drops out of each round,
and the rest go on to more samples, so that most of the work goes where the decision is close
(successive halving: Jamieson & Talwalkar 2016; common random numbers).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, reading
from ig_jax.evaluation import metrics, report
from ig_jax.evaluation.features import FeatureSet
from ig_jax.evaluation.metrics import METRICS
from ig_jax.evaluation.race import Entry, cost, plan_rounds, race, resamples
from ig_jax.evaluation.report import Result
from ig_jax.evaluation.run import Evaluator, open_source
from ig_jax.experiment import Experiment
from ig_jax.models.functional import Params
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import existing_file, resolve
from ig_jax.record import Weights, describe, describe_guidance
from ig_jax.sampling.labels import LabelRule, label_rule
from ig_jax.sampling.run import open_weights
from ig_jax.storage import files

log = logging.getLogger("ig_jax")

FOLDER = "sweep"
# Settings whose uncertainty is estimated: a resample of 2048-wide features takes seconds.
BOOTSTRAPPED = 4
# Lines of the plot that are told apart.
COLOURED = 8


def settings_of(config: ConfigDict) -> list[GuidanceOptions]:
    """Every combination of what `config.sweep` lists, without those that are the same."""
    combinations = itertools.product(_candidates(config, "cfg"), _candidates(config, "ig"))
    settings = (GuidanceOptions.of(config.guidance, **a, **b) for a, b in combinations)
    return list(dict.fromkeys(settings))


def _candidates(config: ConfigDict, name: str) -> Iterator[dict[str, Any]]:
    """What may become of the fields of one term: "ig" or "cfg"."""

    def listed(part: str) -> Sequence[Any]:
        return config.sweep[f"{name}_{part}s"]

    def own(part: str) -> Any:
        return config.guidance[f"{name}_{part}"]

    everywhere, schedules = (0.0, 1.0), listed("schedule") or tuple(filter(None, [own("schedule")]))
    times = [(everywhere, schedule) for schedule in schedules]
    # A schedule acts in place of the interval, so the config's own one leaves no room for others.
    if listed("interval") and (listed("schedule") or not schedules):
        pairs = config_lib.interval_pairs(f"config.sweep.{name}_intervals", listed("interval"))
        times = [(pair, "") for pair in pairs] + times
    sources, rules = (listed(part) or (own(part),) for part in ("source", "rule"))
    for source, rule, (interval, schedule) in itertools.product(sources, rules, times):
        for scale in listed("scale"):
            parts = dict(scale=float(scale), interval=interval)
            parts |= dict(source=source, rule=rule, schedule=schedule)
            if scale == 1:  # the rest means nothing
                parts = dict(scale=1.0, interval=everywhere)
            yield {f"{name}_{part}": value for part, value in parts.items()}


class Draws:
    """Features of settings' samples, drawn when first asked for and kept on disk from then on.

    A sample depends on (seed, index) alone, so a search that was stopped reads what is there, draws
    the rest, and comes to the same end; a larger search begins with what a smaller one drew.

    Args:
        evaluator: draws samples and extracts features.
        params: the network's parameters.
        folder: where features are kept, for these weights, sampler, labels, seed and rows only.
        seed: of noise.
        labels: (N,) for every sample that may be asked for.
        rows: names of the features that are kept, "pool" among them.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        params: Params,
        folder: epath.PathLike,
        seed: int,
        labels: np.ndarray,
        rows: Sequence[str],
    ):
        self._evaluator, self._params = evaluator, params
        self._folder, self._seed, self._rows = resolve(folder), seed, rows
        self.labels = labels
        self._held: dict[GuidanceOptions, dict[str, np.ndarray]] = {}

    def __call__(self, guidance: GuidanceOptions, count: int) -> dict[str, np.ndarray]:
        """Features of a setting's first `count` samples: name → (count, …)."""
        held = self._held.get(guidance)
        have = 0 if held is None else len(held["pool"])
        if have < count:
            piece = self._piece(guidance, have, count)
            held = piece if held is None else _joined(held, piece)
            self._held[guidance] = held
        return {name: rows[:count] for name, rows in held.items()}

    def _piece(self, guidance: GuidanceOptions, start: int, stop: int) -> dict[str, np.ndarray]:
        name = files.json_digest(guidance.build(self._evaluator.engine.weaker).record())
        file = self._folder / f"{name[:16]}-{start}-{stop}.npz"
        stored = _stored(file)
        # The primary's view decides: the others must not draw what it reads, or wait for it.
        if hosts.primary_says(stored is not None):
            return stored or _read(file)
        indices = np.arange(start, stop)
        found = self._evaluator.sample_features(
            self._params, guidance, indices, self.labels[indices], self._seed, rows=self._rows
        )
        piece = dict(found.rows)
        if is_primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            with files.write_atomically(file) as partial, partial.open("wb") as stream:
                np.savez(stream, **piece)
        return piece


def _stored(file: epath.Path) -> dict[str, np.ndarray] | None:
    """Features that are there, if they are whole; what is damaged can be drawn again."""
    try:
        return _read(file) if file.exists() else None
    except InputError as error:
        log.warning("%s: drawing them again", error)
        return None


def _read(file: epath.Path) -> dict[str, np.ndarray]:
    with files.open_npz(file, "features in an .npz file") as arrays:
        return {key: arrays[key] for key in arrays.files}


def _joined(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([a[name], b[name]]) for name in a}


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Of a setting's value: standard error, and the share of resamples in which it won."""

    standard_error: float
    wins: float


class Search:
    """A search for one model: what `run` does, in steps that can be called from elsewhere.

    Args:
        experiment: the config and its parts.
        weights: the network's parameters, on the mesh, and what is known of them.
        workdir: results and draws go to its folder `sweep`.

    Attributes:
        metric: the name of the metric that decides.
        measured: names of all that are measured on the way.

    Raises:
        InputError: before anything is compiled: an impossible budget, metric or setting.
    """

    def __init__(self, experiment: Experiment, weights: Weights, workdir: str):
        config = experiment.config
        sweep = config.sweep
        self.metric = metrics.check_name(config)
        self.settings = settings_of(config)
        config_lib.check_guidance(config, self.settings)
        self.grid_samples = len(self.settings) * sweep.num_samples
        self.rounds = plan_rounds(
            len(self.settings), sweep.num_samples, sweep.budget, config.sampler.batch_size
        )
        self.folder = resolve(workdir) / FOLDER
        source = open_source(experiment, workdir, weights.step)
        self._rule = label_rule(config, source.class_names)
        counts = {"sweep.num_samples": sweep.num_samples}
        self.evaluator = Evaluator.create(experiment, source, counts, workdir)
        self.scorer = self.evaluator.scorer
        self.measured = self._measured()
        self._weights, self._num_samples = weights, sweep.num_samples
        self._seed, self._bootstrap = sweep.seed, sweep.bootstrap
        self.draws = self._open_draws()

    def _measured(self) -> tuple[str, ...]:
        """The metric that decides and those that cost no more than a glance."""
        found, extractor = self.scorer.metrics, self.scorer.extractor
        if self.metric not in found:
            metric = METRICS[self.metric]
            needs = [*metric.needs, *["labels"] * metric.labels]
            needs += [f"the reference's {metric.reference}"] * bool(metric.reference)
            raise InputError(
                f"config.sweep.metric is {self.metric!r}: it needs {', '.join(needs)}; "
                f"{extractor.name} gives {', '.join(extractor.gives)}"
            )
        least, first = found[self.metric].least, self.rounds[0].samples
        if first < least:
            raise InputError(
                f"the first round has {first} samples a setting: expected at least {least} for "
                f"{self.metric} (raise config.sweep.budget)"
            )
        return tuple(
            name
            for name, metric in found.items()
            if name == self.metric or (metric.raced and metric.least <= first)
        )

    def _open_draws(self) -> Draws:
        """The stored features of samples of the search's noise and labels."""
        needs = {name for metric in self.measured for name in METRICS[metric].needs}
        rows = sorted({"pool", *needs})
        # Settings are told apart inside the folder.
        record = self._record(GuidanceOptions(), self._seed)
        key = [record, self.scorer.extractor.fingerprint, rows]
        folder = self.folder / f"draws-{files.json_digest(key)[:16]}"
        labels = self._labels(self._seed)(np.arange(self._num_samples))
        return Draws(self.evaluator, self._weights.params, folder, self._seed, labels, rows)

    def _labels(self, seed: int) -> LabelRule:
        return dataclasses.replace(self._rule, seed=seed)

    def _record(self, guidance: GuidanceOptions, seed: int) -> dict[str, Any]:
        return self.evaluator.record(guidance, self._weights, self._labels(seed), seed)

    def values(
        self, names: Sequence[str], rows: dict[str, np.ndarray], labels: np.ndarray
    ) -> dict[str, float]:
        """Metrics by name, of features as `Draws` holds them."""
        return self.scorer.values(names, FeatureSet.of_rows(rows), labels)

    def measure(self, guidance: GuidanceOptions, count: int) -> dict[str, float]:
        """The metrics of a setting's first `count` samples of the search's noise."""
        return self.values(self.measured, self.draws(guidance, count), self.draws.labels[:count])

    def notes(self) -> list[str]:
        """Warnings about the values of the first round."""
        few = metrics.few_samples(self.rounds[0].samples, self.scorer.extractor.width)
        return [f"first round: {few}"] if few else []

    def race(self) -> list[Entry]:
        """Runs the race behind a progress bar; see `race`."""
        with console.progress_bar(cost(self.rounds, 0), "racing settings") as advance:
            return race(self.settings, self.rounds, self.measure, self.metric, advance)

    def resampled(self, entry: Entry) -> np.ndarray:
        """Bootstrap values of an entry's last round; the same resamples for every setting."""
        count = entry.samples[-1]
        rows, labels = self.draws(entry.guidance, count), self.draws.labels
        values = []
        for drawn in resamples(count, self._bootstrap, self._seed):
            resample = {name: array[drawn] for name, array in rows.items()}
            values.append(self.values([self.metric], resample, labels[drawn])[self.metric])
        return np.asarray(values)

    def uncertainty(self, finalists: Sequence[Entry]) -> list[Uncertainty]:
        """Bootstrap uncertainty of the entries of the last round."""
        with console.stage("estimating the uncertainty"):
            drawn = np.stack([self.resampled(entry) for entry in finalists])
        winners = (METRICS[self.metric].better * drawn).argmax(0)
        return [
            Uncertainty(float(values.std(ddof=1)), float(np.mean(winners == i)))
            for i, values in enumerate(drawn)
        ]

    def fresh(self, guidance: GuidanceOptions) -> Result:
        """All metrics of a setting on noise and labels that the search has not seen."""
        seed, count = self._seed + 1, self._num_samples
        with console.progress_bar(count, "measuring the winner again") as advance:
            return self.evaluator.result(
                self._weights, guidance, self._labels(seed), seed, count, advance
            )


def run(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    """`--mode=sweep`: races the settings of `config.sweep` on a workdir's checkpoint.

    Writes `best.json`, `sweep.csv`, `sweep.json` and `sweep.png` into `workdir/sweep`, beside the
    features drawn so far. Started again after a stop it goes on, with the same result.

    Args:
        config: the checkpoint's, with what was overridden.
        workdir: where the checkpoint is, and the results go.
        which: checkpoint, "last", "best" or a step.

    Returns:
        The last line to print. Raises `InputError`.
    """
    metrics.check_name(config)
    experiment = Experiment.from_config(config)
    search = Search(experiment, open_weights(experiment, workdir, which), workdir)
    if is_primary():
        plan = ", ".join(f"{r.settings} settings to {r.samples}" for r in search.rounds)
        print(f"rounds (samples each): {plan}")
    entries = search.race()
    finalists = [entry for entry in entries if len(entry.samples) == len(search.rounds)]
    uncertainties = search.uncertainty(finalists[:BOOTSTRAPPED])
    confirmed = search.fresh(entries[0].guidance)
    # Of the whole search: what an earlier one left on disk counts too.
    drawn = sum(entry.samples[-1] for entry in entries) + confirmed.protocol["num_samples"]
    if is_primary():
        _save(search, entries, uncertainties, confirmed, drawn)
        _print(search, entries, uncertainties)
        for note in (*search.notes(), *confirmed.notes):
            print(f"note: {note}")
    return _last_line(search, entries[0], uncertainties[0], confirmed, drawn)


def _save(
    search: Search,
    entries: Sequence[Entry],
    uncertainties: Sequence[Uncertainty],
    confirmed: Result,
    drawn: int,
) -> None:
    rows = table(search.metric, entries, uncertainties)
    search.folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (search.folder / "sweep.csv").write_text(text.getvalue())
    best = {
        "guidance": dataclasses.asdict(entries[0].guidance),
        "metric": search.metric,
        "search": rows[0],
        "fresh": dataclasses.asdict(confirmed),
        "line": report.line(confirmed),
        "samples_drawn": drawn,
        "samples_of_full_grid": search.grid_samples,
    }
    everything = {
        "rounds": [dataclasses.asdict(r) for r in search.rounds],
        "best": best,
        "settings": rows,
    }
    (search.folder / "sweep.json").write_text(json.dumps(everything, indent=2) + "\n")
    pictures.save_figure(search.folder / "sweep.png", plot(search.metric, entries, confirmed))
    # Last, since its presence says that the search is complete.
    with files.write_atomically(search.folder / "best.json") as partial:
        partial.write_text(json.dumps(best, indent=2) + "\n")


def load_best(workdir: epath.PathLike) -> GuidanceOptions:
    """The setting that a finished sweep of this workdir found best.

    Raises:
        InputError: if there is none, or the file is damaged.
    """
    path = resolve(workdir) / FOLDER / "best.json"
    existing_file(path, "a workdir in which --mode=sweep finished")
    with reading(path, "a result of --mode=sweep"):
        fields = json.loads(path.read_text(encoding="utf-8"))["guidance"]
        scales = {name: float(fields[name]) for name in ("ig_scale", "cfg_scale")}
        bounds = {name: tuple(map(float, fields[name])) for name in ("ig_interval", "cfg_interval")}
        # Files of older versions name these four only.
        return dataclasses.replace(GuidanceOptions(**fields), **scales, **bounds)


def apply_best(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Puts the setting of `load_best` into `config.guidance`, in place."""
    config.guidance.update(dataclasses.asdict(load_best(workdir)))


def table(
    metric: str, entries: Sequence[Entry], uncertainties: Sequence[Uncertainty]
) -> list[dict[str, Any]]:
    """A row of plain values for each setting, the best first."""
    rows = []
    for rank, entry in enumerate(entries):
        fields = dataclasses.asdict(entry.guidance)
        for name in ("ig", "cfg"):
            fields[f"{name}_low"], fields[f"{name}_high"] = fields.pop(f"{name}_interval")
        known = uncertainties[rank] if rank < len(uncertainties) else None
        rows.append(
            {
                "rank": rank + 1,
                "guidance": describe(entry.guidance),
                **fields,
                "rounds": len(entry.samples),
                "samples": entry.samples[-1],
                **entry.values[-1],
                "standard_error": None if known is None else known.standard_error,
                "wins": None if known is None else known.wins,
                "first_samples": entry.samples[0],
                f"first_{metric}": entry.values[0][metric],
            }
        )
    return rows


def _print(
    search: Search, entries: Sequence[Entry], uncertainties: Sequence[Uncertainty], most: int = 12
) -> None:
    names = list(entries[0].values[0])
    record = {"features": search.scorer.extractor.name}
    titles = [report.title(name, record) for name in names]
    rows = []
    for rank, entry in enumerate(entries[:most]):
        known = uncertainties[rank] if rank < len(uncertainties) else None
        rows.append(
            [
                describe(entry.guidance),
                f"{entry.samples[-1]:,}",
                *(report.shown(name, entry.values[-1][name]) for name in names),
                "" if known is None else f"{known.standard_error:.2g}",
                "" if known is None else f"{known.wins:.0%}",
            ]
        )
    title = f"best {len(rows)} of {len(entries)} settings (values compare at equal samples only)"
    console.print_table(title, ["guidance", "samples", *titles, "std. error", "wins"], rows)


def _last_line(
    search: Search, best: Entry, uncertainty: Uncertainty, confirmed: Result, drawn: int
) -> str:
    name = report.title(search.metric, confirmed.protocol)
    value, fresh = best.values[-1][search.metric], confirmed.metrics[search.metric]
    setting = describe_guidance(confirmed.protocol)
    return (
        f"{report.line(confirmed)}\n"
        f"best: {setting}, {name} {value:.4g} ± {uncertainty.standard_error:.2g} in the search, "
        f"{fresh:.4g} on fresh noise; {drawn:,} samples "
        f"({drawn / search.grid_samples:.0%} of the full grid's); results: {search.folder}"
    )


def plot(metric: str, entries: Sequence[Entry], confirmed: Result) -> Any:
    """The metric against scale, a line for each interval, rule and so on; and the trade-offs.

    All values are of the first round, where all settings have the same samples; markers grow with
    the rounds that a setting went on to. A star marks the winner. Of many lines the best have
    colours.
    """
    record, first = confirmed.protocol, entries[0].samples[0]
    varied = "cfg" if len({entry.guidance.ig_scale for entry in entries}) == 1 else "ig"
    scale_label = f"{varied.upper()} scale (1: none)"
    panels = [(scale_label, metric)]
    panels += [(name, "fid") for name in entries[0].values[0] if name != "fid"]

    def point(entry: Entry, name: str) -> float:
        if name == scale_label:
            return getattr(entry.guidance, f"{varied}_scale")
        return entry.values[0][name]

    def label(name: str) -> str:
        if name == scale_label:
            return name
        better = "higher" if METRICS[name].better > 0 else "lower"
        return f"{report.title(name, record)} ({better} is better)"

    figure = pictures.make_figure(5.0 * len(panels), 4.8)
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for rank, (title, line) in enumerate(_lines(entries, varied).items()):
            xy = [[point(entry, name) for entry in line] for name in names]
            color = f"C{rank}" if rank < COLOURED else "0.6"
            if names[0] == scale_label:  # against another metric a line would have no meaning
                axes.plot(*xy, lw=1, color=color, label=title if rank < COLOURED else None)
            axes.scatter(*xy, [14 * len(entry.samples) for entry in line], color=color)
        best = [point(entries[0], name) for name in names]
        axes.plot(*best, "k*", ms=13, label="winner", linestyle="none")
        axes.set(xlabel=label(names[0]), ylabel=label(names[1]))
        axes.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    # Under the panels: inside, it would lie over the data of some run.
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    value = f"{report.title(metric, record)} {point(entries[0], metric):.4g}"
    figure.suptitle(
        f"guidance search, step {record['checkpoint_step']}: each setting on the same {first:,} "
        "samples; larger markers went further\n"
        f"winner: {describe_guidance(record)}, {value} here, {confirmed.metrics[metric]:.4g} "
        f"on {record['num_samples']:,} fresh samples",
        fontsize="medium",
    )
    return figure


def _lines(entries: Sequence[Entry], varied: str) -> dict[str, list[Entry]]:
    """Entries that differ in one scale only, in order of it, under a label; the best line first.

    A setting with scale 1, where the term's other fields mean nothing, is part of every line.
    """

    def rest(entry: Entry, own: bool) -> tuple:
        """The fields of the varied term but for its scale, or those of all else."""
        fields = dataclasses.asdict(entry.guidance)
        scale = fields.pop(f"{varied}_scale")
        is_on = scale != 1 or not own
        return tuple(v for k, v in fields.items() if k.startswith(varied) == own) * is_on

    lines: dict[tuple, list[Entry]] = {}
    for entry in entries:
        lines.setdefault((rest(entry, own=True), rest(entry, own=False)), []).append(entry)
    for off in [key for key in lines if not key[0]]:
        joined = [line for (own, others), line in lines.items() if own and others == off[1]]
        for line in joined:
            line += lines[off]
        if joined:
            del lines[off]

    def scale(entry: Entry) -> float:
        return float(getattr(entry.guidance, f"{varied}_scale"))

    def label(entry: Entry) -> str:
        name = varied.upper()
        return describe(entry.guidance).replace(f"{name} {scale(entry):g}", name, 1)

    return {label(line[0]): sorted(line, key=scale) for line in lines.values()}
