"""What `--mode=ablate` asks, as data: which networks are trained, what is compared, what is
expected beforehand, and by which rule an expectation held. Pure of models and files.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax.errors import InputError, check_choice
from ig_jax.evaluation.metrics import METRICS

# The training that the config itself describes; others are named changes of it.
MAIN = "main"
# Sections whose fields make another network, and those that only sample one differently.
_TRAINED, _SAMPLED = ("model", "data", "loss", "optimizer", "train"), ("guidance", "sampler")
# The field by which a training starts with the network of another one, named before it.
START = "train.init_from"

Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that a question compares: a row of its table.

    Attributes:
        name: what it is called.
        train: the training whose network draws.
        weak: the training whose network takes the auxiliary head's place, or "".
        changes: fields of `config.guidance` and `config.sampler`, by path.
        tune: values to choose from, by path; chosen for each seed by the other seeds.
        family: the line of the figure of quality against cost that it is on, or "".
    """

    name: str
    train: str = MAIN
    weak: str = ""
    changes: Changes = dataclasses.field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    family: str = ""

    def candidates(self) -> list[dict[str, Any]]:
        """All changes that it may stand for: every combination of the values to tune."""
        combinations = itertools.product(*self.tune.values())
        return [dict(self.changes) | dict(zip(self.tune, c, strict=True)) for c in combinations]


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What is expected of a question, stated before it is asked.

    Attributes:
        better, than: names of arms.
        by: by which share of the latter's value, at the least; below 0 it may be that much worse.
        since: where the expectation comes from.
        metric: of what; the config's first if empty.
    """

    better: str
    than: str
    by: float = 0.0
    since: str = ""
    metric: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question: arms that differ in one thing, and what is expected of them.

    Attributes:
        name: short, for files and figures.
        asks: in words.
        arms: what is compared.
        expect: what is expected.
    """

    name: str
    asks: str
    arms: tuple[Arm, ...]
    expect: tuple[Expectation, ...] = ()


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a config's dict; fields with a dot are changes of a config's fields."""
    names = [f.name for f in dataclasses.fields(kind)]
    changes = {k: v for k, v in values.items() if "." in k}
    plain = {k: v for k, v in values.items() if "." not in k}
    for name in plain:
        if name not in names:
            raise InputError(f"{where} has {name!r}: expected {', '.join(names)}")
    if changes:
        plain["changes"] = changes
    try:
        return kind(**plain)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def trainings(config: ConfigDict) -> dict[str, Changes]:
    """Name → changes of the config that it is trained with; raises `InputError`.

    One that starts with another's network names that training in `train.init_from`.
    """
    found: dict[str, Changes] = {MAIN: {}}
    for i, row in enumerate(config.ablation.trainings):
        changes = dict(row)
        name = changes.pop("name", "")
        where = f"config.ablation.trainings[{i}]"
        if not re.fullmatch(r"\w[\w.-]*", str(name)) or name in found:
            raise InputError(f"{where} has the name {name!r}: expected a new one of letters")
        _check_paths(where, changes, _TRAINED)
        if START in changes:
            check_choice(f"{where}: {START}", changes[START], found)
        found[name] = changes
    return found


def questions(config: ConfigDict) -> tuple[Question, ...]:
    """The questions of `config.ablation`, checked; raises `InputError` naming what is wrong."""
    known, found = trainings(config), []
    for i, row in enumerate(config.ablation.questions):
        where = f"config.ablation.questions[{i}]"
        parts = dict(row)
        arms = tuple(
            _build(Arm, arm, f"{where}.arms[{j}]") for j, arm in enumerate(parts.pop("arms", ()))
        )
        expect = tuple(
            _build(Expectation, e, f"{where}.expect[{j}]")
            for j, e in enumerate(parts.pop("expect", ()))
        )
        question = _build(Question, {**parts, "arms": arms, "expect": expect}, where)
        _check_question(question, where, known)
        found.append(question)
    if not found:
        raise InputError("config.ablation.questions is empty: expected at least one question")
    return tuple(found)


def _check_question(question: Question, where: str, known: Mapping[str, Changes]) -> None:
    names = [arm.name for arm in question.arms]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{where} has the arms {names}: expected some, of different names")
    for arm in question.arms:
        check_choice(f"{where}: train of {arm.name!r}", arm.train, known)
        if arm.weak:
            check_choice(f"{where}: weak of {arm.name!r}", arm.weak, known)
        _check_paths(f"{where}: {arm.name!r}", [*arm.changes, *arm.tune], _SAMPLED)
    for expectation in question.expect:
        for name in (expectation.better, expectation.than):
            check_choice(f"{where}: an arm expected of", name, names)
        if expectation.metric:
            check_choice(f"{where}: metric", expectation.metric, METRICS)


def _check_paths(where: str, paths: Sequence[str] | Changes, sections: Sequence[str]) -> None:
    for path in paths:
        config_lib.find_field(path)
        if path.partition(".")[0] not in sections:
            raise InputError(f"{where} has {path!r}: expected fields of {', '.join(sections)}")


# --- answers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Values:
    """What became of an arm: values by seed.

    Attributes:
        metrics: name → (seeds,) values.
        cost: forward passes of the main network per sample, (seeds,).
        chosen: the values that were tuned, a dict a seed.
    """

    metrics: Mapping[str, np.ndarray]
    cost: np.ndarray
    chosen: tuple[Changes, ...] = ()


def choose(values: np.ndarray, better: int) -> list[int]:
    """For each seed the candidate that is best on average over the other seeds.

    So a tuned arm gains nothing from the luck of the seed it is judged on. A single seed has no
    others and chooses for itself.

    Args:
        values: (candidates, seeds).
        better: 1 where higher is better, −1 where lower is.
    """
    seeds = values.shape[1]
    others = [values[:, [j for j in range(seeds) if j != i or seeds == 1]] for i in range(seeds)]
    return [int(np.argmax(better * part.mean(1))) for part in others]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an expectation.

    Attributes:
        expectation: what was stated.
        gain: (seeds,) by how much the one is better than the other, in shares of the other.
        word: held, not held or undecided.
    """

    expectation: Expectation
    gain: np.ndarray
    word: str

    @property
    def error(self) -> float:
        """Standard error of the mean gain over seeds."""
        return float(self.gain.std(ddof=1) / len(self.gain) ** 0.5) if len(self.gain) > 1 else 0.0


def judge(expectation: Expectation, values: Mapping[str, Values], metric: str) -> Verdict:
    """Held, if the mean gain lies above the stated one by more than two standard errors of the
    paired differences over seeds; not held, if below by more than two; undecided otherwise, or
    with one seed.

    Args:
        expectation: the statement.
        values: of the question's arms by name.
        metric: the config's first.
    """
    metric = expectation.metric or metric
    a, b = (values[name].metrics[metric] for name in (expectation.better, expectation.than))
    gain = METRICS[metric].better * (a - b) / np.maximum(np.abs(b), 1e-12)
    verdict = Verdict(expectation, gain, "undecided")
    beyond = gain.mean() - expectation.by
    if len(gain) > 1 and abs(beyond) > 2 * verdict.error:
        verdict = dataclasses.replace(verdict, word="held" if beyond > 0 else "not held")
    return verdict


def front(points: Sequence[tuple[float, float]], better: int = -1) -> Iterator[int]:
    """Yields the indices of (cost, value) points that no other beats at the same cost or less, by
    cost."""
    best = -np.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -better * points[i][1])):
        if better * points[i][1] > best:
            best = better * points[i][1]
            yield i
