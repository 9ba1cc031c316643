"""What a run writes about itself is what happened: its speed, its options, its steps."""

import types

import numpy as np
import pytest
from clu import metric_writers

from ig_jax.errors import InputError
from ig_jax.evaluation import run as evaluation
from ig_jax.training import loop
from ig_jax.training import metrics as metrics_lib
from tests.common import tiny_config


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def taking(self, seconds, function):
        def timed(*arguments):
            self.now += seconds
            return function(*arguments)

        return timed


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics_lib, "time", clock)
    return clock


@pytest.fixture
def written(monkeypatch):
    """What goes to the metric writer: scalars by step, and hyperparameters."""
    written = types.SimpleNamespace(scalars={}, hparams=[])

    class Writer:
        def write_scalars(self, step, scalars):
            written.scalars.setdefault(step, {}).update(scalars)

        def write_hparams(self, hparams):
            written.hparams.append(hparams)

        def close(self):
            pass

    monkeypatch.setattr(metric_writers, "create_default_writer", lambda *_, **__: Writer())
    return written


def test_the_clock_stands_still_beside_the_steps(clock):
    steps = metrics_lib.StepClock()
    clock.now += 3
    with steps.stopped(()):
        clock.now += 100
    clock.now += 1
    assert steps.lap() == 4
    with pytest.raises(KeyError), steps.stopped(()):
        clock.now += 100
        raise KeyError
    clock.now += 2
    assert steps.lap() == 2


def test_speed_is_that_of_the_steps_alone(clock, written, tmp_path):
    """A step takes half a second; validation, pictures and saving take minutes."""
    config = tiny_config(log_every=1, validate_every=2, sample_every=3, checkpoint_every=3)
    trainer = loop.Trainer(config, str(tmp_path))
    trainer._validation_loss = clock.taking(100, lambda params: 1.0)
    trainer._sample_grid = clock.taking(1000, lambda params, step: None)
    trainer.source = types.SimpleNamespace(
        train=trainer.source.train,
        validation=trainer.source.validation,
        facts=clock.taking(10_000, trainer.source.facts),
    )
    object.__setattr__(trainer.programs, "step", clock.taking(0.5, trainer.programs.step))
    trainer.run()
    assert [written.scalars[step]["steps_per_second"] for step in range(1, 7)] == [2.0] * 6
    assert [written.scalars[step]["images_per_second"] for step in range(1, 7)] == [64.0] * 6
    assert clock.now > 20_000


def test_a_continued_run_records_what_it_does_and_not_what_was_asked(
    written, tmp_path, monkeypatch, caplog
):
    evaluated = []
    monkeypatch.setattr(
        evaluation, "at_end", lambda *given: evaluated.append(given[1].step) or "scored"
    )
    monkeypatch.setattr(loop.Trainer, "sample_scales", lambda *_: "grid.png")
    config = tiny_config(num_steps=2, validate_every=0)
    config.evaluation.at_end = True
    assert loop.run(config, str(tmp_path)).startswith("trained 2 steps; scored")
    config.train.num_steps = 3
    assert loop.run(config, str(tmp_path)).startswith("trained 3 steps; scored")
    assert [found["train.num_steps"] for found in written.hparams] == [2, 3]
    config.train.num_steps = 1
    assert loop.run(config, str(tmp_path)).startswith("trained 3 steps; scored")
    assert "nothing to train: config.train.num_steps is 1" in caplog.text
    assert evaluated == [2, 3, 3]


def test_a_run_that_fails_before_its_first_checkpoint_promises_none(tmp_path):
    trainer = loop.Trainer(tiny_config(), str(tmp_path))
    step = trainer.programs.step

    def poisoned(state, batch, key):
        return step(state, batch | {"x": batch["x"] * np.nan}, key)

    object.__setattr__(trainer.programs, "step", poisoned)
    with pytest.raises(InputError, match="not finite at step 1: .*; there is no checkpoint yet"):
        trainer.run()
