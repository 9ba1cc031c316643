"""The laboratory: its questions as data, its verdicts, its stops, and what it writes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ig_jax import config as config_lib
from ig_jax.errors import InputError
from ig_jax.evaluation import ablate
from ig_jax.evaluation.questions import (
    Expectation,
    Values,
    choose,
    front,
    judge,
    questions,
    trainings,
)
from ig_jax.training import setup
from tests.evaluation.test_toy2d import small_config
from tests.test_configs import CONFIGS, load


def values(*fid, cost=8.0):
    return Values({"fid": np.array(fid)}, np.full(len(fid), cost))


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "better, than, by, word",
    [
        ((0.8, 0.9, 0.85), (1.0, 1.1, 1.05), 0.1, "held"),
        ((0.8, 0.9, 0.85), (1.0, 1.1, 1.05), 0.3, "not held"),
        ((1.0, 1.1, 1.05), (0.8, 0.9, 0.85), 0.0, "not held"),
        ((0.8, 1.2, 1.0), (1.0, 1.0, 1.0), 0.0, "undecided"),
        # Worse, but not by more than was allowed.
        ((1.04, 1.05, 1.06), (1.0, 1.0, 1.0), -0.1, "held"),
        # Seeds differ much, pairs do not: what is common to both is no uncertainty.
        ((0.9, 9.0, 90.0), (1.0, 10.0, 100.0), 0.05, "held"),
        ((0.1,), (1.0,), 0.0, "undecided"),
    ],
)
def test_verdicts_compare_pairs_of_seeds_with_what_was_stated(better, than, by, word):
    expectation = Expectation("a", "b", by)
    found = {"a": values(*better), "b": values(*than)}
    assert judge(expectation, found, "fid").word == word


def test_a_verdict_knows_which_way_a_metric_points():
    found = {
        name: Values({"label_accuracy": np.array(v)}, np.ones(3))
        for name, v in (("a", (0.9, 0.91, 0.92)), ("b", (0.8, 0.81, 0.82)))
    }
    expectation = Expectation("a", "b", 0.05, metric="label_accuracy")
    assert judge(expectation, found, "fid").word == "held"


def test_a_tuned_arm_is_judged_by_what_other_seeds_chose():
    # Each seed alone would take the candidate that is lucky there.
    lucky = np.array([[1.0, 9.0, 9.0], [9.0, 1.0, 9.0], [5.0, 5.0, 5.0]])
    assert choose(lucky, better=-1) == [1, 0, 0] or choose(lucky, better=-1) == [2, 2, 2]
    assert choose(np.array([[2.0], [1.0]]), better=-1) == [1]
    assert choose(np.array([[2.0, 2.0], [1.0, 1.0]]), better=1) == [0, 0]


def test_the_front_is_what_nothing_beats_at_its_cost():
    points = [(1, 9.0), (2, 5.0), (2, 6.0), (3, 7.0), (4, 1.0)]
    assert list(front(points)) == [0, 1, 4]


# --- questions as data --------------------------------------------------------------------------


def asking(config, **question):
    config.ablation.questions = ({"name": "q", "asks": "Is it?", **question},)
    return config


NO_SUCH_HEAD = {"guidance.ig_scale": 2.0, "guidance.ig_source": "auxiliary(head=1)"}


@pytest.mark.parametrize(
    "question, message",
    [
        ({"arms": ()}, r"questions\[0\] has the arms \[\]: expected some"),
        ({"arms": ({"name": "a"}, {"name": "a"})}, "expected some, of different names"),
        ({"arms": ({"nam": "a"},)}, r"questions\[0\].arms\[0\] has 'nam': expected name, train"),
        ({"arms": ({"name": "a", "train": "big"},)}, "train of 'a' is 'big': expected one of main"),
        ({"arms": ({"name": "a", "weak": "big"},)}, "weak of 'a' is 'big': expected one of main"),
        ({"arms": ({"name": "a", "guidance.w": 2},)}, "unknown config field config.guidance.w"),
        (
            {"arms": ({"name": "a", "model.width": 2},)},
            "'a' has 'model.width': expected fields of guidance, sampler",
        ),
        (
            {"arms": ({"name": "a"},), "expect": ({"better": "b", "than": "a"},)},
            "an arm expected of is 'b': expected one of a",
        ),
        (
            {"arms": ({"name": "a", "guidance.ig_interval": (0.9, 0.1)},)},
            r"guidance.ig_interval is \(0.9, 0.1\)",
        ),
        ({"arms": ({"name": "a", "guidance.ig_scale": "x"},)}, "guidance.ig_scale is 'x'"),
        (
            {"arms": (dict(name="a") | NO_SUCH_HEAD,)},
            "auxiliary head 1",
        ),
    ],
)
def test_a_wrong_question_is_refused_before_anything_is_written(tmp_path, question, message):
    config = asking(small_config(), **question)
    with pytest.raises(InputError, match=message):
        ablate.Laboratory(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_wrong_trainings_and_metrics_are_refused(tmp_path):
    config = small_config()
    with pytest.raises(InputError, match="config.ablation.questions is empty"):
        ablate.Laboratory(config, str(tmp_path))
    asking(config, arms=({"name": "a"},))
    config.ablation.metrics = ("fidd",)
    with pytest.raises(InputError, match="config.ablation.metrics is 'fidd': expected one of fid"):
        ablate.Laboratory(config, str(tmp_path))
    for row, message in (
        ({"name": "main"}, "has the name 'main': expected a new one"),
        ({"name": "../x"}, "has the name '../x'"),
        ({"name": "a", "guidance.ig_scale": 1.0}, "'guidance.ig_scale': expected fields of model"),
        ({"name": "a", "train.init_from": "a"}, "init_from is 'a': expected one of main"),
    ):
        config.ablation.trainings = (row,)
        with pytest.raises(InputError, match=message):
            trainings(config)


def test_the_digits_questions_fit_their_networks(tmp_path):
    config = load(next(path for path in CONFIGS if path.stem == "ablate_digits"))
    laboratory = ablate.Laboratory(config, str(tmp_path))
    asked = " ".join(question.asks for question in laboratory.questions)
    for word in ("λ", "ω", "Muon", "EMA", "Autoguidance", "heads", "forward passes", "rule"):
        assert word in asked
    # Stated with a source each; half the networks and more are shared between questions.
    assert all(e.since for q in laboratory.questions for e in q.expect)
    used = [arm.train for question in laboratory.questions for arm in question.arms]
    assert set(used) <= trainings(config).keys() and used.count("main") > len(used) / 3
    short = ablate.fast(config)
    assert short.train.num_steps == config.ablation.fast[1]
    assert short.sampler.batch_size == short.evaluation.num_samples < config.sampler.batch_size
    config_lib.validate(short)
    arms = [arm for question in questions(short) for arm in question.arms]
    assert max(len(arm.candidates()) for arm in arms) == 4  # two scales, two values each
    steps = {str(short.train.checkpoint_every * i) for i in (1, 2, 3)}
    older = {
        a.changes["guidance.weak_step"]
        for q in questions(short)
        for a in q.arms
        if a.weak == "main"
    }
    assert older and older <= steps
    assert not list(tmp_path.iterdir())


# --- from training to the report ----------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    config = small_config()
    config.train.update(checkpoint_every=4, validate_every=0)
    config.ablation.update(
        seeds=2,
        metrics=("fid", "outlier_rate"),
        trainings=(
            {"name": "small", "model.width": 8, "model.auxiliary_depth": 0},
            {
                "name": "own",
                "model.width": 8,
                "train.init_from": "small",
                "optimizer.trainable": "auxiliary_head",
                "data.name": "samples",
                "data.num_validation": 8,
            },
        ),
        questions=(
            {
                "name": "methods",
                "asks": "Which?",
                "arms": (
                    {"name": "none", "family": "none"},
                    {"name": "IG", "tune": {"guidance.ig_scale": (1.5, 3.0)}, "family": "IG"},
                    {"name": "CFG", "guidance.cfg_scale": 2.0, "family": "CFG"},
                    {
                        "name": "shallow",
                        "guidance.cfg_scale": 2.0,
                        "guidance.cfg_source": "shallow",
                    },
                    {"name": "Autoguidance", "guidance.ig_scale": 2.0, "weak": "small"},
                    {
                        "name": "older",
                        "guidance.ig_scale": 2.0,
                        "weak": "main",
                        "guidance.weak_step": "4",
                    },
                ),
                "expect": ({"better": "IG", "than": "none", "by": 0.01, "since": "a paper"},),
            },
            {
                "name": "plain",
                "asks": "And without | a head?",
                "arms": (
                    {"name": "small", "train": "small"},
                    {"name": "none"},
                    {"name": "own head", "train": "own"},
                    {"name": "own head, w = 2", "train": "own", "guidance.ig_scale": 2.0},
                ),
            },
        ),
    )
    return config


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ablation")
    return workdir, ablate.run(asked, str(workdir))


def test_the_report_has_a_table_a_question(finished):
    workdir, line = finished
    assert line.startswith("2 questions, expectations: ") and "ablation.md" in line
    text = (workdir / "ablation.md").read_text()
    assert text.count("### ") == 2 and "And without | a head?" in text
    assert "| IG is better than none by at least 1% | a paper | " in text
    assert any(f"*{word}*" in text for word in ("held", "not held", "undecided"))
    found = json.loads((workdir / "ablation.json").read_text())
    for arm in found["methods"].values():
        assert len(arm["metrics"]["fid"]) == len(arm["forward_passes"]) == 2
    # The same network on the same noise is the same number in both questions.
    assert found["methods"]["none"] == found["plain"]["none"]
    assert set(found["methods"]["IG"]["chosen"][0]) == {"guidance.ig_scale"}
    assert len({tuple(arm["metrics"]["fid"]) for arm in found["methods"].values()}) == 6
    # A head of its own changes nothing before it guides, and each seed's drew its own samples.
    same, guided = (found["plain"][f"own head{w}"]["metrics"] for w in ("", ", w = 2"))
    assert same == found["plain"]["small"]["metrics"] != guided
    assert {len(list((workdir / "trained" / f"own-{i}" / "own").iterdir())) for i in (0, 1)} == {2}
    for name in ("ablation.png", "pareto.png"):
        assert min(np.asarray(Image.open(workdir / name)).shape[:2]) > 100
        assert (workdir / name).stat().st_size < 300_000


def test_costs_count_forward_passes(finished):
    workdir, _ = finished
    found = json.loads((workdir / "ablation.json").read_text())
    cost = {name: arm["forward_passes"][0] for name, arm in found["methods"].items()}
    # Heun's 3 steps are 5 evaluations; the head sits after 1 of 2 blocks.
    assert cost["none"] == cost["IG"] == 5 and cost["CFG"] == cost["older"] == 10
    assert cost["shallow"] == 7.5 and 5 < cost["Autoguidance"] < 10


def test_what_is_done_is_not_done_again(asked, finished, tmp_path, monkeypatch):
    workdir, line = finished
    before = (workdir / "ablation.json").read_text()
    monkeypatch.setattr(ablate.training, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ablate, "make_engine", lambda *_: pytest.fail("drawn again"))
    assert ablate.run(asked, str(workdir)) == line
    assert (workdir / "ablation.json").read_text() == before


def test_seeds_share_the_programs_of_a_training(asked, tmp_path, monkeypatch):
    laboratory = ablate.Laboratory(asked, str(tmp_path))
    laboratory.train("small", 0)
    monkeypatch.setattr(setup, "make_programs", lambda *_: pytest.fail("made again"))
    laboratory.train("small", 1)
    first, second = (laboratory._model("small", seed)[1].params for seed in (0, 1))
    assert not np.array_equal(*(jax.tree.leaves(params)[0] for params in (first, second)))


def test_what_is_to_be_trained_is_compiled_by_another_thread(asked, tmp_path, caplog):
    laboratory = ablate.Laboratory(asked, str(tmp_path))
    jax.clear_caches()
    jax.config.update("jax_log_compiles", True)
    try:
        with laboratory.compiling_ahead():
            assert list(laboratory._compiling) == ["main", "small"]  # own samples are not drawn yet
            laboratory.train("main", 0)
            laboratory.train("small", 0)
    finally:
        jax.config.update("jax_log_compiles", False)
    for program in ("init", "train_step"):
        said = f"Finished XLA compilation of jit({program})"
        threads = [r.threadName for r in caplog.records if said in r.getMessage()]
        assert len(threads) == 2 and all(name.startswith("compiling") for name in threads)
    # Both have a second seed still.
    assert list(laboratory._to_train()) == ["main", "small"]
    laboratory.train("main", 1)
    assert list(laboratory._to_train()) == ["small"]


def test_what_another_thread_fails_at_is_said_where_it_is_needed(asked, tmp_path, monkeypatch):
    def fail(_):
        raise InputError("no such data")

    laboratory = ablate.Laboratory(asked, str(tmp_path))
    monkeypatch.setattr(ablate, "compile_ahead", fail)
    with pytest.raises(InputError, match="no such data"), laboratory.compiling_ahead():
        laboratory.train("main", 0)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_with_what_is_missing(asked, finished, tmp_path, monkeypatch):
    """One score is lost and one training unfinished: those alone are made again, as they were."""
    workdir, line = finished
    before = json.loads((workdir / "ablation.json").read_text())
    scores = sorted((workdir / "scores").iterdir())
    lost = scores[0]
    kept = lost.read_text()
    lost.unlink()
    drawn = []
    score = ablate.Laboratory._score
    monkeypatch.setattr(
        ablate.Laboratory, "_score", lambda self, d: drawn.append(d) or score(self, d)
    )
    assert ablate.run(asked, str(workdir)) == line
    assert len(drawn) == 1 and json.loads(lost.read_text()) == json.loads(kept)
    assert json.loads((workdir / "ablation.json").read_text()) == before


def test_another_config_in_the_same_workdir_is_refused(asked, finished):
    workdir, _ = finished
    other = asked.copy_and_resolve_references()
    other.model.width = 24
    with pytest.raises(InputError, match="holds checkpoints of another config: config.model.width"):
        ablate.run(other, str(workdir))
