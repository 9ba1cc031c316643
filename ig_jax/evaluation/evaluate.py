"""`--mode=evaluate`: samples of a model, or pictures on disk, scored against a reference.

Settings are compared on the same noise and labels; every score is stored with its protocol.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.convert import inception
from ig_jax.data.source import DataSource
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, NotFiniteError
from ig_jax.evaluation import metrics, protocol, sets
from ig_jax.evaluation.features import DigitsExtractor, FeatureExtractor, InceptionExtractor
from ig_jax.evaluation.protocol import Result
from ig_jax.evaluation.sets import SetFeatures
from ig_jax.evaluation.statistics import ReferenceStatistics
from ig_jax.experiment import Experiment, ToImages, make_to_images
from ig_jax.models.functional import Params
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import labels_for
from ig_jax.sampling.run import make_engine
from ig_jax.storage.checkpoints import Checkpoints

FOLDER = "evaluation"

log = logging.getLogger("ig_jax")


def make_extractor(config: ConfigDict, mesh: jax.sharding.Mesh) -> FeatureExtractor:
    """The extractor that `config.evaluation.features` names; "auto" goes by the data set.

    Raises:
        InputError: if Inception is wanted and its weights are missing or damaged.
    """
    name = config.evaluation.features
    if name == "auto":
        name = "digits" if config.data.name == "digits" else "inception"
    if name == "digits":
        return DigitsExtractor()
    # Pictures arrive in chunks; a larger batch would be filled up for nothing.
    batch_size = min(64 * len(mesh.local_devices), sets.CHUNK)
    path = config.evaluation.inception_path
    if not path:
        raise InputError(
            "config.evaluation.inception_path is empty: expected the Inception weights, "
            f"downloaded from {inception.URL}"
        )
    return InceptionExtractor.from_file(path, batch_size=batch_size, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Turns features of pictures into scores and their record.

    Attributes:
        extractor: what turns pictures into features.
        reference: what they are compared with.
        classes: whether pictures were asked for by class, so that reading them means something.
    """

    extractor: FeatureExtractor
    reference: ReferenceStatistics
    classes: bool

    @classmethod
    def create(
        cls,
        experiment: Experiment,
        source: DataSource | None,
        workdir: epath.PathLike | None = None,
        to_images: ToImages | None = None,
    ) -> Scorer:
        """Prepares what `config.evaluation` describes.

        Args:
            experiment: the config and its parts.
            source: its data set; not needed if the config names a reference.
            workdir: reference statistics are cached in its folder `evaluation`, if given.
            to_images: from model space to pictures, if it is there already.

        Raises:
            InputError: missing or unfitting Inception weights or reference file.
        """
        config = experiment.config
        extractor = make_extractor(config, experiment.mesh)
        cache = None if workdir is None else resolve(workdir) / FOLDER
        data = None
        if not config.evaluation.reference:
            to_images = to_images or make_to_images(experiment, source)
            data = sets.DataImages(source, to_images, config.data.name)
        reference = sets.open_reference(config.evaluation.reference, extractor, data, cache)
        return cls(extractor, reference, experiment.spec.num_classes > 0)

    def score(
        self, samples: SetFeatures, labels: np.ndarray | None
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """Scores pictures against the reference.

        Args:
            samples: their features.
            labels: (N,) labels that were asked for, or None if unknown.

        Returns:
            (metrics, notes): values by name of `protocol.METRICS`, and warnings.
        """
        reference = self.reference
        check_resolution(reference, samples.shape[1:3])
        counts = (samples.shape[0], reference.pool.count)
        few = (metrics.few_samples(count, self.extractor.width) for count in counts)
        notes = [note for note in few if note]
        with warnings.catch_warnings():  # it is among the notes
            warnings.simplefilter("ignore", metrics.FewSamplesWarning)
            found = {"fid": metrics.frechet_distance(samples.pool, reference.pool)}
            if samples.spatial is not None and reference.spatial is not None:
                found["sfid"] = metrics.frechet_distance(samples.spatial, reference.spatial)
        if self.is_inception:
            found["inception_score"] = metrics.inception_score(samples.probabilities)
        if reference.features is None:
            notes.append("no precision and recall: the reference holds neither features nor images")
        else:
            pair = metrics.precision_recall(reference.features, samples.features)
            found |= {"precision": pair.precision, "recall": pair.recall}
        if self.reads_labels and labels is not None:
            found["label_accuracy"] = label_accuracy(samples.probabilities, labels)
        return found, tuple(notes)

    @property
    def is_inception(self) -> bool:
        """Whether FID, sFID and Inception Score are what their names say."""
        return isinstance(self.extractor, InceptionExtractor)

    @property
    def reads_labels(self) -> bool:
        """Whether the extractor can tell the classes that were asked for."""
        return self.classes and isinstance(self.extractor, DigitsExtractor)

    def record(
        self, samples: SetFeatures, sampling_record: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The protocol of scores of `samples`; without a sampling record those fields are None."""
        drawn = sampling_record or dict.fromkeys(protocol.SAMPLING_FIELDS)
        about = self.reference.metadata
        return {
            **drawn,
            "num_samples": samples.shape[0],
            "samples": "drawn for this score",
            "samples_hash": samples.digest,
            "resolution": f"{samples.shape[1]}x{samples.shape[2]}",
            "features": self.extractor.name,
            "features_hash": self.extractor.fingerprint,
            "resize": "TF1 bilinear to 299x299" if self.is_inception else "none",
            "uint8": True,
            "reference": about["name"],
            "reference_hash": about["hash"],
            "reference_count": about["count"],
            "versions": protocol.versions(),
            "device": jax.devices()[0].device_kind,
        }


def label_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of (N, classes) readings that are the (N,) labels."""
    return float(np.mean(probabilities.argmax(1) == labels))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Draws samples of one model's experiment and scores them.

    Attributes:
        experiment: the config and its parts.
        source: the data set, or its facts.
        scorer: what the samples are scored with.
        engine: the compiled sampler.
        to_images: from model space to uint8 pictures.
    """

    experiment: Experiment
    source: DataSource
    scorer: Scorer
    engine: Engine
    to_images: ToImages

    @classmethod
    def create(
        cls,
        experiment: Experiment,
        source: DataSource,
        workdir: epath.PathLike | None = None,
        engine: Engine | None = None,
    ) -> Evaluator:
        """Builds the parts that a config describes; nothing is compiled for sampling yet.

        Args:
            experiment: the config and its parts.
            source: its data set; of facts alone if the config names a reference.
            workdir: reference statistics are cached in its folder `evaluation`, if given.
            engine: a sampler to share, which saves its compilation.

        Raises:
            InputError: missing or unfitting Inception weights, reference file or resolution.
        """
        to_images = make_to_images(experiment, source)
        scorer = Scorer.create(experiment, source, workdir, to_images)
        check_resolution(scorer.reference, picture_size(experiment, source))
        engine = engine or make_engine(experiment)
        return cls(experiment, source, scorer, engine, to_images)

    def sample_features(
        self,
        params: Params,
        guidance: GuidanceOptions,
        indices: np.ndarray,
        labels: np.ndarray,
        seed: int,
        advance: console.Advance = lambda count=1, text="": None,
    ) -> SetFeatures:
        """Features of the samples with these indices and labels, (N,) each.

        Raises:
            NotFiniteError: if the model's samples are not finite, on every process.
        """
        where = f" at {protocol.describe_guidance(protocol.guidance_record(guidance))}"
        accumulator = sets.FeatureAccumulator(self.scorer.extractor)
        terms = guidance.build(self.engine.weaker)
        for positions, x in self.engine.batches(params, terms, seed, indices, labels):
            problem = None
            try:
                if len(positions) > 0:
                    accumulator.add(positions, self.to_images(x, indices[positions], where))
            except NotFiniteError as error:
                problem = error
            # Agreed on, since a process that stopped alone would leave the others waiting.
            if sets.anywhere(problem is not None):
                raise problem or NotFiniteError(f"another process: pictures{where} are not finite")
            advance(len(positions) * jax.process_count())
        return accumulator.finish(len(indices))

    def weak_hash(self) -> str | None:
        """Hash of the weights of the network that replaces the auxiliary head, if there is one."""
        return (
            None if self.engine.weaker is None else protocol.weights_hash(self.engine.weaker.params)
        )


def check_resolution(reference: ReferenceStatistics, found: Sequence[int]) -> None:
    """Raises `InputError` if pictures (height, width) and the reference's differ in size."""
    expected = reference.metadata["resolution"]
    if expected is not None and tuple(expected) != tuple(found):
        raise InputError(
            f"samples are {found[0]}x{found[1]}: reference {reference.metadata['name']} has "
            f"{expected[0]}x{expected[1]}, expected the same resolution"
        )


def guidances(config: ConfigDict) -> list[GuidanceOptions]:
    """The settings to score: the config's guidance at each of `evaluation.ig_scales`, if any."""
    scales = config.evaluation.ig_scales or (config.guidance.ig_scale,)
    return [config_lib.guidance(config, ig_scale=float(scale)) for scale in scales]


def evaluate(
    experiment: Experiment,
    params: Params,
    source: DataSource,
    *,
    workdir: epath.PathLike | None = None,
    step: int | None = None,
    ema: bool = True,
    engine: Engine | None = None,
) -> list[Result]:
    """Scores a model at each setting that the config lists, on the same noise and labels.

    Args:
        experiment: the config and its parts.
        params: the network's parameters, on the mesh.
        source: the data set.
        workdir: where reference statistics are cached; nothing else is written.
        step: training step of `params`, for the record.
        ema: whether they are the EMA, for the record.
        engine: a sampler to share, which saves its compilation.

    Returns:
        A result for each of `guidances(config)`, the same on every process.

    Raises:
        InputError: before anything is compiled, unless samples turn out not to be finite.
    """
    config = experiment.config
    config_lib.check_guidance(config, guidances(config))
    evaluator = Evaluator.create(experiment, source, workdir, engine)
    indices = np.arange(config.evaluation.num_samples)
    labels = labels_for(config, indices, source.class_names)
    digest = protocol.weights_hash(params)
    weak = evaluator.weak_hash()
    results = []
    settings = guidances(config)
    with console.progress_bar(len(settings) * len(indices), "evaluating") as advance:
        for guidance in settings:
            found = evaluator.sample_features(
                params, guidance, indices, labels, config.seed, advance
            )
            drawn = protocol.sampling_record(
                config, guidance, step=step, weights=digest, ema=ema, weak=weak
            )
            scores, notes = evaluator.scorer.score(found, labels)
            results.append(Result(scores, evaluator.scorer.record(found, drawn), notes))
    return results


def evaluate_files(
    experiment: Experiment, source: DataSource | None, workdir: epath.PathLike
) -> Result:
    """Scores the pictures that `config.evaluation.samples` names.

    The data set is needed only where the config names no reference. The record has what is known of
    the pictures' sampling (`--mode=sample` leaves it beside them), and else None.
    """
    images = sets.open_images(experiment.config.evaluation.samples)
    labels, drawn = sets.stored_facts(images.path, images.shape[0])
    scorer = Scorer.create(experiment, source, workdir)
    check_resolution(scorer.reference, images.shape[1:3])
    found = sets.file_features(images, scorer.extractor, "sample features")
    scores, notes = scorer.score(found, labels)
    return Result(scores, scorer.record(found, drawn) | {"samples": str(images.path)}, notes)


def picture_size(experiment: Experiment, source: DataSource) -> tuple[int, int]:
    """(height, width) of the pictures that a model draws."""
    if source.autoencoder is None:
        return experiment.sample_shape[:2]
    return (experiment.config.data.image_size,) * 2


class TrainingEvaluation:
    """Scores during training: `evaluation.train_samples` samples at the config's own guidance.

    Args:
        experiment: the config and its parts.
        source: its data set.
        workdir: where reference statistics are cached.
        engine: the loop's sampler.

    Attributes:
        score_name: of its FID, the same for two that may be compared: "fid-" and a hash of the
            protocol.

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
        self._config = experiment.config
        self._evaluator = Evaluator.create(experiment, source, workdir, engine)
        self._indices = np.arange(self._config.evaluation.train_samples)
        self._labels = labels_for(self._config, self._indices, source.class_names)
        self._noted = False
        self.score_name = f"fid-{self._protocol_hash()}"

    def _protocol_hash(self) -> str:
        """A short hash of what its scores depend on besides the weights."""
        scorer = self._evaluator.scorer
        record = protocol.sampling_record(
            self._config,
            config_lib.guidance(self._config),
            step=None,
            weights="",
            ema=True,
            weak=self._evaluator.weak_hash(),
        )
        record |= {
            "num_samples": len(self._indices),
            "features_hash": scorer.extractor.fingerprint,
            "reference_hash": scorer.reference.metadata["hash"],
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns the scores of (EMA) parameters by name, "fid" among them, on every process.

        There are none, but a warning, where samples are not finite: training may yet mend that.
        """
        try:
            found = self._evaluator.sample_features(
                params,
                config_lib.guidance(self._config),
                self._indices,
                self._labels,
                self._config.seed,
            )
        except NotFiniteError as error:
            log.warning("no evaluation during training: %s", error)
            return {}
        scores, notes = self._evaluator.scorer.score(found, self._labels)
        if notes and not self._noted:
            log.warning("evaluation during training: %s", "; ".join(notes))
            self._noted = True
        return scores


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
    protocol.save(path, results)
    if len(results) == 1:
        return f"{protocol.line(results[0])}\nscores with their protocol: {path}"
    pictures.save_figure(folder / f"{stem}.png", plot(results))
    return f"scores with their protocol: {path}, and a plot: {stem}.png"


def print_results(results: Sequence[Result]) -> None:
    """Prints a table with a row for each result, and their notes."""
    first = results[0].protocol
    names = [name for name in protocol.METRICS if any(name in r.metrics for r in results)]
    titles = [metric_title(name, first) for name in names]
    rows = [
        [_setting(result.protocol), *(_cell(result, name) for name in names)] for result in results
    ]
    origin = first["samples"] if first["sampler"] is None else f"step {first['checkpoint_step']}"
    title = f"{first['num_samples']:,} samples of {origin} against {first['reference']}"
    console.print_table(title, ["guidance", *titles], rows)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"note: {note}")


def metric_title(name: str, record: dict[str, Any]) -> str:
    """What tables and plots call a metric; only Inception's Fréchet distance is called FID."""
    if name == "fid" and not protocol.is_fid(record):
        return "Fréchet distance"
    return protocol.METRICS[name][0]


def _cell(result: Result, name: str) -> str:
    value = result.metrics.get(name)
    return "" if value is None else f"{value:{protocol.METRICS[name][1]}}"


def _setting(record: dict[str, Any]) -> str:
    if record["ig_scale"] is None:
        return "unknown"
    words = protocol.describe_guidance(record)
    return words + {0: " (auxiliary head)", 1: " (no IG)"}.get(record["ig_scale"], "")


def _file_stem(results: Sequence[Result]) -> str:
    """A name of the step and of the protocol, so that other protocols' results stay."""
    records = [
        {k: v for k, v in r.protocol.items() if k not in ("versions", "device")} for r in results
    ]
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:6]
    step = records[0]["checkpoint_step"]
    name = "samples" if step is None else f"step_{step:07d}"
    return f"{name}-{digest}"


# Metrics that share a panel, and its axis label.
_PANELS = (
    (("fid", "sfid"), "distance (lower is better)"),
    (("inception_score",), "Inception Score"),
    (("precision", "recall", "label_accuracy"), "share of pictures"),
)


def plot(results: Sequence[Result]) -> Any:
    """A figure of every metric against the IG scale, a panel for each kind of unit."""
    results = sorted(results, key=lambda result: result.protocol["ig_scale"])
    record = results[0].protocol
    scales = [result.protocol["ig_scale"] for result in results]
    panels = [
        ([name for name in names if all(name in r.metrics for r in results)], label)
        for names, label in _PANELS
    ]
    panels = [(names, label) for names, label in panels if names]
    figure = pictures.make_figure(4.6 * len(panels), 3.6)
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (names, label) in zip(every_axes, panels, strict=True):
        for name, marker in zip(names, "os^", strict=False):
            values = [result.metrics[name] for result in results]
            axes.plot(scales, values, marker=marker, label=metric_title(name, record))
        axes.axvline(1, color="0.6", linestyle=":", label="no guidance (w = 1)")
        axes.set(xlabel="IG scale w", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{record['num_samples']:,} samples of step {record['checkpoint_step']}, "
        f"{record['sampler']}, labels {record['labels']}; reference: {record['reference']}",
        fontsize="medium",
    )
    return figure


def at_end(
    experiment: Experiment,
    params: Params,
    source: DataSource,
    workdir: epath.PathLike,
    step: int,
    engine: Engine | None = None,
) -> str:
    """Evaluates the EMA weights of a training step, prints and stores the scores, says where."""
    results = evaluate(experiment, params, source, workdir=workdir, step=step, engine=engine)
    return report(results, workdir)


def run(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    """`--mode=evaluate`: scores a workdir's checkpoint, or `config.evaluation.samples`.

    Writes results into `workdir/evaluation` and nothing else. `which` checkpoint is "last", "best"
    or a step. Returns the last line to print; raises `InputError`.
    """
    experiment = Experiment.from_config(config)
    if config.evaluation.samples:
        source = None if config.evaluation.reference else experiment.open_data()
        return report([evaluate_files(experiment, source, workdir)], workdir)
    params, step = load_weights(experiment, workdir, which)
    source = open_source(experiment, workdir, step)
    ema = config.sampler.ema
    results = evaluate(experiment, params, source, workdir=workdir, step=step, ema=ema)
    return report(results, workdir)


def open_source(experiment: Experiment, workdir: str, step: int | str = "last") -> DataSource:
    """The data set, or its facts alone where a reference makes the pictures unnecessary."""
    if experiment.config.evaluation.reference:
        return experiment.open_facts(workdir, step)
    return experiment.open_data()


def load_weights(
    experiment: Experiment, workdir: epath.PathLike, which: int | str = "last"
) -> tuple[Params, int]:
    """A checkpoint's weights (EMA or raw, as `sampler.ema` says) and their step."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step(which)
    params = checkpoints.weights(
        experiment.abstract_params(), step, ema=experiment.config.sampler.ema
    )
    checkpoints.close()
    return params, step
