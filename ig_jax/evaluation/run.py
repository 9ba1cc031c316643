"""`--mode=evaluate`: samples of a model, or pictures on disk, scored against a reference.

Settings are compared on the same noise and labels; every score is stored with its record.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, stops
from ig_jax import record as record_lib
from ig_jax.data.source import DataSource
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import NotFiniteError, Stopped
from ig_jax.evaluation import features, report, scoring
from ig_jax.evaluation import images as images_lib
from ig_jax.evaluation.features import FeatureSet
from ig_jax.evaluation.report import Result
from ig_jax.evaluation.scoring import Opened, Scorer
from ig_jax.experiment import Experiment, ToImages, make_to_images
from ig_jax.models.functional import Params
from ig_jax.parallel import hosts
from ig_jax.paths import resolve
from ig_jax.record import Weights
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import LabelRule, label_rule
from ig_jax.sampling.run import make_engine, open_weights, sampling_record
from ig_jax.storage import files
from ig_jax.storage.checkpoints import find_step
from ig_jax.training import logs

log = logging.getLogger("ig_jax")

# How long a sample set is: config field → number of samples.
_NUM_SAMPLES = "evaluation.num_samples"
_TRAIN_SAMPLES = "evaluation.train_samples"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Draws samples of one model's experiment and scores them.

    Attributes:
        experiment: the config and its parts.
        scorer: what the samples are scored with.
        engine: the compiled sampler.
        to_images: from model space to uint8 pictures.
    """

    experiment: Experiment
    scorer: Scorer
    engine: Engine
    to_images: ToImages

    @classmethod
    def create(
        cls,
        experiment: Experiment,
        source: DataSource,
        counts: Mapping[str, int],
        workdir: epath.PathLike | None = None,
        engine: Engine | None = None,
    ) -> Evaluator:
        """Builds the parts that a config describes; nothing is compiled for sampling yet.

        Args:
            experiment: the config and its parts.
            source: its data set; of facts alone if the config names a reference.
            counts: config field → how many samples it will ask for.
            workdir: reference statistics are cached in its folder `evaluation`, if given.
            engine: a sampler to share, which saves its compilation.

        Raises:
            InputError: missing or unfitting Inception weights, reference file or resolution; too
                few samples for a metric.
        """
        to_images = make_to_images(experiment, source)
        opened = scoring.open_for_samples(experiment, source, counts, workdir)
        engine = engine or make_engine(experiment)
        return cls(experiment, opened.scorer(), engine, to_images)

    def sample_features(
        self,
        params: Params,
        guidance: GuidanceOptions,
        indices: np.ndarray,
        labels: np.ndarray,
        seed: int,
        advance: console.Advance = lambda count=1, text="": None,
        rows: Collection[str] | None = None,
    ) -> FeatureSet:
        """Features of the samples with these indices and labels, (N,) each.

        `rows` are kept picture by picture: by default those that the metrics read. Raises
        `NotFiniteError`, on every process, if the model's samples are not finite; `Stopped` if
        training is asked to stop meanwhile.
        """
        where = f" at {record_lib.describe(guidance)}"
        rows = self.scorer.rows() if rows is None else rows
        accumulator = features.FeatureAccumulator(self.scorer.extractor, rows)
        terms = guidance.build(self.engine.weaker)
        for positions, x in self.engine.batches(params, terms, seed, indices, labels):
            problem = None
            try:
                if len(positions) > 0:
                    accumulator.add(positions, self.to_images(x, indices[positions], where))
            except NotFiniteError as error:
                problem = error
            # Agreed on, since a process that stopped alone would leave the others waiting.
            if hosts.anywhere(problem is not None):
                raise problem or NotFiniteError(f"another process: pictures{where} are not finite")
            if stops.asked():
                raise Stopped("stopped while evaluating")
            advance(len(positions) * jax.process_count())
        return accumulator.finish(len(indices))

    def result(
        self,
        weights: Weights,
        guidance: GuidanceOptions,
        rule: LabelRule,
        seed: int,
        count: int,
        advance: console.Advance = lambda count=1, text="": None,
        names: Collection[str] | None = None,
    ) -> Result:
        """The metrics (all, or those of these names) of a setting's first `count` samples, with
        their record."""
        indices, rows = np.arange(count), self.scorer.rows(names)
        labels = rule(indices)
        found = self.sample_features(weights.params, guidance, indices, labels, seed, advance, rows)
        scores, notes = self.scorer.score(found, labels, names)
        record = self.scorer.record(found, self.record(guidance, weights, rule, seed))
        return Result(scores, record, notes)

    def record(
        self, guidance: GuidanceOptions, weights: Weights, labels: LabelRule, seed: int
    ) -> dict[str, Any]:
        """The record of samples drawn so."""
        return sampling_record(
            self.experiment, self.engine, guidance, weights, labels, seed, self.to_images
        )


def guidances(config: ConfigDict) -> list[GuidanceOptions]:
    """The settings to score: the config's guidance at each of `evaluation.ig_scales`, if any."""
    scales = config.evaluation.ig_scales or (config.guidance.ig_scale,)
    return [GuidanceOptions.of(config.guidance, ig_scale=float(scale)) for scale in scales]


def evaluate(
    experiment: Experiment,
    weights: Weights,
    source: DataSource,
    *,
    workdir: epath.PathLike | None = None,
    engine: Engine | None = None,
) -> list[Result]:
    """Scores a model at each setting that the config lists, on the same noise and labels.

    Args:
        experiment: the config and its parts.
        weights: the network's parameters, on the mesh, and what is known of them.
        source: the data set.
        workdir: where reference statistics are cached; nothing else is written.
        engine: a sampler to share, which saves its compilation.

    Returns:
        A result for each of `guidances(config)`, the same on every process.

    Raises:
        InputError: before anything is compiled, unless samples turn out not to be finite.
    """
    config, settings = experiment.config, guidances(experiment.config)
    config_lib.check_guidance(config, settings)
    rule, count = label_rule(config, source.class_names), config.evaluation.num_samples
    evaluator = Evaluator.create(experiment, source, {_NUM_SAMPLES: count}, workdir, engine)
    with console.progress_bar(len(settings) * count, "evaluating") as advance:
        return [
            evaluator.result(weights, guidance, rule, config.seed, count, advance)
            for guidance in settings
        ]


class FileScores(NamedTuple):
    """What pictures on disk score, and what it takes to score them again.

    Attributes:
        result: the scores.
        pool: (N, width) pooled features.
        scorer: what they were scored with.
    """

    result: Result
    pool: np.ndarray
    scorer: Scorer


def score_files(
    experiment: Experiment, source: DataSource | None, workdir: epath.PathLike
) -> FileScores:
    """Scores the pictures that `config.evaluation.samples` names; raises `InputError`.

    The data set is needed only where the config names no reference. The record has what is known of
    the pictures' sampling (`--mode=sample` leaves it beside them, with a hash of the pictures that
    it is of), and else None.
    """
    images = images_lib.open_images(experiment.config.evaluation.samples)
    facts = images_lib.stored_facts(images.path, images.shape[0])
    opened = scoring.open_scorer(experiment, source, workdir)
    opened.check_count(images.shape[0], f"the number of pictures in {images.path}")
    opened.check_resolution(images.shape[1:3])
    # Before the reference is computed and kept: what is wrong with a picture shows first.
    rows, share = opened.rows() | {"pool"}, images_lib.share(images)
    found = features.extract(share, images.shape[0], opened.extractor, "sample features", rows)
    scorer = opened.scorer()
    facts, notes = facts.of(found.digest)
    scores, more = scorer.score(found, facts.labels)
    record = scorer.record(found, facts.record) | {"samples": str(images.path)}
    return FileScores(Result(scores, record, (*notes, *more)), found.rows["pool"], scorer)


def evaluate_files(
    experiment: Experiment, source: DataSource | None, workdir: epath.PathLike
) -> Result:
    """The result of `score_files`; raises `InputError`."""
    return score_files(experiment, source, workdir).result


def check(experiment: Experiment, source: DataSource) -> Opened:
    """Checks before training what `evaluate` will need when it is over.

    Args:
        experiment: the config and its parts.
        source: the data set.

    Raises:
        InputError: as `evaluate`, but for samples that are not finite.
    """
    config = experiment.config
    config_lib.check_guidance(config, guidances(config))
    label_rule(config, source.class_names)
    counts = {_NUM_SAMPLES: config.evaluation.num_samples}
    make_to_images(experiment, source)  # a missing autoencoder shows now
    return scoring.open_for_samples(experiment, source, counts)


class TrainingEvaluation:
    """Scores during training: `evaluation.train_samples` samples at the config's own guidance.

    Args:
        experiment: the config and its parts.
        source: its data set.
        workdir: where reference statistics are cached.
        engine: the loop's sampler.

    Attributes:
        score_name: of its FID, the same for two that may be compared: "fid-" and a hash of the
            record.
        about: guidance and number of samples in words.

    Raises:
        InputError: for a missing or unfitting file, at the start of the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: DataSource,
        workdir: epath.PathLike,
        engine: Engine | None = None,
    ):
        config = experiment.config
        self._guidance, self._seed = GuidanceOptions.of(config.guidance), config.seed
        self._rule = label_rule(config, source.class_names)
        self._indices = np.arange(config.evaluation.train_samples)
        counts = {_TRAIN_SAMPLES: len(self._indices)}
        self._evaluator = Evaluator.create(experiment, source, counts, workdir, engine)
        self._noted = False
        self.about = f"{record_lib.describe(self._guidance)} ({len(self._indices):,} samples)"
        self.score_name = f"fid-{self._record_hash()}"

    def _record_hash(self) -> str:
        """A short hash of what its scores depend on besides the weights."""
        scorer = self._evaluator.scorer
        any_weights = Weights({})
        record = self._evaluator.record(self._guidance, any_weights, self._rule, self._seed)
        record |= {
            "num_samples": len(self._indices),
            "features_hash": scorer.extractor.fingerprint,
            "reference_hash": scorer.reference.metadata["hash"],
        }
        return files.json_digest(record)[:8]

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns the scores of (EMA) parameters by name, "fid" among them, on every process.

        There are none, but a warning, where samples are not finite: training may yet mend that.
        """
        labels = self._rule(self._indices)
        try:
            found = self._evaluator.sample_features(
                params, self._guidance, self._indices, labels, self._seed
            )
        except NotFiniteError as error:
            log.warning("no evaluation during training: %s", error)
            return {}
        scores, notes = self._evaluator.scorer.score(found, labels)
        if notes and not self._noted:
            log.warning("evaluation during training: %s", "; ".join(notes))
            self._noted = True
        return scores


# How many times training had seen the data when it was scored, in the run's log.
EPOCHS = "evaluation/epochs"


def fid_log(workdir: epath.PathLike) -> list[tuple[float, float]]:
    """(epochs, FID) of every evaluation in a run's log, in order; empty if it has none."""
    found = []
    for scalars in logs.read_lines(resolve(workdir)):
        fid = [value for name, value in scalars.items() if name.startswith("evaluation/fid ")]
        if EPOCHS in scalars:
            found += [(scalars[EPOCHS], value) for value in fid if value is not None]
    return found


def epochs_to(log: Iterable[tuple[float, float]], target: float) -> float | None:
    """Epochs until the FID of `fid_log` was first at most `target`; None if it never was."""
    return next((epochs for epochs, fid in log if fid <= target), None)


def _with_speed(results: list[Result], targets: Sequence[float], workdir: str) -> list[Result]:
    """The results with what the run's log says of how fast it came to these FIDs."""
    if not targets:
        return results
    log = fid_log(workdir)
    found = {f"{k:g}": epochs_to(log, k) for k in targets}
    words = (f"{k}: {'not reached' if n is None else f'{n:g}'}" for k, n in found.items())
    note = f"epochs to FID ≤ k, by the evaluations of its training: {', '.join(words)}"
    if not log:
        note = "epochs to FID ≤ k are unknown: training had config.evaluation.every=0"
    protocol = {"epochs_to_fid": found}
    return [Result(r.metrics, r.protocol | protocol, (*r.notes, note)) for r in results]


def run(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    """`--mode=evaluate`: scores a workdir's checkpoint, or `config.evaluation.samples`.

    Writes results into `workdir/evaluation` and nothing else. `which` checkpoint is "last", "best"
    or a step. Returns the last line to print; raises `InputError`.
    """
    experiment = Experiment.from_config(config)
    if config.evaluation.samples:
        source = None if config.evaluation.reference else experiment.open_data()
        return report.report([evaluate_files(experiment, source, workdir)], workdir)
    step = find_step(workdir, which)
    weights = open_weights(experiment, workdir, step)
    source = open_source(experiment, workdir, step)
    results = evaluate(experiment, weights, source, workdir=workdir)
    targets = config.evaluation.fid_targets
    return report.report(_with_speed(results, targets, workdir), workdir)


def open_source(experiment: Experiment, workdir: str, step: int | str = "last") -> DataSource:
    """The data set, or its facts alone where a reference makes the pictures unnecessary."""
    if experiment.config.evaluation.reference:
        return experiment.open_facts(workdir, step)
    return experiment.open_data()
