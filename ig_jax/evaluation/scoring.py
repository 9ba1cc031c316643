"""Scores: features of pictures, compared with a reference by the rows of `metrics.METRICS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ig_jax import console
from ig_jax import record as record_lib
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError
from ig_jax.evaluation import metrics
from ig_jax.evaluation.extractors import FeatureExtractor, open_extractor
from ig_jax.evaluation.features import IMAGES, FeatureSet
from ig_jax.evaluation.images import DataImages
from ig_jax.evaluation.metrics import METRICS, Metric
from ig_jax.evaluation.reference import OpenReference, open_reference
from ig_jax.evaluation.statistics import ReferenceStatistics
from ig_jax.experiment import Experiment, make_to_images
from ig_jax.paths import resolve

FOLDER = "evaluation"
# How the names of ADM's references of ImageNet begin, whatever the resolution.
ADM_IMAGENET = "VIRTUAL_imagenet"
# Of ImageNet's validation set at 256×256 (Yang et al. 2026, "FD-loss", arXiv 2604.28190).
REAL_FID = 1.68


def real_pictures(extractor: str, reference: str) -> str | None:
    """A line on what real pictures score, if that is known of these features and this reference."""
    if not (extractor.startswith("inception") and reference.startswith(ADM_IMAGENET)):
        return None
    return (
        f"the real validation pictures of ImageNet score FID {REAL_FID} against ADM's reference at "
        "256x256 (arXiv 2604.28190): samples below that are closer to the reference, not better "
        "than real"
    )


@dataclasses.dataclass(frozen=True)
class Opened:
    """What `config.evaluation` describes, checked but not computed.

    Attributes:
        extractor: what turns pictures into features.
        reference: what they are compared with.
        classes: whether the model is conditional, so that the labels asked for mean something.
    """

    extractor: FeatureExtractor
    reference: OpenReference
    classes: bool

    @property
    def metrics(self) -> dict[str, Metric]:
        """The rows of the table that the extractor's features suffice for."""
        given = {*self.extractor.gives, IMAGES}
        return {
            name: metric
            for name, metric in METRICS.items()
            if given.issuperset(metric.needs) and (self.classes or not metric.labels)
        }

    def rows(self) -> set[str]:
        """Which features the metrics read picture by picture, if the reference has its parts."""
        return {row for metric in self.metrics.values() for row in metric.rows}

    def check_count(self, count: int, what: str) -> None:
        """Raises `InputError` if `count` pictures are too few; the line starts with `what`."""
        found = self.reference.count
        for metric in self.metrics.values():
            if metric.reference == "features" and not self.reference.has_features:
                continue
            needs = f"expected at least {metric.least} for {metric.title}"
            if count < metric.least:
                raise InputError(f"{what} is {count}: {needs}")
            if metric.reference and found is not None and found < metric.least:
                raise InputError(f"the reference has {found} pictures: {needs}")

    def check_resolution(self, found: Sequence[int], expected: Sequence[int] | None = None) -> None:
        """Raises `InputError` if pictures (height, width) and the reference's differ in size."""
        expected = self.reference.resolution if expected is None else expected
        if expected is not None and tuple(expected) != tuple(found):
            raise InputError(
                f"samples are {found[0]}x{found[1]}: reference {self.reference.name} has "
                f"{expected[0]}x{expected[1]}, expected the same resolution"
            )

    def scorer(self) -> Scorer:
        """Computes the reference, or reads it from the cache."""
        return Scorer(self, self.reference.statistics())


def open_scorer(
    experiment: Experiment,
    source: DataSource | None,
    workdir: epath.PathLike | None = None,
) -> Opened:
    """Opens what `config.evaluation` describes: in a moment, and with every check that takes one.

    Args:
        experiment: the config and its parts.
        source: its data set; not needed if the config names a reference.
        workdir: reference statistics are cached in its folder `evaluation`, if given.

    Raises:
        InputError: missing or unfitting Inception weights or reference file.
    """
    config = experiment.config
    extractor = open_extractor(config, experiment.mesh)
    cache = None if workdir is None else resolve(workdir) / FOLDER
    data = None
    if not config.evaluation.reference:
        to_images = make_to_images(experiment, source)
        size = picture_size(experiment, source)
        data = DataImages(source, to_images, config.data.name, size)
    reference = open_reference(config.evaluation.reference, extractor, data, cache)
    return Opened(extractor, reference, experiment.spec.num_classes > 0)


def open_for_samples(
    experiment: Experiment,
    source: DataSource | None,
    counts: Mapping[str, int],
    workdir: epath.PathLike | None = None,
) -> Opened:
    """As `open_scorer`, checked against the samples that will be drawn.

    Args:
        experiment, source, workdir: as there.
        counts: config field → how many samples it asks for.

    Raises:
        InputError: also for too few samples, or a reference of another resolution.
    """
    opened = open_scorer(experiment, source, workdir)
    for field, count in counts.items():
        opened.check_count(count, f"config.{field}")
    if source is not None:
        opened.check_resolution(picture_size(experiment, source))
    return opened


def picture_size(experiment: Experiment, source: DataSource) -> tuple[int, int]:
    """(height, width) of the pictures that a model draws."""
    if source.autoencoder is None:
        return experiment.sample_shape[:2]
    return (experiment.config.data.image_size,) * 2


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Turns features of pictures into scores and their record.

    Attributes:
        opened: the extractor, and where the reference comes from.
        reference: what pictures are compared with.
    """

    opened: Opened
    reference: ReferenceStatistics

    @property
    def extractor(self) -> FeatureExtractor:
        """What turns pictures into features."""
        return self.opened.extractor

    @property
    def metrics(self) -> dict[str, Metric]:
        """The rows of the table that features and reference suffice for."""
        return {
            name: metric
            for name, metric in self.opened.metrics.items()
            if not metric.reference or getattr(self.reference, metric.reference) is not None
        }

    def rows(self, names: Collection[str] | None = None) -> set[str]:
        """Which features metrics (all, or those of these names) read picture by picture."""
        chosen = self.metrics if names is None else names
        return {row for name in chosen for row in METRICS[name].rows}

    def values(
        self, names: Collection[str], samples: FeatureSet, labels: np.ndarray | None
    ) -> dict[str, float]:
        """Computes metrics by name; those that need labels are left out where there are none."""
        found = {}
        for name in names:
            if labels is not None or not METRICS[name].labels:
                found[name] = float(METRICS[name].compute(samples, self.reference, labels))
        return found

    def score(
        self,
        samples: FeatureSet,
        labels: np.ndarray | None,
        names: Collection[str] | None = None,
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """Scores pictures against the reference.

        Args:
            samples: their features.
            labels: (N,) labels that were asked for, or None if unknown.
            names: by which metrics; by all if None.

        Returns:
            (values, notes): values by name of `METRICS`, and warnings.
        """
        self.opened.check_resolution(samples.shape[1:3], self.reference.metadata["resolution"])
        with console.stage("computing the scores"):
            values = self.values(self.metrics if names is None else names, samples, labels)
        return values, tuple(self.notes(samples.shape[0]))

    def notes(self, count: int) -> list[str]:
        """Warnings about the scores of `count` pictures."""
        counts = (count, self.reference.pool.count)
        found = [metrics.few_samples(n, self.extractor.width) for n in counts]
        missing: dict[str, list[str]] = {}
        for name, metric in self.opened.metrics.items():
            if name not in self.metrics:
                title = metric.title_for(self.extractor.name)
                missing.setdefault(metric.reference, []).append(title)
        for part, titles in missing.items():
            has = "neither features nor images" if part == "features" else f"no {part} statistics"
            found.append(f"no {', '.join(titles)}: the reference holds {has}")
        found.append(real_pictures(self.extractor.name, self.reference.metadata["name"]))
        return [note for note in found if note]

    def record(self, samples: FeatureSet, sampling: Mapping[str, Any] | None) -> dict[str, Any]:
        """The record of scores of `samples`; without one of their sampling its fields are None."""
        drawn = dict.fromkeys(record_lib.SAMPLING_FIELDS) if sampling is None else sampling
        about = self.reference.metadata
        return {
            **drawn,
            "num_samples": samples.shape[0],
            "samples": "drawn for this score",
            "samples_hash": samples.digest,
            "resolution": "x".join(map(str, samples.shape[1:3])),
            "features": self.extractor.name,
            "features_hash": self.extractor.fingerprint,
            "resize": self.extractor.resize,
            "uint8": len(samples.shape) == 4,
            "reference": about["name"],
            "reference_hash": about["hash"],
            "reference_count": about["count"],
            "versions": record_lib.versions(),
            "device": jax.devices()[0].device_kind,
        }
