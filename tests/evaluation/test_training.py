"""Evaluation as callbacks of the training loop."""

import types

import pytest

from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation import training
from ig_jax.storage.checkpoints import Score
from ig_jax.training.callbacks import Moment
from tests.common import tiny_config


@pytest.fixture
def setup():
    config = tiny_config()
    config.evaluation.update(every=4, at_end=True)
    return types.SimpleNamespace(config=config, experiment=0, source=1, workdir="there")


def test_nothing_is_evaluated_unasked(setup):
    setup.config.evaluation.update(every=0, at_end=False)
    assert list(training.callbacks(setup, None, None)) == []


def test_scores_during_training_are_written_and_rank_checkpoints(setup, monkeypatch):
    setup.config.evaluation.at_end = False
    scores = {"fid": 3.5, "recall": 0.5}

    class Evaluation:
        score_name = "fid-of-this-kind"

        def __init__(self, *given):
            assert given[:3] == (0, 1, "there")

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
    assert written == {4: {"evaluation/fid": 3.5, "evaluation/recall": 0.5}}
    scores = {}  # of samples that are not finite
    assert callback.on_due(moment) is None


def test_the_end_is_reported_of_the_trained_weights(setup, monkeypatch):
    setup.config.evaluation.every = 0
    checked = []
    monkeypatch.setattr(evaluation, "check", lambda *given: checked.append(given))
    monkeypatch.setattr(evaluation, "at_end", lambda _, weights, *rest: f"step {weights.step}")
    (callback,) = training.callbacks(setup, "engine", None)
    assert checked == [(0, 1)]  # before the first step
    assert callback.on_end(6, {}) == "step 6"
