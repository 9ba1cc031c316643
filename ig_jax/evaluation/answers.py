"""Answers to the questions of `--mode=ablate`, for people and programs: tables, a Markdown report,
JSON, a figure of all questions and one of quality against cost."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import console, pictures
from ig_jax.evaluation.metrics import METRICS
from ig_jax.evaluation.questions import Question, Values, Verdict, front, judge
from ig_jax.paths import resolve

# Readable on white and on black.
_GREY = "#94a3b8"
_COLOURS = (
    *("#64748b", "#3b82f6", "#ea580c", "#0891b2", "#059669"),
    *("#65a30d", "#a855f7", "#db2777", "#d97706", "#a16207"),
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found of a question.

    Attributes:
        question: what was asked.
        values: of every arm by name.
        verdicts: what became of what was expected.
        metrics: names of what is shown, the one that decides first.
    """

    question: Question
    values: Mapping[str, Values]
    verdicts: tuple[Verdict, ...]
    metrics: tuple[str, ...]

    @classmethod
    def of(cls, question: Question, values: Mapping[str, Values], metrics: Sequence[str]) -> Answer:
        """Judges what was expected of a question by the values of its arms."""
        verdicts = (judge(e, values, metrics[0]) for e in question.expect)
        return cls(question, values, tuple(verdicts), tuple(metrics))

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len(next(iter(self.values.values())).cost)

    def columns(self) -> list[str]:
        """Titles of the table."""
        return ["", *(METRICS[name].title for name in self.metrics), "forward passes"]

    def rows(self) -> Iterator[list[str]]:
        """A row for each arm: mean ± standard deviation over seeds, and what a sample costs."""
        for arm in self.question.arms:
            values = self.values[arm.name]
            chosen = dict.fromkeys(_changes(c) for c in values.chosen if c)
            name = f"{arm.name} ({'; '.join(chosen)})" if chosen else arm.name
            shown = (spread(n, values.metrics.get(n)) for n in self.metrics)
            yield [name, *shown, f"{values.cost.mean():.1f}"]


def _changes(changes: Mapping[str, Any]) -> str:
    """Chosen values in short: the last parts of the fields' paths."""
    words = {"ig_scale": "w", "cfg_scale": "s"}
    names = (path.partition(".")[2] for path in changes)
    pairs = zip(names, changes.values(), strict=True)
    return ", ".join(f"{words.get(n, n)} {v:g}" if np.isreal(v) else f"{n} {v}" for n, v in pairs)


def spread(name: str, values: np.ndarray | None) -> str:
    """Mean ± standard deviation over seeds of a metric's values, as its row formats them."""
    if values is None:
        return ""
    shape = METRICS[name].format
    text = f"{np.mean(values):{shape}}"
    if len(values) == 1:
        return text
    return f"{text} ± {np.std(values, ddof=1):{'.2g' if shape.endswith('g') else shape}}"


def statement(verdict: Verdict) -> str:
    """What was expected, in words."""
    e = verdict.expectation
    size = "" if e.by == 0 else f" by at least {e.by:.0%}" if e.by > 0 else ""
    if e.by < 0:
        return f"{e.better} is at most {-e.by:.0%} worse than {e.than}"
    return f"{e.better} is better than {e.than}{size}"


def measured(verdict: Verdict) -> str:
    """By how much the one was better than the other, with its standard error."""
    return f"{verdict.gain.mean():+.1%} ± {verdict.error:.1%}"


def print_answer(answer: Answer) -> None:
    """Prints the table of a question, and what became of what was expected."""
    console.print_table(f"\n{answer.question.asks}", answer.columns(), answer.rows())
    for verdict in answer.verdicts:
        print(f"  {verdict.word}: {statement(verdict)} (measured: {measured(verdict)})")


def save(workdir: epath.PathLike, answers: Sequence[Answer], config: ConfigDict) -> None:
    """Writes `ablation.md` and `ablation.json`."""
    folder = resolve(workdir)
    values = {
        answer.question.name: {
            name: {
                "metrics": {k: v.tolist() for k, v in found.metrics.items()},
                "forward_passes": found.cost.tolist(),
                "chosen": list(found.chosen),
            }
            for name, found in answer.values.items()
        }
        for answer in answers
    }
    (folder / "ablation.json").write_text(json.dumps(values, indent=1) + "\n")
    (folder / "ablation.md").write_text(markdown(answers, config))


def draw(workdir: epath.PathLike, answers: Sequence[Answer]) -> None:
    """Draws `ablation.png` and, if an arm is of a family, `pareto.png`, which takes seconds."""
    folder = resolve(workdir)
    pictures.save_figure(folder / "ablation.png", plot(answers), colours=64)
    if any(arm.family for answer in answers for arm in answer.question.arms):
        pictures.save_figure(folder / "pareto.png", plot_cost(answers), colours=256)


# --- Markdown -----------------------------------------------------------------------------------


def markdown(answers: Sequence[Answer], config: ConfigDict) -> str:
    """The report: how it was made, and a section a question."""
    seeds, count = answers[0].seeds, config.evaluation.num_samples
    about = (
        f"Values are mean ± standard deviation over {seeds} seeds of training, labels and noise, "
        f"common to all that is compared; {count:,} samples each. An arm with values in brackets "
        "was tuned: each seed has what was best for the others. A gain is a share of the other's "
        f"{METRICS[answers[0].metrics[0]].title} (if no other metric is named), ± its standard "
        "error over the seeds' pairs; *held* means above the stated one by more than two standard "
        "errors, *not held* below by as much, *undecided* neither. Made on "
        f"{os.cpu_count()} cores ({platform.machine()}, {jax.devices()[0].device_kind})."
    )
    return "\n\n".join([about, *map(_section, answers)]) + "\n"


def _section(answer: Answer) -> str:
    table = [_row(answer.columns()), "|---" * len(answer.columns()) + "|"]
    parts = [f"### {answer.question.asks}", "\n".join([*table, *map(_row, answer.rows())])]
    if answer.verdicts:
        rows = [["expected", "since", "measured gain", ""]]
        for verdict in answer.verdicts:
            e = verdict.expectation
            of = f" ({METRICS[e.metric].title})" if e.metric else ""
            word = f"*{verdict.word}*"
            rows.append([statement(verdict) + of, e.since, measured(verdict), word])
        parts.append("\n".join([_row(rows[0]), "|---|---|---|---|", *map(_row, rows[1:])]))
    return "\n\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# --- figures ------------------------------------------------------------------------------------


def plot(answers: Sequence[Answer]) -> Any:
    """All questions in one figure, a panel each: every arm's value with its spread over seeds."""
    # Each goes below the shorter of two columns.
    columns: list[list[Answer]] = [[] for _ in range(min(2, len(answers)))]
    heights: list[list[int]] = [[] for _ in columns]
    for answer in answers:
        shortest = int(np.argmin([sum(h) for h in heights]))
        columns[shortest].append(answer)
        heights[shortest].append(len(answer.question.arms) + 4)
    figure = pictures.make_figure(4.9 * len(columns), 0.2 * max(map(sum, heights)))
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    panels = [
        axes
        for part, tall in zip(parts, heights, strict=True)
        for axes in part.subplots(len(tall), 1, squeeze=False, height_ratios=tall).ravel()
    ]
    for axes, answer in zip(panels, sum(columns, []), strict=True):
        name = answer.metrics[0]
        found = [answer.values[arm.name].metrics[name] for arm in answer.question.arms]
        at = np.arange(len(found))
        best = int(np.argmax([METRICS[name].better * v.mean() for v in found]))
        for y, values in zip(at, found, strict=True):
            colour = _COLOURS[1] if y == best else _GREY
            error = values.std(ddof=1) if len(values) > 1 else 0.0
            axes.errorbar(values.mean(), y, xerr=error, fmt="o", color=colour, ms=5, lw=1.5)
            axes.plot(values, np.full(len(values), y), "|", color=colour, ms=6)
        axes.set_yticks(at, [arm.name for arm in answer.question.arms], fontsize=8)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="x", labelsize=8)
        title = textwrap.fill(answer.question.asks, 48)
        axes.set_title(title, fontsize=9, fontweight="bold", loc="left")
        axes.set_xlabel(f"{METRICS[name].title}, {answer.seeds} seeds", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    return figure


def plot_cost(answers: Sequence[Answer]) -> Any:
    """Quality against cost: a line for each family of arms, and the front of all of them."""
    name = answers[0].metrics[0]
    families: dict[str, list[Values]] = {}
    for answer in answers:
        for arm in answer.question.arms:
            if arm.family:
                families.setdefault(arm.family, []).append(answer.values[arm.name])
    figure = pictures.make_figure(7.6, 4.8)
    axes = figure.subplots()
    every = [(v.cost.mean(), v.metrics[name].mean()) for line in families.values() for v in line]
    best = [every[i] for i in front(every, METRICS[name].better)]
    axes.plot(*zip(*best, strict=True), color=f"{_GREY}60", lw=9, solid_capstyle="round", zorder=0)
    for i, (title, line) in enumerate(families.items()):
        line = sorted(line, key=lambda v: v.cost.mean())
        x = [v.cost.mean() for v in line]
        y = np.array([v.metrics[name].mean() for v in line])
        error = [v.metrics[name].std(ddof=1) if len(v.cost) > 1 else 0 for v in line]
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": "osD^vP"[i % 6]}
        axes.errorbar(x, y, yerr=error, label=title, lw=1.3, ms=5, capsize=2, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter(lambda value, position: f"{value:g}")
    better = "higher" if METRICS[name].better > 0 else "lower"
    axes.set_ylabel(f"{METRICS[name].title} ({better} is better)")
    axes.set_xlabel("forward passes of the whole network per sample")
    axes.set_title(
        f"thick: the front; bars: standard deviation of {answers[0].seeds} seeds", size=9
    )
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
