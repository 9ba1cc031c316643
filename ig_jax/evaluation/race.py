"""A race of guidance settings: how a budget of samples is divided over rounds, and who wins.

Pure of models and files: samples are drawn and measured by whoever calls.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ig_jax import console
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation.metrics import METRICS

# Of the full grid's samples, if the config names no budget.
SHARE = 0.3
# This many settings reach the last round (more if the budget lets all of them have all samples).
FINALISTS = 2
# By how much settings may fall from round to round, the gentlest first.
FACTORS = (2, 3, 4, 6, 8, 12, 16)


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of the race: how many settings run, and how many samples each has at its end."""

    settings: int
    samples: int


def cost(rounds: Sequence[Round], fresh: int) -> int:
    """Samples drawn in a race, each once, and `fresh` more to measure the winner again."""
    drawn, before = 0, 0
    for entry in rounds:
        drawn += entry.settings * (entry.samples - before)
        before = entry.samples
    return drawn + fresh


def plan_rounds(settings: int, num_samples: int, budget: int, batch_size: int) -> list[Round]:
    """Divides a budget of samples over rounds.

    Settings fall by a constant factor from round to round and samples grow geometrically. Of the
    plans that fit, the gentlest factor is taken, and then the most samples in the first round,
    whose verdict is the least certain.

    Args:
        settings: how many there are.
        num_samples: of each setting in the last round.
        budget: samples of all settings together, with `num_samples` fresh ones for the winner; 0
            for 30 % of the full grid's, or the least of a gentle plan where that is too little.
        batch_size: rounds end on multiples of it, since a started batch costs a whole one.

    Returns:
        The rounds. Raises `InputError` if even the cheapest plan costs more than the budget.
    """
    plans = [_plans(settings, num_samples, batch_size, factor) for factor in FACTORS]
    limit = budget or SHARE * settings * num_samples
    for rounds in itertools.chain(*plans):
        if cost(rounds, num_samples) <= limit:
            return rounds
    if not budget:
        return plans[0][-1]
    cheapest = min(cost(rounds, num_samples) for rounds in itertools.chain(*plans))
    raise InputError(
        f"config.sweep.budget is {budget} samples: {settings} settings with {num_samples} in the "
        f"last round need at least {cheapest} in batches of {batch_size} "
        "(lower config.sweep.num_samples or config.sampler.batch_size, or name fewer settings)"
    )


def _plans(settings: int, num_samples: int, batch_size: int, factor: int) -> list[list[Round]]:
    """All plans in which settings fall by a factor, from the most samples at first to the least."""
    alive = [settings]
    while alive[-1] > FINALISTS:
        alive.append(max(FINALISTS, math.ceil(alive[-1] / factor)))
    whole = range(num_samples // batch_size * batch_size, 0, -batch_size)
    # With one round there is nothing to grow.
    starts = (num_samples, *whole) if len(alive) > 1 else (num_samples,)
    return [_rounds(alive, start, num_samples, batch_size) for start in starts]


def _rounds(alive: Sequence[int], start: int, num_samples: int, batch_size: int) -> list[Round]:
    rounds: list[Round] = []
    for i, count in enumerate(alive):
        wanted = start * (num_samples / start) ** (i / max(len(alive) - 1, 1))
        whole = math.ceil(wanted / batch_size - 1e-9) * batch_size
        samples = min(whole, num_samples)
        # A round without new samples has nothing new to say.
        if not rounds or samples > rounds[-1].samples:
            rounds.append(Round(count, samples))
    return rounds


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one setting: values of every metric after each round it took part in."""

    guidance: GuidanceOptions
    samples: tuple[int, ...]
    values: tuple[dict[str, float], ...]


def race(
    settings: Sequence[GuidanceOptions],
    rounds: Sequence[Round],
    measure: Callable[[GuidanceOptions, int], dict[str, float]],
    metric: str,
    advance: console.Advance = lambda count=1, text="": None,
) -> list[Entry]:
    """Runs the rounds.

    Args:
        settings: those that start.
        rounds: of `plan_rounds`.
        measure: `measure(setting, samples)` gives the metrics of a setting's first samples.
        metric: the one that decides.
        advance: told of new samples.

    Returns:
        An entry for each setting, the best first: by the last round it reached, then its value.
    """
    entries = {setting: Entry(setting, (), ()) for setting in settings}
    alive, before, ranking = list(settings), 0, []
    for entry in rounds:
        ranking = alive[entry.settings :] + ranking
        alive = alive[: entry.settings]
        for setting in alive:
            values = measure(setting, entry.samples)
            old = entries[setting]
            entries[setting] = Entry(setting, (*old.samples, entry.samples), (*old.values, values))
            advance(entry.samples - before)
        alive.sort(key=lambda s: -METRICS[metric].better * entries[s].values[-1][metric])
        before = entry.samples
    return [entries[setting] for setting in alive + ranking]


def resamples(count: int, times: int, seed: int) -> Iterator[np.ndarray]:
    """Yields `times` draws (count,) with replacement from `count` rows; the same for a seed.

    The spread of a metric over them estimates its uncertainty. The mean of a Fréchet distance lies
    above its value, because a resampled covariance is noisier: take the value from the full set.
    """
    generator = np.random.default_rng(seed)
    for _ in range(times):
        yield generator.integers(count, size=count)
