"""Which label each sample gets; label i depends on (seed, i) alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from ig_jax.data import latents
from ig_jax.errors import InputError
from ig_jax.sections import LABELS
from ig_jax.streams import numpy_stream


def choose_labels(
    kind: str, indices: np.ndarray, num_classes: int, seed: int, classes: tuple[int, ...] = ()
) -> np.ndarray:
    """Labels of the samples with these indices; label i depends on (seed, i) alone.

    Args:
        kind: "random", "balanced" (0, 1, … in turn), or "given" (`classes` in turn).
        indices: (N,) sample indices.
        num_classes: number of classes; 0 (an unconditional model) gives label 0, its ∅.
        seed: of random labels.
        classes: labels for "given", each below `num_classes`.

    Returns:
        (N,) int32. Raises `InputError` for a label out of range.
    """
    if num_classes == 0:
        return np.zeros(len(indices), np.int32)
    if kind == "given":
        for label in classes:
            if not 0 <= label < num_classes:
                raise InputError(f"label {label} is out of range: expected 0…{num_classes - 1}")
        return np.asarray(classes, np.int32)[indices % len(classes)]
    if kind == "balanced":
        return (indices % num_classes).astype(np.int32)
    count = int(indices.max(initial=-1)) + 1
    labels = numpy_stream(seed, "labels").integers(num_classes, size=count)
    return labels[indices].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Gives every sample its label; see `choose_labels`."""

    kind: str
    num_classes: int
    seed: int
    classes: tuple[int, ...] = ()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Labels (N,) int32 of the samples with these indices (N,)."""
        return choose_labels(self.kind, indices, self.num_classes, self.seed, self.classes)

    def __str__(self) -> str:
        if self.num_classes == 0:
            return "none"
        return ",".join(map(str, self.classes)) if self.kind == "given" else self.kind


def label_rule(config: ConfigDict, class_names: tuple[str, ...]) -> LabelRule:
    """What `config.sampler.labels` asks for: random, balanced, or classes in turn.

    Raises:
        InputError: a class that the model does not have.
    """
    wanted, num_classes = config.sampler.labels, config.model.num_classes
    if wanted in LABELS:
        return LabelRule(wanted, num_classes, config.seed)
    if not num_classes:
        raise InputError(
            f"config.sampler.labels is {wanted!r}: expected random, this model is unconditional"
        )
    try:
        classes = latents.resolve_classes(wanted, class_names)
        rule = LabelRule("given", num_classes, config.seed, classes)
        rule(np.arange(1))  # refuses a label out of range
    except InputError as error:
        raise InputError(f"config.sampler.labels is {wanted!r}: {error}") from None
    return rule
