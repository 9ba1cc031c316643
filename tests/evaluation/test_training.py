"""Evaluation as callbacks of the training loop."""

import types

import numpy as np
import pytest
from etils import epath

from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation import training
from ig_jax.evaluation.report import Result
from ig_jax.record import guidance_record
from ig_jax.storage.checkpoints import Score
from ig_jax.training import logs
from ig_jax.training.callbacks import Moment
from tests.common import tiny_config


@pytest.fixture
def setup():
    config = tiny_config()
    config.evaluation.update(every=4, at_end=True)
    source = types.SimpleNamespace(train=range(64))
    return types.SimpleNamespace(config=config, experiment=0, source=source, workdir="there")


def test_nothing_is_evaluated_unasked(setup):
    setup.config.evaluation.update(every=0, at_end=False)
    assert list(training.callbacks(setup, None, None)) == []


def test_scores_during_training_are_written_and_rank_checkpoints(setup, monkeypatch):
    setup.config.evaluation.at_end = False
    scores = {"fid": 3.5, "recall": 0.5}

    class Evaluation:
        score_name, about = "fid-of-this-kind", "IG 1.5 (64 samples)"

        def __init__(self, *given):
            assert given[:3] == (0, setup.source, "there")

        def __call__(self, params):
            assert params == "weights"
            return scores

    monkeypatch.setattr(evaluation, "TrainingEvaluation", Evaluation)
    callback = training.callbacks(setup, "engine", None)[0]
    assert callback.saves
    assert [step for step in range(1, 10) if callback.due(step, True)] == [4, 8]
    written = {}
    writer = types.SimpleNamespace(write_scalars=written.__setitem__)
    moment = Moment(4, types.SimpleNamespace(ema="weights"), None, writer)
    assert callback.on_due(moment) == Score("fid-of-this-kind", 3.5)
    # 4 batches of 32 of 64 examples.
    about, epochs = Evaluation.about, {"evaluation/epochs": 2.0}
    expected = {f"evaluation/fid {about}": 3.5, f"evaluation/recall {about}": 0.5} | epochs
    assert written == {4: expected}
    scores = {}  # of samples that are not finite
    assert callback.on_due(moment) is None


def test_epochs_to_a_fid_are_read_from_the_log(tmp_path):
    """Of a run that was stopped in the middle of a line and continued."""
    assert evaluation.fid_log(tmp_path) == []
    for first in (1, 3):
        writer = logs.Lines(epath.Path(tmp_path / logs.FILE), 10 * first - 9)
        for step in (first, first + 1):
            scores = {"evaluation/fid IG 1.5 (64 samples)": 8.0 / step}
            writer.write_scalars(10 * step, scores | {evaluation.EPOCHS: 0.5 * step})
            writer.write_scalars(10 * step + 1, {"loss": 1.0})
        with (tmp_path / logs.FILE).open("a") as file:
            file.write('{"step": 50, "evaluation/ep')
    log = evaluation.fid_log(tmp_path)
    np.testing.assert_allclose(log, [(0.5, 8), (1, 4), (1.5, 8 / 3), (2, 2)], rtol=1e-6)
    assert [evaluation.epochs_to(log, k) for k in (9, 4, 3.9, 1)] == [0.5, 1.0, 1.5, None]
    result = Result({"fid": 2.0}, {}, ("first",))
    (found,) = evaluation._with_speed([result], (4.0, 1.0), str(tmp_path))
    assert found.notes[1].endswith("of its training: 4: 1, 1: not reached")
    assert found.protocol == {"epochs_to_fid": {"4": 1.0, "1": None}}
    (unknown,) = evaluation._with_speed([result], (4.0,), str(tmp_path / "elsewhere"))
    assert "unknown: training had config.evaluation.every=0" in unknown.notes[1]
    assert evaluation._with_speed([result], (), str(tmp_path)) == [result]


def test_the_end_is_reported_of_the_trained_weights(setup, monkeypatch):
    setup.config.evaluation.every = 0
    checked = []
    monkeypatch.setattr(evaluation, "check", lambda *given: checked.append(given))

    def evaluate(experiment, weights, *_, **__):
        about = {"num_samples": 2000, "samples": None, "sampler": "heun", "checkpoint_step": 6}
        about |= {"labels": "random", "reference": "the data", "features": "inception"}
        return [
            Result({"fid": scale + weights.step}, guidance_record(GuidanceOptions(scale)) | about)
            for scale in (1.0, 1.5)
        ]

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(training.report, "report", lambda results, workdir: f"in {workdir}")
    (callback,) = training.callbacks(setup, "engine", None)
    assert checked == [(0, setup.source)]  # before the first step
    written, drawn = [], {}
    writer = types.SimpleNamespace(
        write_scores=lambda *given: written.append(given),
        write_images=lambda step, images: drawn.update(images),
    )
    assert callback.on_end(6, {}, writer) == "in there"
    [(step, scores, table)] = written
    named = {f"evaluation/fid IG {w} (2,000 samples)": value for w, value in ((1, 7.0), (1.5, 7.5))}
    assert (step, scores) == (6, named)
    assert table.splitlines() == [
        "2,000 samples of step 6 against the data",
        "",
        "| guidance | FID |",
        "| --- | --- |",
        "| IG 1 (no IG) | 7 |",
        "| IG 1.5 | 7.5 |",
    ]
    assert [(name, x.dtype, x.shape[2]) for name, x in drawn.items()] == [
        ("evaluation/scales", np.uint8, 3)
    ]
