"""Points instead of pictures, all the way: training, its plots, sampling and evaluation."""

import json

import numpy as np
import pytest
from PIL import Image

from ig_jax.config import default_config
from ig_jax.data import toy2d
from ig_jax.errors import InputError
from ig_jax.evaluation import extractors, metrics, run, toy
from ig_jax.evaluation.ablate import Laboratory
from ig_jax.evaluation.questions import Values
from ig_jax.sampling import run as sampling
from ig_jax.training import run as training
from tests.common import tiny_config
from tests.test_configs import CONFIGS, load


def small_config():
    config = default_config("mlp", "s")
    config.model.update(width=16, depth=2, auxiliary_depth=1, channels=2, num_classes=2)
    config.data.update(name="toy2d", num_validation=512, autoencoder="")
    config.optimizer.learning_rate = 3e-3
    config.train.update(batch_size=64, num_steps=8, ema_decay=0.9, log_every=4)
    config.train.update(validate_every=8, sample_every=8, checkpoint_every=4)
    config.sampler.update(name="heun", num_steps=3, num_samples=64, batch_size=64)
    config.evaluation.update(num_samples=64, ig_scales=(0.0, 1.0))
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config of few steps, and the workdir that it was trained in."""
    config, workdir = small_config(), tmp_path_factory.mktemp("toy")
    training.train(config, str(workdir))
    return config, workdir


def test_a_training_plots_its_points(trained):
    picture = np.asarray(Image.open(trained[1] / "samples" / "step_0000008.png"))
    assert picture.ndim == 3 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10


def test_samples_are_points_in_one_file(trained):
    config, workdir = trained
    assert sampling.run(config, str(workdir)).startswith("64 samples of step 8: ")
    (folder,) = (path.parent for path in workdir.glob("samples/*/protocol.json"))
    assert sorted(path.name for path in folder.iterdir()) == [
        *("labels.txt", "protocol.json", "samples.npz", "samples.png")
    ]
    with np.load(folder / "samples.npz") as file:
        points = file["arr_0"]
    assert points.shape == (64, 2) and points.dtype == np.float32 and np.isfinite(points).all()
    labels = [line.split()[1:] for line in (folder / "labels.txt").read_text().splitlines()]
    assert {tuple(pair) for pair in labels} == {("0", "A"), ("1", "B")}


def test_evaluation_reads_the_true_distribution(trained, capsys):
    config, workdir = trained
    run.run(config, str(workdir))
    (file,) = (workdir / "evaluation").glob("step_*.json")
    results = json.loads(file.read_text())["results"]
    assert len(results) == 2
    for result in results:
        assert {"fid", "label_accuracy", "outlier_rate", "coverage"} <= set(result["metrics"])
        assert result["protocol"]["features"] == "toy2d" and not result["protocol"]["uint8"]
        assert result["protocol"]["resolution"] == "2" and "float32" in result["line"]
        assert result["metrics"]["outlier_rate"] > 0.3  # after eight steps
    assert "outliers" in capsys.readouterr().out


def test_outliers_and_coverage_of_the_data_themselves():
    points, labels = toy2d.tree().sample(8000, seed=7)
    found = extractors.TreeExtractor()(points)
    np.testing.assert_array_equal(found.pool, points)
    assert metrics.outlier_rate(found.joint) == pytest.approx(0.01, abs=0.005)
    assert metrics.coverage(found.joint) > 0.95
    assert metrics.label_accuracy(found.readings, labels) > 0.99
    # Far away is an outlier that covers nothing; half a branch's length of noise makes many.
    away = extractors.TreeExtractor()(np.full((5, 2), 9, np.float32))
    assert metrics.outlier_rate(away.joint) == 1 and metrics.coverage(away.joint) == 0
    noise = np.float32(0.05 * np.random.default_rng(0).normal(size=points.shape))
    assert metrics.outlier_rate(extractors.TreeExtractor()(points + noise).joint) > 0.2
    one = extractors.TreeExtractor()(np.repeat(points[:1], 50, axis=0))
    assert metrics.coverage(one.joint) == pytest.approx(1 / 254)
    with pytest.raises(InputError, match=r"points: shape \(3, 3\), expected \(N, 2\)"):
        extractors.TreeExtractor()(np.zeros((3, 3), np.float32))


def asking(config):
    """The toy's own question, of a small network."""
    toy_config = load(next(path for path in CONFIGS if path.stem == "toy2d_ig"))
    config.ablation.update(toy_config.ablation)
    config.guidance.update(toy_config.guidance)
    config.ablation.update(seeds=2, metrics=(*config.ablation.metrics, "fid"))
    config.ablation.trainings = (
        {"name": "smaller", "model.width": 8, "model.depth": 2, "model.auxiliary_depth": 0},
    )
    config.train.update(sample_every=0, validate_every=0)
    return config


def test_the_toy_needs_its_data_set_and_its_arms(tmp_path):
    with pytest.raises(InputError, match="config.data.name is 'digits': expected 'toy2d'"):
        toy.run(tiny_config(), str(tmp_path))
    config = asking(small_config())
    question, *_ = config.ablation.questions
    config.ablation.questions = ({"name": "q", "asks": "?", "arms": question["arms"][:1]},)
    with pytest.raises(InputError, match=r"questions\[0\] has no arm 'IG': --mode=toy needs it"):
        toy.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_data_score_as_the_truth_does():
    values = toy.of_data(4000, (0, 1)).metrics
    assert (abs(values["outlier_rate"] - 0.01) < 0.006).all()
    assert (values["label_accuracy"] > 0.99).all() and (values["coverage"] > 0.9).all()


def test_the_toys_figure_has_a_panel_for_each_method_and_one_of_paths():
    points, labels = toy2d.tree().sample(100, seed=2)
    titles = ["data", toy.PLAIN, "auxiliary head", "CFG", toy.GUIDED, "both", "Autoguidance"]
    rates = {"outlier_rate": (0.1, 0.2), "label_accuracy": (0.9, 1.0), "coverage": (0.5, 0.5)}
    values = Values({name: np.array(v) for name, v in rates.items()}, np.zeros(2))
    paths = {title: np.zeros((4, 3, 2)) for title in (toy.PLAIN, toy.GUIDED)}
    figure = toy.plot({t: (points, labels) for t in titles}, paths, dict.fromkeys(titles, values))
    named = [axes.get_title() for axes in figure.axes]
    assert named == [*titles, "paths from the same noise"]
    drawn = sum(len(c.get_offsets()) for c in figure.axes[0].collections if hasattr(c, "_sizes"))
    assert drawn >= 100
    assert "outliers 15.0% · wrong class 5.0%" in figure.axes[1].texts[0].get_text()


@pytest.mark.slow
def test_the_toy_from_training_to_the_figure(tmp_path, capsys):
    config = asking(small_config())
    names = [arm["name"] for arm in config.ablation.questions[0]["arms"]]
    line = toy.run(config, str(tmp_path))
    assert "toy2d.png" in line and "outliers" in line
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    found = json.loads((tmp_path / "ablation.json").read_text())["methods"]
    assert list(found) == names
    distances = {name: tuple(arm["metrics"]["fid"]) for name, arm in found.items()}
    # Methods differ on the same noise, and eight steps leave many outliers.
    assert len(set(distances.values())) == len(names)
    assert min(found["final head"]["metrics"]["outlier_rate"]) > 0.2
    assert np.asarray(Image.open(tmp_path / "toy2d.png")).shape[0] > 500


@pytest.mark.slow
def test_directions_of_the_toy(tmp_path):
    """Internal guidance lowers the outlier rate, and the auxiliary head alone raises it."""
    config = load(next(path for path in CONFIGS if path.stem == "toy2d_ig"))
    config.ablation.seeds = 1
    laboratory = Laboratory(config, str(tmp_path))
    arms = {arm.name: arm for arm in laboratory.questions[0].arms}
    rates = {
        name: laboratory.values(arms[name]).metrics["outlier_rate"][0]
        for name in ("auxiliary head", "final head", "IG")
    }
    assert rates["IG"] < 0.97 * rates["final head"] < 0.97 * rates["auxiliary head"]
