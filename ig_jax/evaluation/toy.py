"""`--mode=toy`: the IG paper's toy figure (Fig. 2) re-derived, with a table of what it shows.

It is an ablation (`ablate.py`) whose samples can be looked at: points of the plane, scored by the
true density.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax import pictures
from ig_jax.data import toy2d
from ig_jax.errors import InputError
from ig_jax.evaluation import answers, metrics
from ig_jax.evaluation.ablate import Drawing, Laboratory
from ig_jax.evaluation.extractors import TreeExtractor
from ig_jax.evaluation.questions import Values
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.engine import draw
from ig_jax.sampling.labels import label_rule

# The arms between which the last panel shows paths, without and with guidance.
PLAIN, GUIDED = "final head", "IG"
# Points of a panel, and paths of the last one.
_SHOWN, _PATHS = 2048, 5
_COLOURS = ("#ea580c", "#3b82f6")

# Faint on white and on black: where the data lie, and the panels' frames.
_TREE = f"{pictures.INK}40"

Points = tuple[np.ndarray, np.ndarray]


def of_data(count: int, seeds: tuple[int, ...]) -> Values:
    """What points of the true distribution score, as many as are drawn of each arm."""
    found: dict[str, list[float]] = {"outlier_rate": [], "label_accuracy": [], "coverage": []}
    for seed in seeds:
        points, labels = toy2d.tree().sample(count, 1000 + seed)
        seen = TreeExtractor()(points)
        found["outlier_rate"].append(metrics.outlier_rate(seen.joint))
        found["label_accuracy"].append(metrics.label_accuracy(seen.readings, labels))
        found["coverage"].append(metrics.coverage(seen.joint))
    return Values({k: np.array(v) for k, v in found.items()}, np.zeros(len(seeds)))


def _labels(drawing: Drawing, indices: np.ndarray) -> np.ndarray:
    return label_rule(drawing.experiment.config, toy2d.CLASSES)(indices)


def points(drawing: Drawing, count: int) -> Points:
    """The first samples (count, 2) of an arm, and the labels that they were asked for as."""
    indices, seed = np.arange(count), drawing.experiment.config.seed
    guidance = drawing.guidance.build(drawing.engine.weaker)
    labels = _labels(drawing, indices)
    return drawing.engine.draw(drawing.weights.params, guidance, seed, indices, labels), labels


def paths(drawing: Drawing, indices: np.ndarray) -> np.ndarray:
    """How samples with these indices (n,) came about: (steps + 1, n, 2)."""
    engine, seed = drawing.engine, np.uint32(drawing.experiment.config.seed)
    branches, guidance = engine.settings.prepare(drawing.guidance.build(engine.weaker))
    run = jax.jit(functools.partial(draw, engine.settings, branches, True))
    labels = _labels(drawing, indices)
    return np.asarray(
        run(drawing.weights.params, guidance, seed, indices.astype(np.int32), labels)[1]
    )


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=toy`: trains, samples, prints the table, and draws `toy2d.png` into the workdir.

    Started again it repeats nothing. Raises `InputError` for a config of another data set, or whose
    first question lacks an arm that the figure needs; and what `Laboratory` raises.
    """
    if config.data.name != "toy2d":
        raise InputError(
            f"config.data.name is {config.data.name!r}: expected 'toy2d' for --mode=toy, such as "
            "--config=toy2d_ig"
        )
    laboratory = Laboratory(config, workdir)
    arms = {arm.name: arm for arm in laboratory.questions[0].arms}
    for name in (PLAIN, GUIDED):
        if name not in arms:
            raise InputError(
                f"config.ablation.questions[0] has no arm {name!r}: --mode=toy needs it"
            )
    answer = laboratory.answer(laboratory.questions[0])
    data = of_data(config.evaluation.num_samples, laboratory.seeds)
    if is_primary():
        answers.print_answer(answer)
        answers.save(workdir, [answer], config)
    drawings = {n: laboratory.drawing(a, a.changes, laboratory.seeds[0]) for n, a in arms.items()}
    shown = {"data": toy2d.tree().sample(_SHOWN, 1000)}
    shown |= {name: points(drawing, _SHOWN) for name, drawing in drawings.items()}
    figure = plot(shown, _rescued(drawings, shown), {"data": data, **answer.values})
    file = resolve(workdir) / "toy2d.png"
    if is_primary():
        pictures.save_figure(file, figure, colours=96)
    rate = metrics.METRICS["outlier_rate"]
    spread = answers.spread("outlier_rate", data.metrics["outlier_rate"])
    return f"the data themselves: {spread} {rate.title}; the figure: {file}; the table: ablation.md"


def _rescued(drawings: Mapping[str, Drawing], shown: Mapping[str, Points]) -> dict[str, np.ndarray]:
    """Paths of a few points, with and without guidance, that only guidance brings to the tree."""
    density = {name: toy2d.tree().density(shown[name][0]) for name in (PLAIN, GUIDED)}
    limit = toy2d.outlier_density()
    indices = np.flatnonzero((density[PLAIN] < limit) & (density[GUIDED] >= limit))[:_PATHS]
    return {name: paths(drawings[name], indices) for name in (PLAIN, GUIDED)}


def plot(
    shown: Mapping[str, Points], paths: Mapping[str, np.ndarray], values: Mapping[str, Values]
) -> Any:
    """The figure: a panel for each method, and one of paths.

    Args:
        shown: title → points (n, 2) of the first seed and their labels (n,).
        paths: title → (steps + 1, n, 2), without and with guidance.
        values: whose means are the panels' captions.
    """
    figure = pictures.make_figure(12.4, 6.9)
    panels = figure.subplots(2, 4).ravel()
    for axes, (title, (points, labels)) in zip(panels, shown.items(), strict=False):
        _prepare(axes)
        outlier = toy2d.tree().density(points) < toy2d.outlier_density()
        for label, colour in enumerate(_COLOURS):
            for these, size, alpha in ((~outlier, 1.2, 0.45), (outlier, 3.5, 1.0)):
                chosen = points[(labels == label) & these]
                axes.scatter(*chosen.T, s=size, color=colour, alpha=alpha, linewidths=0)
        means = {name: found.mean() for name, found in values[title].metrics.items()}
        _caption(
            axes,
            title,
            f"outliers {means['outlier_rate']:.1%} · wrong class {1 - means['label_accuracy']:.1%} "
            f"· branches {means['coverage']:.0%}",
        )
    _prepare(panels[-1])
    for (title, path), style in zip(
        paths.items(), ((pictures.INK, "--"), ("#059669", "-")), strict=True
    ):
        for i in range(path.shape[1]):
            name = title if i == 0 else None
            panels[-1].plot(*path[:, i].T, color=style[0], linestyle=style[1], lw=1.2, label=name)
        panels[-1].scatter(*path[-1].T, s=14, color=style[0], zorder=3)
    _caption(panels[-1], "paths from the same noise", "outliers that guidance brings to the tree")
    if panels[-1].lines:
        panels[-1].legend(loc="lower right", fontsize=8, frameon=False)
    return figure


def _prepare(axes: Any) -> None:
    """Draws where the true density is not negligible."""
    lines = np.linspace(-1.65, 1.65, 220)
    mesh = np.stack(np.meshgrid(lines, lines), -1)
    density = _mesh_density(mesh.tobytes()).reshape(mesh.shape[:2])
    levels = [toy2d.outlier_density(), np.inf]
    axes.contourf(lines, lines, density, levels=levels, colors=[_TREE])
    axes.set(xlim=(-1.65, 1.65), ylim=(-1.65, 1.65), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_color(_TREE)


@functools.cache
def _mesh_density(mesh: bytes) -> np.ndarray:
    return toy2d.tree().density(np.frombuffer(mesh).reshape(-1, 2))


def _caption(axes: Any, title: str, text: str) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", pad=18)
    axes.text(0.5, 1.015, text, transform=axes.transAxes, ha="center", fontsize=7.5)
