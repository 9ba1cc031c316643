"""What a run writes about itself is what happened: its speed, its options, its steps."""

import dataclasses
import types

import numpy as np
import pytest

from ig_jax.data.source import DataSource
from ig_jax.errors import NotFiniteError
from ig_jax.training import logs, loop, run
from ig_jax.training import metrics as metrics_lib
from ig_jax.training.callbacks import Callback
from ig_jax.training.setup import Setup
from ig_jax.training.validation import Validation
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
    """What goes to the writers: scalars and pictures by step, and hyperparameters."""
    written = types.SimpleNamespace(scalars={}, images={}, hparams=[])

    class Writer:
        def write_scalars(self, step, scalars):
            written.scalars.setdefault(step, {}).update(scalars)

        def write_images(self, step, images):
            written.images.setdefault(step, {}).update(images)

        def close(self):
            pass

    def open_logs(config, workdir, first_step):
        written.hparams.append(logs.hyperparameters(config))
        return Writer()

    monkeypatch.setattr(loop, "open_logs", open_logs)
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


class Slow(Callback):
    """Pictures, say: due every third step, and as slow as they can be."""

    def __init__(self, clock):
        self.on_due = clock.taking(1000, lambda moment: None)

    def due(self, step, saving):
        return step % 3 == 0


def test_speed_is_that_of_the_steps_alone(clock, written, tmp_path, monkeypatch):
    """A step takes half a second; validation, pictures and saving take minutes."""
    config = tiny_config(log_every=1, validate_every=2, checkpoint_every=3)
    setup = Setup.from_config(config, tmp_path)
    monkeypatch.setattr(Validation, "loss", clock.taking(100, lambda self, params: 1.0))
    monkeypatch.setattr(DataSource, "facts", clock.taking(10_000, DataSource.facts))
    step = clock.taking(0.5, setup.programs.step)
    setup = dataclasses.replace(setup, programs=dataclasses.replace(setup.programs, step=step))
    loop.train(setup, [Validation(setup), Slow(clock)])
    speeds = [written.scalars[step] for step in range(1, 7)]
    assert [found["speed/steps_per_second"] for found in speeds] == [2.0] * 6
    assert [found["speed/images_per_second"] for found in speeds] == [64.0] * 6
    assert speeds[1]["validation/loss"] == 1.0 and "validation/loss" not in speeds[0]
    assert {"train/loss", "train/learning_rate", "train/gradient_norm"} < set(speeds[0])
    assert clock.now > 20_000


def test_a_continued_run_records_what_it_does_and_not_what_was_asked(written, tmp_path, caplog):
    ended = []

    class Evaluation(Callback):
        def on_end(self, step, ema, writer):
            ended.append(step)
            return "scored"

    def train(num_steps):
        config = tiny_config(num_steps=num_steps, validate_every=0, sample_every=3)
        return run.run(config, str(tmp_path), lambda *_: [Evaluation()])

    assert train(2) == "trained 2 steps; scored"
    assert train(3) == "trained 3 steps; scored"
    assert [found["train.num_steps"] for found in written.hparams] == [2, 3]
    assert train(1) == "trained 3 steps; scored"
    assert "nothing to train: config.train.num_steps is 1" in caplog.text
    assert ended == [2, 3, 3]
    assert [list(found) for found in written.images.values()] == [["samples/grid"]] * 2
    assert written.images[2]["samples/grid"].ndim == 3
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_0000002.png", "step_0000003.png"]


def test_the_last_line_and_the_grid_of_scales(written, tmp_path):
    config = tiny_config(num_steps=1, validate_every=0)
    line = run.run(config, str(tmp_path), lambda *_: [])
    assert line == f"trained 1 steps; checkpoints, samples and logs are in {tmp_path}"
    config.evaluation.at_end = True
    path = tmp_path / "samples" / "scales.png"
    assert run.run(config, str(tmp_path), lambda *_: []) == (
        f"trained 1 steps; the same noise at each: {path}"
    )
    assert path.exists() and written.images[1]["samples/scales"].shape[-1] == 3


def test_a_run_that_fails_before_its_first_checkpoint_promises_none(tmp_path):
    setup = Setup.from_config(tiny_config(), tmp_path)

    def poisoned(state, batch, key):
        return setup.programs.step(state, batch | {"x": batch["x"] * np.nan}, key)

    programs = dataclasses.replace(setup.programs, step=poisoned)
    message = "not finite at step 1.*; there is no checkpoint yet"
    with pytest.raises(NotFiniteError, match=message):
        loop.train(dataclasses.replace(setup, programs=programs))
