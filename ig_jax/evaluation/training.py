"""Evaluation as a part of training: the loop's callbacks for `config.evaluation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ig_jax import pictures
from ig_jax.evaluation import report
from ig_jax.evaluation import run as evaluation
from ig_jax.experiment import ToImages
from ig_jax.models.functional import Params
from ig_jax.record import Weights, describe_guidance
from ig_jax.sampling.engine import Engine
from ig_jax.storage.checkpoints import Score
from ig_jax.training.callbacks import Callback, Moment, is_due
from ig_jax.training.logs import Writer
from ig_jax.training.setup import Setup


class DuringTraining(Callback):
    """Scores every `config.evaluation.every` steps, which rank checkpoints."""

    saves = True

    def __init__(self, setup: Setup, engine: Engine):
        self._setup, self._every = setup, setup.config.evaluation.every
        self._evaluate = evaluation.TrainingEvaluation(
            setup.experiment, setup.source, setup.workdir, engine
        )

    def due(self, step: int, saving: bool) -> bool:
        return is_due(self._every, step)

    def on_due(self, moment: Moment) -> Score | None:
        scores = self._evaluate(moment.state.ema)
        named = _named(scores, self._evaluate.about)
        if named:
            examples = moment.step * self._setup.config.train.batch_size
            named[evaluation.EPOCHS] = examples / len(self._setup.source.train)
        moment.writer.write_scalars(moment.step, named)
        return Score(self._evaluate.score_name, scores["fid"]) if scores else None


class AtEnd(Callback):
    """Scores of the trained weights at each of `config.evaluation.ig_scales`, in a report."""

    def __init__(self, setup: Setup, engine: Engine):
        self._setup, self._engine = setup, engine
        evaluation.check(setup.experiment, setup.source)  # what it will need, before training

    def on_end(self, step: int, ema: Params, writer: Writer) -> str:
        setup = self._setup
        weights = Weights(ema, step, True, setup.config.train.ema_decay)
        results = evaluation.evaluate(
            setup.experiment, weights, setup.source, workdir=setup.workdir, engine=self._engine
        )
        scores: dict[str, float] = {}
        for result in results:
            count = result.protocol["num_samples"]
            about = f"{describe_guidance(result.protocol)} ({count:,} samples)"
            scores |= _named(result.metrics, about)
        writer.write_scores(step, scores, report.markdown(results))
        if len(results) > 1:
            drawn = np.asarray(pictures.rendered(report.plot(results)))
            writer.write_images(step, {"evaluation/scales": drawn})
        return report.report(results, setup.workdir)


def _named(scores: Mapping[str, float], about: str) -> dict[str, float]:
    """Scores by names for the logs: one for each score and way to sample."""
    return {f"evaluation/{name} {about}": value for name, value in scores.items()}


def callbacks(setup: Setup, engine: Engine, to_images: ToImages) -> Sequence[Callback]:
    """What `config.evaluation` asks of training; raises `InputError` if something is missing."""
    wanted = setup.config.evaluation
    found: list[Callback] = [DuringTraining(setup, engine)] if wanted.every else []
    return found + ([AtEnd(setup, engine)] if wanted.at_end else [])
