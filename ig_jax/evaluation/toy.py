"""`--mode=toy`: the IG paper's toy figure (Fig. 2) re-derived, with a table of what it shows.

Networks of several seeds are trained by the ordinary loop on the ordinary config, each with a
smaller one for Autoguidance, sampled by the ordinary engine, and scored by the true density.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.data import toy2d
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import metrics
from ig_jax.evaluation.extractors import TreeExtractor
from ig_jax.experiment import Experiment
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.engine import Engine, draw
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import make_engine, open_weights
from ig_jax.training import run as training

SEEDS = 5
# Autoguidance's network: its width and training steps over the main one's, and its blocks.
_SMALLER = (2, 4, 2)
# Points of a panel, and paths of the last one.
_SHOWN, _PATHS = 2048, 5
_COLOURS = ("#c2410c", "#1d4ed8")
_VALUES = ("outlier_rate", "class_confusion", "coverage")

Scores = dict[str, list[float]]


def methods(config: ConfigDict) -> dict[str, tuple[bool, dict[str, float]]]:
    """What is compared: title → (whether a smaller network guides, scales of guidance)."""
    w, s = config.guidance.ig_scale, config.guidance.cfg_scale
    return {
        "final head": (False, {"ig_scale": 1.0, "cfg_scale": 1.0}),
        "auxiliary head": (False, {"ig_scale": 0.0, "cfg_scale": 1.0}),
        f"CFG {s:g}": (False, {"ig_scale": 1.0, "cfg_scale": s}),
        f"IG {w:g}": (False, {"ig_scale": w, "cfg_scale": 1.0}),
        f"IG {w:g} + CFG {s:g}": (False, {"ig_scale": w, "cfg_scale": s}),
        f"Autoguidance {w:g}": (True, {"ig_scale": w, "cfg_scale": 1.0}),
    }


def score(points: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Outlier rate, class confusion and coverage of points (N, 2) that were asked for as `labels`
    (N,), by the true distribution."""
    found = TreeExtractor()(points)
    return {
        "outlier_rate": metrics.outlier_rate(found.joint),
        "class_confusion": 1 - metrics.label_accuracy(found.readings, labels),
        "coverage": metrics.coverage(found.joint),
    }


def smaller(config: ConfigDict) -> ConfigDict:
    """The config of Autoguidance's network: narrower, shallower, trained for less, without head."""
    weak = config.copy_and_resolve_references()
    by_width, by_steps, depth = _SMALLER
    weak.model.update(width=config.model.width // by_width, depth=depth, auxiliary_depth=0)
    weak.train.num_steps = max(1, config.train.num_steps // by_steps)
    weak.train.sample_every = 0
    weak.guidance.update(ig_scale=1.0, cfg_scale=1.0)
    weak.evaluation.ig_scales = ()
    return weak


class Study:
    """The trained networks of one seed and their samples.

    Args:
        config: of the main network; its guidance is what is compared with none.
        workdir: where networks are trained, or were: a finished training is not repeated.
        seed: of training, labels and noise.
    """

    def __init__(self, config: ConfigDict, workdir: str, seed: int):
        self._config = config.copy_and_resolve_references()
        self._config.seed = seed
        self._main = f"{workdir}/seed_{seed}"
        weak, path = smaller(self._config), f"{workdir}/smaller_{seed}"
        training.train(weak, path)
        training.train(self._config, self._main)
        self._experiment = Experiment.from_config(self._config)
        self._params = open_weights(self._experiment, self._main).params
        guided = self._config.copy_and_resolve_references()
        guided.guidance.weak = path
        self._engines = {
            False: make_engine(self._experiment),
            True: make_engine(Experiment.from_config(guided)),
        }
        self._indices = np.arange(config.sampler.num_samples)
        self.labels = label_rule(self._config, toy2d.CLASSES)(self._indices)

    def _guidance(self, title: str) -> tuple[Engine, Any]:
        by_smaller, scales = methods(self._config)[title]
        engine = self._engines[by_smaller]
        return engine, GuidanceOptions.of(self._config.guidance, **scales).build(engine.weaker)

    def points(self, title: str) -> np.ndarray:
        """The samples (N, 2) of a method, from the same noise for all."""
        engine, guidance = self._guidance(title)
        return engine.draw(self._params, guidance, self._config.seed, self._indices, self.labels)

    def paths(self, title: str, indices: np.ndarray) -> np.ndarray:
        """How samples with these indices (n,) came about: (steps + 1, n, 2)."""
        engine, guidance = self._guidance(title)
        branches, guidance = engine.settings.prepare(guidance)
        run = jax.jit(functools.partial(draw, engine.settings, branches, True))
        seed = np.uint32(self._config.seed)
        return np.asarray(
            run(self._params, guidance, seed, indices.astype(np.int32), self.labels[indices])[1]
        )


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=toy`: trains, samples, prints the table, and draws `toy2d.png` into the workdir.

    Started again it repeats no finished training. Raises `InputError` for a config of another data
    set, or of a network without an auxiliary head; and what `training.run.train` raises.
    """
    if config.data.name != "toy2d" or not config_lib.model_spec(config).auxiliary_depths:
        raise InputError(
            f"config.data.name is {config.data.name!r}: expected 'toy2d' and a network with an "
            "auxiliary head for --mode=toy, such as --config=toy2d_ig"
        )
    _share_compiled(workdir)
    titles = ("data", *methods(config))
    scores: dict[str, Scores] = {title: {name: [] for name in _VALUES} for title in titles}
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    paths: Mapping[str, np.ndarray] = {}
    for seed in range(config.seed, config.seed + SEEDS):
        study = Study(config, workdir, seed)
        for title in titles:
            points, labels = (
                toy2d.tree().sample(len(study.labels), 1000 + seed)
                if title == "data"
                else (study.points(title), study.labels)
            )
            for name, value in score(points, labels).items():
                scores[title][name].append(value)
            shown.setdefault(title, (points[:_SHOWN], labels[:_SHOWN]))
        paths = paths or _rescued(study, titles[1], titles[4])
    folder = resolve(workdir)
    if is_primary():
        print_scores(scores, config.sampler.num_samples)
        (folder / "toy2d.json").write_text(json.dumps(scores, indent=1) + "\n")
        figure = plot(shown, paths, scores)
        pictures.save_image(folder / "toy2d.png", pictures.rendered(figure).quantize(96))
    return f"the figure: {folder}/toy2d.png; every seed's numbers: toy2d.json"


def _share_compiled(workdir: str) -> None:
    """Compiles what the seeds have in common but once, unless a cache is set up already."""
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(resolve(workdir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        compilation_cache.reset_cache()


def _rescued(study: Study, plain: str, guided: str) -> dict[str, np.ndarray]:
    """Paths of a few points, with and without guidance, that only guidance brings to the tree."""
    density = {title: toy2d.tree().density(study.points(title)) for title in (plain, guided)}
    limit = toy2d.outlier_density()
    indices = np.flatnonzero((density[plain] < limit) & (density[guided] >= limit))[:_PATHS]
    return {title: study.paths(title, indices) for title in (plain, guided)}


def print_scores(scores: Mapping[str, Scores], count: int) -> None:
    """Prints mean and standard deviation over seeds of every method's values."""
    rows = [[title, *(_spread(scores[title][name]) for name in _VALUES)] for title in scores]
    about = f"{count:,} samples, mean ± standard deviation over {SEEDS} seeds of training"
    console.print_table(about, ["", "outliers", "class confusion", "branches reached"], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1%} ± {100 * np.std(values, ddof=1):.1f}"


def plot(
    shown: Mapping[str, tuple[np.ndarray, np.ndarray]],
    paths: Mapping[str, np.ndarray],
    scores: Mapping[str, Scores],
) -> Any:
    """The figure: a panel for each method, and one of paths.

    Args:
        shown: title → points (n, 2) of the first seed and their labels (n,).
        paths: title → (steps + 1, n, 2), without and with guidance.
        scores: whose means are the panels' captions.
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
        outliers, confusion, reached = (np.mean(scores[title][name]) for name in _VALUES)
        _caption(
            axes,
            title,
            f"outliers {outliers:.1%} · wrong class {confusion:.1%} · branches {reached:.0%}",
        )
    _prepare(panels[-1])
    for (title, path), style in zip(paths.items(), (("0.35", "--"), ("#047857", "-")), strict=True):
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
    axes.contourf(lines, lines, density, levels=levels, colors=["#e2e8f0"])
    axes.set(xlim=(-1.65, 1.65), ylim=(-1.65, 1.65), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_color("#cbd5e1")


@functools.cache
def _mesh_density(mesh: bytes) -> np.ndarray:
    return toy2d.tree().density(np.frombuffer(mesh).reshape(-1, 2))


def _caption(axes: Any, title: str, text: str) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", pad=18)
    axes.text(0.5, 1.015, text, transform=axes.transAxes, ha="center", fontsize=7.5, color="0.3")
