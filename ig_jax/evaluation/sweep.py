"""`--mode=sweep`: finds the best guidance by racing settings against each other.

All settings start on the same few noise samples and labels; the worse part drops out of each round,
and the rest go on to more samples, so that most of the work goes where the decision is close
(successive halving: Jamieson & Talwalkar 2016; common random numbers).
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import evaluate, metrics, protocol, sets
from ig_jax.evaluation.protocol import Result
from ig_jax.evaluation.statistics import gaussian_statistics
from ig_jax.experiment import Experiment
from ig_jax.models.functional import Params
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.labels import labels_for

FOLDER = "sweep"
# Of the full grid's samples, if the config names no budget.
SHARE = 0.3
# This many settings reach the last round (more if the budget lets all of them have all samples).
FINALISTS = 2
# Settings whose uncertainty is estimated: a resample of 2048-wide features takes seconds.
BOOTSTRAPPED = 4
# By how much settings may fall from round to round, the gentlest first.
FACTORS = (2, 3, 4, 6, 8, 12, 16)
# Metric → whether larger is better.
DIRECTIONS = {"fid": -1, "inception_score": 1, "label_accuracy": 1}

log = logging.getLogger("ig_jax")


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of the race: how many settings run, and how many samples each has at its end."""

    settings: int
    samples: int


def settings_of(config: ConfigDict) -> list[GuidanceOptions]:
    """Every combination of `config.sweep`'s scales and intervals, without those that are the same.

    At scale 1 an interval means nothing, so there it is [0, 1].
    """
    sweep = config.sweep

    def candidates(name: str) -> list[tuple[float, tuple[float, float]]]:
        field = f"{name}_intervals"
        intervals = config_lib.interval_pairs(f"config.sweep.{field}", sweep[field])
        pairs = itertools.product(intervals, sweep[f"{name}_scales"])
        return [(float(s), (0.0, 1.0) if s == 1 else interval) for interval, s in pairs]

    combinations = itertools.product(candidates("cfg"), candidates("ig"))
    return list(
        dict.fromkeys(
            config_lib.guidance(
                config, ig_scale=w, ig_interval=when, cfg_scale=s, cfg_interval=cfg_when
            )
            for (s, cfg_when), (w, when) in combinations
        )
    )


def cost(rounds: Sequence[Round], fresh: int) -> int:
    """Samples drawn in a race, each once, and `fresh` more to measure the winner again."""
    drawn, before = 0, 0
    for entry in rounds:
        drawn += entry.settings * (entry.samples - before)
        before = entry.samples
    return drawn + fresh


def plan_rounds(settings: int, num_samples: int, budget: int, batch_size: int) -> list[Round]:
    """Divides a budget of samples over rounds.

    Settings fall by a constant factor from round to round and samples grow geometrically. Of the
    plans that fit, the gentlest factor is taken, and then the most samples in the first round,
    whose verdict is the least certain.

    Args:
        settings: how many there are.
        num_samples: of each setting in the last round.
        budget: samples of all settings together, with `num_samples` fresh ones for the winner; 0
            for 30 % of the full grid's, or the least of a gentle plan where that is too little.
        batch_size: rounds end on multiples of it, since a started batch costs a whole one.

    Returns:
        The rounds. Raises `InputError` if even the cheapest plan costs more than the budget.
    """
    plans = [_plans(settings, num_samples, batch_size, factor) for factor in FACTORS]
    limit = budget or SHARE * settings * num_samples
    for rounds in itertools.chain(*plans):
        if cost(rounds, num_samples) <= limit:
            return rounds
    if not budget:
        return plans[0][-1]
    cheapest = min(cost(rounds, num_samples) for rounds in itertools.chain(*plans))
    raise InputError(
        f"config.sweep.budget is {budget} samples: {settings} settings with {num_samples} in the "
        f"last round need at least {cheapest} in batches of {batch_size} "
        "(lower config.sweep.num_samples or config.sampler.batch_size, or name fewer settings)"
    )


def _plans(settings: int, num_samples: int, batch_size: int, factor: int) -> list[list[Round]]:
    """All plans in which settings fall by a factor, from the most samples at first to the least."""
    alive = [settings]
    while alive[-1] > FINALISTS:
        alive.append(max(FINALISTS, math.ceil(alive[-1] / factor)))
    whole = range(num_samples // batch_size * batch_size, 0, -batch_size)
    # With one round there is nothing to grow.
    starts = (num_samples, *whole) if len(alive) > 1 else (num_samples,)
    return [_rounds(alive, start, num_samples, batch_size) for start in starts]


def _rounds(alive: Sequence[int], start: int, num_samples: int, batch_size: int) -> list[Round]:
    rounds: list[Round] = []
    for i, count in enumerate(alive):
        wanted = start * (num_samples / start) ** (i / max(len(alive) - 1, 1))
        whole = math.ceil(wanted / batch_size - 1e-9) * batch_size
        samples = min(whole, num_samples)
        # A round without new samples has nothing new to say.
        if not rounds or samples > rounds[-1].samples:
            rounds.append(Round(count, samples))
    return rounds


class Draws:
    """Features of settings' samples, drawn when first asked for and kept on disk from then on.

    A sample depends on (seed, index) alone, so a search that was stopped reads what is there, draws
    the rest, and comes to the same end; a larger search begins with what a smaller one drew.

    Args:
        evaluator: draws samples and extracts features.
        params: the network's parameters.
        folder: where features are kept, for these weights, sampler, labels and seed only.
        seed: of noise.
        labels: (N,) for every sample that may be asked for.
    """

    def __init__(
        self,
        evaluator: evaluate.Evaluator,
        params: Params,
        folder: epath.PathLike,
        seed: int,
        labels: np.ndarray,
    ):
        self._evaluator, self._params = evaluator, params
        self._folder, self._seed, self.labels = resolve(folder), seed, labels
        self._held: dict[GuidanceOptions, dict[str, np.ndarray]] = {}

    def __call__(self, guidance: GuidanceOptions, count: int) -> dict[str, np.ndarray]:
        """Features of a setting's first `count` samples: "pool" and, if any, "probabilities"."""
        held = self._held.get(guidance)
        have = 0 if held is None else len(held["pool"])
        if have < count:
            piece = self._piece(guidance, have, count)
            held = piece if held is None else _joined(held, piece)
            self._held[guidance] = held
        return {name: rows[:count] for name, rows in held.items()}

    def _piece(self, guidance: GuidanceOptions, start: int, stop: int) -> dict[str, np.ndarray]:
        name = hashlib.sha256(json.dumps(protocol.guidance_record(guidance)).encode()).hexdigest()
        file = self._folder / f"{name[:16]}-{start}-{stop}.npz"
        # The primary's view decides: the others must not draw what it reads, or wait for it.
        if sets.primary_says(file.exists()):
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        indices = np.arange(start, stop)
        found = self._evaluator.sample_features(
            self._params, guidance, indices, self.labels[indices], self._seed
        )
        piece = {"pool": found.features, "probabilities": found.probabilities}
        piece = {key: rows for key, rows in piece.items() if rows is not None}
        if is_primary():
            buffer = io.BytesIO()
            np.savez(buffer, **piece)
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + ".partial")
            partial.write_bytes(buffer.getvalue())
            partial.replace(file)
        return piece


def _joined(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([a[name], b[name]]) for name in a}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one setting: values of every metric after each round it took part in."""

    guidance: GuidanceOptions
    samples: tuple[int, ...]
    values: tuple[dict[str, float], ...]


def race(
    settings: Sequence[GuidanceOptions],
    rounds: Sequence[Round],
    measure: Callable[[GuidanceOptions, int], dict[str, float]],
    metric: str,
    advance: console.Advance = lambda count=1, text="": None,
) -> list[Entry]:
    """Runs the rounds.

    Args:
        settings: those that start.
        rounds: of `plan_rounds`.
        measure: `measure(setting, samples)` gives the metrics of a setting's first samples.
        metric: the one that decides.
        advance: told of new samples.

    Returns:
        An entry for each setting, the best first: by the last round it reached, then its value.
    """
    entries = {setting: Entry(setting, (), ()) for setting in settings}
    alive, before, ranking = list(settings), 0, []
    for entry in rounds:
        ranking = alive[entry.settings :] + ranking
        alive = alive[: entry.settings]
        for setting in alive:
            values = measure(setting, entry.samples)
            old = entries[setting]
            entries[setting] = Entry(setting, (*old.samples, entry.samples), (*old.values, values))
            advance(entry.samples - before)
        alive.sort(key=lambda s: -DIRECTIONS[metric] * entries[s].values[-1][metric])
        before = entry.samples
    return [entries[setting] for setting in alive + ranking]


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Of a setting's value: standard error, and the share of resamples in which it won."""

    standard_error: float
    wins: float


class Search:
    """A search for one model: what `run` does, in steps that can be called from elsewhere.

    Args:
        experiment: the config and its parts.
        params: the network's parameters, on the mesh.
        step: their training step, for the record.
        workdir: results and draws go to its folder `sweep`.

    Raises:
        InputError: before anything is compiled: an impossible budget, metric or setting.
    """

    def __init__(self, experiment: Experiment, params: Params, step: int, workdir: str):
        config = experiment.config
        sweep = config.sweep
        self.metric = sweep.metric
        self.settings = settings_of(config)
        config_lib.check_guidance(config, self.settings)
        self.grid_samples = len(self.settings) * sweep.num_samples
        self.rounds = plan_rounds(
            len(self.settings),
            sweep.num_samples,
            sweep.budget,
            config.sampler.batch_size,
        )
        self.folder = resolve(workdir) / FOLDER
        source = evaluate.open_source(experiment, workdir, step)
        self.evaluator = evaluate.Evaluator.create(experiment, source, workdir)
        self.scorer = self.evaluator.scorer
        self._check_metric()
        self._params, self._step = params, step
        self._class_names = source.class_names
        self._weights = protocol.weights_hash(params)
        self.draws = self.open_draws(sweep.seed)

    def _check_metric(self) -> None:
        needs = ""
        if self.metric == "inception_score" and not self.scorer.is_inception:
            needs = "Inception features"
        if self.metric == "label_accuracy" and not self.scorer.reads_labels:
            needs = "the digits classifier and a class-conditional model"
        if needs:
            raise InputError(f"config.sweep.metric is {self.metric!r}: it needs {needs}")

    def open_draws(self, seed: int) -> Draws:
        """The stored features of samples of another seed's noise and labels."""
        config = self._seeded(seed)
        indices = np.arange(config.sweep.num_samples)
        labels = labels_for(config, indices, self._class_names)
        record = self._record(config, config_lib.guidance(config, ig_scale=1.0, cfg_scale=1.0))
        key = json.dumps([record, self.scorer.extractor.fingerprint], sort_keys=True)
        folder = self.folder / f"draws-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return Draws(self.evaluator, self._params, folder, seed, labels)

    def _seeded(self, seed: int) -> ConfigDict:
        config = copy.deepcopy(self.evaluator.experiment.config)
        config.seed = seed
        return config

    def _record(self, config: ConfigDict, guidance: GuidanceOptions) -> dict[str, Any]:
        return protocol.sampling_record(
            config,
            guidance,
            step=self._step,
            weights=self._weights,
            ema=config.sampler.ema,
            weak=self.evaluator.weak_hash(),
        )

    def values(self, rows: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
        """Every metric a search can use, of features as `Draws` holds them."""
        pool = gaussian_statistics(rows["pool"])
        with warnings.catch_warnings():  # said once, by `notes`
            warnings.simplefilter("ignore", metrics.FewSamplesWarning)
            found = {"fid": metrics.frechet_distance(pool, self.scorer.reference.pool)}
        if self.scorer.is_inception:
            found["inception_score"] = metrics.inception_score(rows["probabilities"])
        if self.scorer.reads_labels:
            read = rows["probabilities"]
            found["label_accuracy"] = evaluate.label_accuracy(read, labels[: len(read)])
        return found

    def measure(self, guidance: GuidanceOptions, count: int) -> dict[str, float]:
        """The metrics of a setting's first `count` samples of the search's noise."""
        return self.values(self.draws(guidance, count), self.draws.labels)

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
        sweep = self.evaluator.experiment.config.sweep
        rows = self.draws(entry.guidance, entry.samples[-1])
        if self.metric == "fid":
            reference = self.scorer.reference.pool
            return metrics.frechet_bootstrap(rows["pool"], reference, sweep.bootstrap, sweep.seed)
        generator = np.random.default_rng(sweep.seed)
        labels, count = self.draws.labels, entry.samples[-1]
        values = []
        for _ in range(sweep.bootstrap):
            drawn = generator.integers(count, size=count)
            resample = {name: array[drawn] for name, array in rows.items()}
            values.append(self.values(resample, labels[drawn])[self.metric])
        return np.asarray(values)

    def uncertainty(self, finalists: Sequence[Entry]) -> list[Uncertainty]:
        """Bootstrap uncertainty of the entries of the last round."""
        resamples = np.stack([self.resampled(entry) for entry in finalists])
        winners = (DIRECTIONS[self.metric] * resamples).argmax(0)
        return [
            Uncertainty(float(values.std(ddof=1)), float(np.mean(winners == i)))
            for i, values in enumerate(resamples)
        ]

    def fresh(self, guidance: GuidanceOptions) -> Result:
        """All metrics of a setting on noise and labels that the search has not seen."""
        config = self._seeded(self.evaluator.experiment.config.sweep.seed + 1)
        indices = np.arange(config.sweep.num_samples)
        labels = labels_for(config, indices, self._class_names)
        with console.progress_bar(len(indices), "measuring the winner again") as advance:
            found = self.evaluator.sample_features(
                self._params, guidance, indices, labels, config.seed, advance
            )
        scores, notes = self.scorer.score(found, labels)
        record = self.scorer.record(found, self._record(config, guidance))
        return Result(scores, record, notes)


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
    experiment = Experiment.from_config(config)
    params, step = evaluate.load_weights(experiment, workdir, which)
    search = Search(experiment, params, step, workdir)
    if is_primary():
        plan = ", ".join(f"{r.settings} settings to {r.samples}" for r in search.rounds)
        print(f"rounds (samples each): {plan}")
    entries = search.race()
    finalists = [entry for entry in entries if len(entry.samples) == len(search.rounds)]
    uncertainties = search.uncertainty(finalists[:BOOTSTRAPPED])
    confirmed = search.fresh(entries[0].guidance)
    drawn = cost(search.rounds, config.sweep.num_samples)
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
        "guidance": guidance_fields(entries[0].guidance),
        "metric": search.metric,
        "search": rows[0],
        "fresh": dataclasses.asdict(confirmed),
        "line": protocol.line(confirmed),
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
    (search.folder / "best.json").write_text(json.dumps(best, indent=2) + "\n")


def guidance_fields(guidance: GuidanceOptions) -> dict[str, Any]:
    """The fields of `config.guidance` that a setting stands for, as plain JSON values."""
    fields = dataclasses.asdict(guidance)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def load_best(workdir: epath.PathLike) -> GuidanceOptions:
    """The setting that a finished sweep of this workdir found best.

    Raises:
        InputError: if there is none, or the file is damaged.
    """
    path = resolve(workdir) / FOLDER / "best.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a workdir in which --mode=sweep finished")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["guidance"]
        scales = {name: float(fields[name]) for name in ("ig_scale", "cfg_scale")}
        bounds = {name: tuple(map(float, fields[name])) for name in ("ig_interval", "cfg_interval")}
        # Files of older versions name these four only.
        return dataclasses.replace(GuidanceOptions(**fields), **scales, **bounds)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of --mode=sweep ({error})") from error


def apply_best(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Puts the setting of `load_best` into `config.guidance`, in place."""
    config.guidance.update(dataclasses.asdict(load_best(workdir)))


def table(
    metric: str, entries: Sequence[Entry], uncertainties: Sequence[Uncertainty]
) -> list[dict[str, Any]]:
    """A row of plain values for each setting, the best first."""
    rows = []
    for rank, entry in enumerate(entries):
        fields = guidance_fields(entry.guidance)
        known = uncertainties[rank] if rank < len(uncertainties) else None
        rows.append(
            {
                "rank": rank + 1,
                "ig_scale": fields["ig_scale"],
                "ig_low": fields["ig_interval"][0],
                "ig_high": fields["ig_interval"][1],
                "cfg_scale": fields["cfg_scale"],
                "cfg_low": fields["cfg_interval"][0],
                "cfg_high": fields["cfg_interval"][1],
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
    titles = [evaluate.metric_title(name, record) for name in names]
    rows = []
    for rank, entry in enumerate(entries[:most]):
        known = uncertainties[rank] if rank < len(uncertainties) else None
        rows.append(
            [
                protocol.describe_guidance(protocol.guidance_record(entry.guidance)),
                f"{entry.samples[-1]:,}",
                *(f"{entry.values[-1][n]:{protocol.METRICS[n][1]}}" for n in names),
                "" if known is None else f"{known.standard_error:.2g}",
                "" if known is None else f"{known.wins:.0%}",
            ]
        )
    title = f"best {len(rows)} of {len(entries)} settings (values compare at equal samples only)"
    console.print_table(title, ["guidance", "samples", *titles, "std. error", "wins"], rows)


def _last_line(
    search: Search, best: Entry, uncertainty: Uncertainty, confirmed: Result, drawn: int
) -> str:
    name = evaluate.metric_title(search.metric, confirmed.protocol)
    value, fresh = best.values[-1][search.metric], confirmed.metrics[search.metric]
    setting = protocol.describe_guidance(confirmed.protocol)
    return (
        f"{protocol.line(confirmed)}\n"
        f"best: {setting}, {name} {value:.4g} ± {uncertainty.standard_error:.2g} in the search, "
        f"{fresh:.4g} on fresh noise; {drawn:,} samples "
        f"({drawn / search.grid_samples:.0%} of the full grid's); results: {search.folder}"
    )


def plot(metric: str, entries: Sequence[Entry], confirmed: Result) -> Any:
    """Two panels: the metric against scale, a line for each interval; and the trade-off.

    All values are of the first round, where all settings have the same samples; markers grow with
    the rounds that a setting went on to. A star marks the winner.
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
        better = "higher" if DIRECTIONS[name] > 0 else "lower"
        return f"{evaluate.metric_title(name, record)} ({better} is better)"

    figure = pictures.make_figure(5.4 * len(panels), 4.4)
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for title, line in _lines(entries, varied).items():
            xy = [[point(entry, name) for entry in line] for name in names]
            (drawn,) = axes.plot(*xy, label=title, lw=1)
            sizes = [14 * len(entry.samples) for entry in line]
            axes.scatter(*xy, sizes, color=drawn.get_color())
        best = [point(entries[0], name) for name in names]
        axes.plot(*best, "k*", ms=12, label="winner", linestyle="none")
        axes.set(xlabel=label(names[0]), ylabel=label(names[1]))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    title = evaluate.metric_title(metric, record)
    figure.suptitle(
        f"guidance search, step {record['checkpoint_step']}: the first {first:,} samples of each "
        "setting; larger markers went further\n"
        f"winner: {protocol.describe_guidance(record)}, {title} {confirmed.metrics[metric]:.4g} "
        f"on {record['num_samples']:,} fresh samples",
        fontsize="medium",
    )
    return figure


def _lines(entries: Sequence[Entry], varied: str) -> dict[str, list[Entry]]:
    """Entries that differ in one scale only, in order of it, under a label.

    A setting with scale 1, which has no interval, starts every line of its other fields.
    """
    other = "cfg" if varied == "ig" else "ig"

    def rest(guidance: GuidanceOptions) -> tuple:
        return getattr(guidance, f"{other}_scale"), getattr(guidance, f"{other}_interval")

    def scale(entry: Entry) -> float:
        return float(getattr(entry.guidance, f"{varied}_scale"))

    lines: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if scale(entry) != 1:
            interval = getattr(entry.guidance, f"{varied}_interval")
            lines.setdefault((interval, rest(entry.guidance)), []).append(entry)
    for entry in entries:
        if scale(entry) == 1:
            joined = [line for (_, other), line in lines.items() if other == rest(entry.guidance)]
            for line in joined or [lines.setdefault(((0.0, 1.0), rest(entry.guidance)), [])]:
                line.append(entry)
    labelled = {}
    for (interval, (other_scale, other_interval)), line in sorted(lines.items()):
        label = f"{varied.upper()} on [{interval[0]:g}, {interval[1]:g}]"
        if other_scale != 1:
            label += f", {other.upper()} {other_scale:g} on [{other_interval[0]:g}, "
            label += f"{other_interval[1]:g}]"
        labelled[label] = sorted(line, key=scale)
    return labelled
