"""Pictures of what a network has learnt: grids of samples, during training and at its end."""

from __future__ import annotations

import logging

import numpy as np
from etils import epath
from PIL import Image

from ig_jax import console, pictures
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import NotFiniteError
from ig_jax.experiment import ToImages
from ig_jax.models.functional import Params
from ig_jax.parallel.processes import is_primary
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import choose_labels
from ig_jax.training.callbacks import Callback, Moment, is_due
from ig_jax.training.logs import Writer
from ig_jax.training.setup import Setup

log = logging.getLogger("ig_jax")


class _Grid(Callback):
    """A picture in the workdir's folder of samples, of the same noise and labels each time.

    Args:
        setup: of the run.
        engine: its sampler.
        to_images: from samples to pictures.
    """

    def __init__(self, setup: Setup, engine: Engine, to_images: ToImages):
        self._setup, self._engine, self._to_images = setup, engine, to_images

    def _draw(self, params: Params, count: int, **guidance: float) -> tuple[np.ndarray, np.ndarray]:
        """The first samples and their labels, on every process."""
        config = self._setup.config
        indices = np.arange(count)
        classes = self._setup.experiment.spec.num_classes
        labels = choose_labels("balanced", indices, classes, config.seed)
        terms = GuidanceOptions.of(config.guidance, **guidance).build(self._engine.weaker)
        return self._engine.draw(params, terms, config.seed, indices, labels), labels

    def _path(self, name: str) -> epath.Path:
        return self._setup.workdir / "samples" / name

    def _names(self, labels: np.ndarray) -> list[str]:
        classes = self._setup.experiment.spec.num_classes
        return [self._setup.source.class_names[i] if classes else "" for i in labels]

    def _save(self, name: str, picture: Image.Image) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_image(path, picture)


class SampleGrid(_Grid):
    """A grid of samples at the config's guidance, every `config.train.sample_every` steps."""

    def due(self, step: int, saving: bool) -> bool:
        train = self._setup.config.train
        return is_due(train.sample_every, step) or step == train.num_steps

    def on_due(self, moment: Moment) -> None:
        count = min(self._setup.config.sampler.num_samples, 64)
        with console.stage("drawing the sample grid"):
            x, labels = self._draw(moment.state.ema, count)
        if not is_primary():
            return
        try:
            images = self._to_images(x, where=f" at step {moment.step}")
        except NotFiniteError as error:  # training may yet mend that
            log.warning("no sample grid: %s", error)
            return
        grid = pictures.labelled_grid(images, self._names(labels))
        self._save(f"step_{moment.step:07d}.png", grid)
        moment.writer.write_images(
            moment.step, {"samples/grid": np.asarray(pictures.on_white(grid))}
        )


class ScaleGrid(_Grid):
    """At the end, a grid of the same noise and labels at each IG scale, a row each."""

    def on_end(self, step: int, ema: Params, writer: Writer) -> str:
        config = self._setup.config
        scales = config.evaluation.ig_scales or (1.0, config.guidance.ig_scale)
        with console.stage("drawing the same noise at each scale"):
            drawn = [self._draw(ema, 10, ig_scale=float(scale)) for scale in scales]
        if is_primary():
            rows, names = [f"w = {scale:g}" for scale in scales], self._names(drawn[0][1])
            x = self._to_images(np.concatenate([x for x, _ in drawn]))
            if x.ndim == 2:
                grid = pictures.labelled_grid(x, np.repeat(rows, 10).tolist())
            else:
                grid = pictures.picture_table(x.reshape(len(rows), 10, *x.shape[1:]), rows, names)
            self._save("scales.png", grid)
            writer.write_images(step, {"samples/scales": np.asarray(pictures.on_white(grid))})
        return f"the same noise at each: {self._path('scales.png')}"
