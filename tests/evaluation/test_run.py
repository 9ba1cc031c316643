"""Evaluation from end to end on a tiny model: routes, devices, records, and bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ig_jax import record
from ig_jax.convert.inception import inception_params
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, NotFiniteError
from ig_jax.evaluation import extractors, metrics, report, scoring, statistics
from ig_jax.evaluation import images as images_lib
from ig_jax.evaluation import reference as reference_lib
from ig_jax.evaluation import run as evaluation
from ig_jax.evaluation.extractors import DigitsExtractor, InceptionExtractor, digits_images
from ig_jax.evaluation.reference import open_reference
from ig_jax.experiment import Experiment, make_to_images
from ig_jax.record import Weights
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import make_engine, open_weights
from ig_jax.storage import weight_files
from tests.common import golden, seeded_weights
from tests.evaluation.common import STEP, on_one_device, save_checkpoint, tiny_config, tiny_params

ROOT = pathlib.Path(__file__).parents[2]
GUIDANCE = 2  # of the results: IG scale 2
# Fields of a score's record that are not of its sampling.
ABOUT_SCORES = (
    *("num_samples", "samples", "samples_hash", "resolution", "features", "features_hash"),
    *("resize", "uint8", "reference", "reference_hash", "reference_count", "versions", "device"),
)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.from_config(tiny_config())


@pytest.fixture(scope="module")
def source(experiment):
    return experiment.open_data()


@pytest.fixture(scope="module")
def params(experiment):
    return tiny_params(experiment)


@pytest.fixture(scope="module")
def workdir(experiment, params, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("workdir")
    save_checkpoint(experiment, params, folder)
    return folder


@pytest.fixture(scope="module")
def weights(experiment, params):
    return Weights(params, STEP, True, experiment.config.train.ema_decay)


@pytest.fixture(scope="module")
def results(experiment, weights, source, workdir):
    return evaluation.evaluate(experiment, weights, source, workdir=workdir)


@pytest.fixture(scope="module")
def pictures(experiment, params, source) -> tuple[np.ndarray, np.ndarray]:
    """The samples of IG scale 2, and their labels, drawn by themselves."""
    config = experiment.config
    indices = np.arange(config.evaluation.num_samples)
    labels = label_rule(config, source.class_names)(indices)
    guidance = GuidanceOptions.of(config.guidance, ig_scale=2.0).build()
    x = make_engine(experiment).draw(params, guidance, config.seed, indices, labels)
    return make_to_images(experiment, source)(x), labels


def with_evaluation(experiment: Experiment, **fields) -> Experiment:
    config = copy.deepcopy(experiment.config)
    config.evaluation.update(fields)
    return Experiment.from_config(config)


def score_file(experiment, source, path, folder, **fields) -> report.Result:
    changed = with_evaluation(experiment, samples=str(path), **fields)
    return evaluation.evaluate_files(changed, source, folder)


class TestDirect:
    def test_metrics_are_those_of_the_pictures(self, results, pictures):
        """From the definitions: the real set, the samples, and the library's functions."""
        images, labels = pictures
        extractor = DigitsExtractor()
        real, drawn = extractor(digits_images()[0]).pool, extractor(images)
        found = results[GUIDANCE].metrics
        assert set(found) == {"fid", "kid", "mind", "precision", "recall", "label_accuracy"}
        moments = [statistics.gaussian_statistics(f) for f in (drawn.pool, real)]
        assert found["fid"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-6)
        assert found["kid"] == pytest.approx(metrics.kid(drawn.pool, real), rel=1e-6)
        assert found["mind"] == pytest.approx(metrics.mind(drawn.pool, real), rel=1e-6)
        pair = metrics.precision_recall(real, drawn.pool)
        assert (found["precision"], found["recall"]) == (pair.precision, pair.recall)
        read = drawn.readings.argmax(1)
        assert found["label_accuracy"] == np.mean(read == labels)

    def test_a_setting_for_each_scale(self, results):
        assert [r.protocol["ig_scale"] for r in results] == [0, 1, 2]
        assert len({r.metrics["fid"] for r in results}) == 3
        assert len({r.protocol["samples_hash"] for r in results}) == 3

    def test_the_configs_guidance_where_no_scales_are_listed(self, experiment):
        config = copy.deepcopy(experiment.config)
        config.evaluation.ig_scales = ()
        config.guidance.update(ig_scale=1.3, cfg_scale=1.2, cfg_interval=(0.1, 0.8))
        assert evaluation.guidances(config) == [GuidanceOptions.of(config.guidance)]

    def test_eight_devices_equal_one(self, experiment, source, results):
        assert experiment.mesh.size == 8
        one = on_one_device(experiment)
        alone = evaluation.evaluate(one, Weights(tiny_params(one), STEP), source)
        for a, b in zip(results, alone, strict=True):
            # A pixel may round the other way, where devices sum in another order.
            assert a.metrics["fid"] == pytest.approx(b.metrics["fid"], rel=1e-3)
            assert a.metrics["label_accuracy"] == pytest.approx(b.metrics["label_accuracy"])
            assert a.protocol["weights_hash"] == b.protocol["weights_hash"]

    def test_run_writes_results_only(self, experiment, workdir, results, capsys):
        before = {path for path in workdir.rglob("*")}
        line = evaluation.run(experiment.config, str(workdir))
        new = [path for path in workdir.rglob("*") if path not in before]
        assert {path.suffix for path in new} == {".json", ".png"}
        assert all(path.parent == workdir / "evaluation" for path in new)
        stored = report.load(next(path for path in new if path.suffix == ".json"))
        assert [r.metrics for r in stored] == [r.metrics for r in results]
        assert stored[0].protocol == results[0].protocol
        printed = capsys.readouterr().out
        for word in ("IG 2", "Fréchet distance", "precision", "recall", "label accuracy"):
            assert word in printed
        assert new[0].stem in line

    def test_raw_weights(self, experiment, workdir):
        config = copy.deepcopy(experiment.config)
        config.sampler.ema = False
        raw = open_weights(Experiment.from_config(config), workdir)
        ema = open_weights(experiment, workdir)
        assert raw.step == ema.step == STEP
        assert raw.hash != ema.hash and raw.record()["weights"] == "raw"

    def test_a_record_is_of_what_was_loaded_not_of_the_config_beside_it(self, experiment, workdir):
        """Overrides change neither which average the checkpoint holds nor its step."""
        config = copy.deepcopy(experiment.config)
        config.train.update(ema_decay=0.5, num_steps=123)
        made = open_weights(Experiment.from_config(config), workdir).record()
        assert made["weights"] == f"EMA {experiment.config.train.ema_decay:g}" != "EMA 0.5"
        assert made["checkpoint_step"] == STEP

    def test_plot_has_axes_units_and_legend(self, results):
        figure = report.plot(results)
        assert len(figure.axes) == 4
        for axes in figure.axes:
            assert axes.get_xlabel() == "IG scale w" and axes.get_ylabel()
            assert axes.get_legend() is not None

    def test_a_metric_from_outside(self, experiment, source, params, monkeypatch, tmp_path):
        """A row of the table is all that evaluation, also during training, needs."""
        spread = metrics.Metric(
            "spread",
            lambda samples, reference, labels: samples.rows["pool"].std() / len(set(labels)),
            rows=("pool",),
            labels=True,
            unit="spread of features",
        )
        monkeypatch.setitem(metrics.METRICS, "spread", spread)
        wanted = with_evaluation(experiment, num_samples=96, ig_scales=(1.0,))
        (result,) = evaluation.evaluate(wanted, Weights(params), source)
        assert result.metrics["spread"] > 0
        during = evaluation.TrainingEvaluation(wanted, source, tmp_path)
        assert during(params)["spread"] == result.metrics["spread"]
        report.save(tmp_path / "x.json", [result])
        monkeypatch.delitem(metrics.METRICS, "spread")
        # A stored result can be read where nobody knows the metric.
        assert f"spread {result.metrics['spread']:.4g}" in report.line(
            report.load(tmp_path / "x.json")[0]
        )

    def test_few_samples_are_noted(self, experiment, source, params):
        few = with_evaluation(experiment, num_samples=48, ig_scales=(1.0,))
        (result,) = evaluation.evaluate(few, Weights(params), source)
        assert "48 samples with 64 features" in result.notes[0]

    def test_during_training(self, experiment, source, params, tmp_path):
        engine = make_engine(experiment)
        during = evaluation.TrainingEvaluation(experiment, source, tmp_path, engine)
        scores = during(params)
        assert during(params) == scores
        small = with_evaluation(experiment, num_samples=96, ig_scales=())
        (result,) = evaluation.evaluate(small, Weights(params), source)
        assert scores == result.metrics and "fid" in scores
        # A score's name is that of other runs' scores where the protocol is the same, only there.
        fewer = with_evaluation(experiment, train_samples=64)
        names = [
            evaluation.TrainingEvaluation(e, source, tmp_path, engine).score_name
            for e in (experiment, small, fewer)
        ]
        assert names[0] == names[1] == during.score_name != names[2]

    def test_not_finite(self, experiment, source, params, tmp_path):
        broken = {**params, "position": params["position"] * np.nan}
        with pytest.raises(NotFiniteError, match="64 of 64 pictures at IG 0 are not finite"):
            evaluation.evaluate(experiment, Weights(broken), source)
        # Training goes on: it may yet mend that.
        assert evaluation.TrainingEvaluation(experiment, source, tmp_path)(broken) == {}


class TestFiles:
    @pytest.fixture
    def folder(self, pictures, results, tmp_path) -> pathlib.Path:
        """What `--mode=sample` leaves: an .npz, PNGs, labels and the protocol."""
        images, labels = pictures
        np.savez(tmp_path / "samples.npz", images)
        (tmp_path / "images").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{i}.png")
        text = "\n".join(f"{i:06d} {label} {label}" for i, label in enumerate(labels))
        (tmp_path / "labels.txt").write_text(text + "\n")
        direct = results[GUIDANCE].protocol
        made = {k: v for k, v in direct.items() if k not in ABOUT_SCORES}
        digest = direct["samples_hash"]
        record.save_sampling(tmp_path / "protocol.json", made, len(images), digest)
        return tmp_path

    @pytest.mark.parametrize("name", ["samples.npz", "images", "."])
    def test_equal_the_direct_route_exactly(self, experiment, source, folder, results, name):
        found = score_file(experiment, source, folder / name, folder)
        direct = results[GUIDANCE]
        assert found.metrics == direct.metrics
        scored = folder / ("samples.npz" if name == "." else name)
        assert found.protocol == direct.protocol | {"samples": str(scored)}

    def test_the_folder_that_sampling_wrote(self, folder, pictures):
        """As the samples of a score and as its reference; its grid is no sample."""
        Image.new("RGB", (99, 99)).save(folder / "samples.png")
        opened = images_lib.open_images(folder)
        np.testing.assert_array_equal(np.concatenate(list(opened.chunks(50))), pictures[0])
        facts = images_lib.stored_facts(opened.path, len(pictures[0]))
        np.testing.assert_array_equal(facts.labels, pictures[1])
        assert facts.record["checkpoint_step"] == STEP
        reference = open_reference(str(folder), DigitsExtractor(), None, None)
        assert reference.count == len(pictures[0])
        assert reference.statistics().metadata["count"] == len(pictures[0])
        (folder / "samples.npz").unlink()
        assert images_lib.open_images(folder).path == folder / "images"

    def test_pictures_that_are_no_png_are_named(self, folder, caplog):
        (folder / "images" / "preview.JPG").write_bytes(b"")
        images_lib.open_images(folder / "images")
        assert "1 pictures that are no PNG, such as preview.JPG, are not scored" in caplog.text
        for file in (folder / "images").glob("*.png"):
            file.unlink()
        with pytest.raises(InputError, match="no .png files, only others such as preview.JPG"):
            images_lib.open_images(folder / "images")

    def test_unknown_origin(self, experiment, source, folder):
        (folder / "labels.txt").unlink()
        (folder / "protocol.json").unlink()
        found = score_file(experiment, source, folder / "samples.npz", folder)
        assert "label_accuracy" not in found.metrics
        assert found.protocol["sampler"] is None
        assert "sampling unknown" in report.line(found)

    def test_facts_of_another_number_of_pictures_are_ignored(self, folder, pictures):
        images, labels = pictures
        facts = images_lib.stored_facts(folder / "samples.npz", len(images))
        np.testing.assert_array_equal(facts.labels, labels)
        assert facts.record["checkpoint_step"] == STEP
        facts = images_lib.stored_facts(folder / "samples.npz", len(images) - 1)
        assert facts == images_lib.StoredFacts()

    def test_facts_of_other_pictures_are_ignored(self, experiment, source, folder, pictures):
        """As many pictures, but not those that the record beside them is of."""
        np.savez(folder / "samples.npz", pictures[0][::-1])
        found = score_file(experiment, source, folder / "samples.npz", folder)
        assert found.protocol["sampler"] is None and found.protocol["seed"] is None
        assert "label_accuracy" not in found.metrics
        assert "not those that protocol.json beside them is of" in found.notes[0]

    def test_natural_order(self, folder, pictures):
        opened = images_lib.open_images(folder / "images")
        assert [file.name for file in opened.files[:3]] == ["0.png", "1.png", "2.png"]
        np.testing.assert_array_equal(np.concatenate(list(opened.chunks(50))), pictures[0])


class TestReference:
    @pytest.fixture(scope="class")
    def extractor(self):
        return DigitsExtractor()

    @pytest.fixture
    def data(self, experiment, source):
        return images_lib.DataImages(source, make_to_images(experiment, source), "digits", (8, 8))

    def test_the_data_set_is_all_of_it(self, extractor, data, tmp_path):
        found = open_reference("", extractor, data, tmp_path).statistics()
        assert found.metadata["count"] == 1797 and found.metadata["resolution"] == [8, 8]
        expected = statistics.gaussian_statistics(extractor(digits_images()[0]).pool)
        np.testing.assert_allclose(found.pool.covariance, expected.covariance, atol=1e-9)
        assert found.features.shape == (1797, 64)

    def test_cache(self, extractor, data, tmp_path, monkeypatch):
        first = open_reference("", extractor, data, tmp_path).statistics()
        monkeypatch.setattr(images_lib.DataImages, "share", None)  # computing again would fail
        again = open_reference("", extractor, data, tmp_path).statistics()
        np.testing.assert_array_equal(first.pool.mean, again.pool.mean)
        assert first.metadata == again.metadata
        other = DigitsExtractor(seed=1)
        with pytest.raises(TypeError):
            open_reference("", other, data, tmp_path).statistics()

    def test_another_decoder_is_another_reference(self, experiment, source, data):
        """Also where it has the same name."""
        to_images = make_to_images(experiment, source)
        other = dataclasses.replace(to_images, autoencoder_hash="ab")
        others = images_lib.DataImages(source, other, "digits", (8, 8))
        assert others.fingerprint() != data.fingerprint()

    def test_a_damaged_cache_is_made_again(self, extractor, data, tmp_path, caplog):
        first = open_reference("", extractor, data, tmp_path).statistics()
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2]):
            file.write_bytes(damaged)
            again = open_reference("", extractor, data, tmp_path).statistics()
            np.testing.assert_array_equal(first.features, again.features)
            assert "computing it again" in caplog.text
            caplog.clear()
        open_reference("", extractor, data, tmp_path).statistics()
        assert not caplog.text

    def test_statistics_and_images_give_the_same(self, extractor, data, tmp_path):
        """Our statistics file, ADM's layout (moments and images), and images alone."""
        images, _ = digits_images()
        ours = open_reference("", extractor, data, tmp_path / "cache").statistics()
        statistics.save_statistics(tmp_path / "ours.npz", ours)
        np.savez(tmp_path / "images.npz", images)
        moments = {"mu": ours.pool.mean, "sigma": ours.pool.covariance}
        np.savez(tmp_path / "adm.npz", arr_0=images, **moments)
        for name in ("ours", "images", "adm"):
            path = str(tmp_path / f"{name}.npz")
            opened = open_reference(path, extractor, data, tmp_path / "cache")
            found = opened.statistics()
            assert opened.name == f"{name}.npz" and opened.count == len(images)
            assert list(opened.resolution) == [8, 8] and opened.has_features
            assert metrics.frechet_distance(found.pool, ours.pool) < 1e-9
            order = [np.lexsort(r.features.T) for r in (found, ours)]
            np.testing.assert_allclose(found.features[order[0]], ours.features[order[1]], atol=1e-5)
            assert found.metadata["name"] == f"{name}.npz"
            assert found.metadata["hash"] == record.file_hash(path)
            assert found.metadata["resolution"] == [8, 8]

    def test_moments_alone_give_no_precision(self, experiment, source, pictures, data, tmp_path):
        ours = open_reference("", DigitsExtractor(), data, None).statistics()
        np.savez(tmp_path / "mu.npz", mu=ours.pool.mean, sigma=ours.pool.covariance)
        np.savez(tmp_path / "samples.npz", pictures[0])
        found = score_file(
            experiment,
            source,
            tmp_path / "samples.npz",
            tmp_path,
            reference=str(tmp_path / "mu.npz"),
        )
        assert set(found.metrics) == {"fid"}
        assert "no kernel distance, sliced distance, precision, recall: the" in found.notes[0]

    def test_another_width(self, extractor, data, tmp_path):
        np.savez(tmp_path / "x.npz", mu=np.zeros(5), sigma=np.eye(5))
        with pytest.raises(InputError, match="statistics of 5 features, expected 64 of digits-mlp"):
            open_reference(str(tmp_path / "x.npz"), extractor, data, None)

    def test_another_extractor(self, data, extractor, tmp_path):
        ours = open_reference("", extractor, data, None).statistics()
        statistics.save_statistics(tmp_path / "ours.npz", ours)
        with pytest.raises(InputError, match="statistics of another feature extractor"):
            open_reference(str(tmp_path / "ours.npz"), DigitsExtractor(seed=1), data, None)

    def test_at_most_ten_thousand_vectors_are_kept(self):
        kept = reference_lib._kept(50_000)
        assert len(kept) == 10_000 and kept[0] == 0 and kept[-1] == 49_999
        np.testing.assert_array_equal(reference_lib._kept(5), np.arange(5))


class TestTooFew:
    """What the metrics need is known before anything is drawn."""

    MESSAGE = "is 3: expected at least 4 for precision"

    @pytest.fixture(autouse=True)
    def nothing_is_drawn(self, monkeypatch):
        monkeypatch.setattr(evaluation.Evaluator, "sample_features", None)
        monkeypatch.setattr(reference_lib, "_compute", None)

    def test_samples(self, experiment, source, params):
        few = with_evaluation(experiment, num_samples=3)
        with pytest.raises(InputError, match=f"config.evaluation.num_samples {self.MESSAGE}"):
            evaluation.evaluate(few, Weights(params), source)
        with pytest.raises(InputError, match=f"config.evaluation.num_samples {self.MESSAGE}"):
            evaluation.check(few, source)

    def test_samples_during_training(self, experiment, source, tmp_path):
        few = with_evaluation(experiment, train_samples=3)
        with pytest.raises(InputError, match=f"config.evaluation.train_samples {self.MESSAGE}"):
            evaluation.TrainingEvaluation(few, source, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_pictures_on_disk(self, experiment, source, tmp_path):
        np.savez(tmp_path / "x.npz", np.zeros((3, 8, 8, 1), np.uint8))
        with pytest.raises(InputError, match=f"the number of pictures in .*x.npz {self.MESSAGE}"):
            score_file(experiment, source, tmp_path / "x.npz", tmp_path)

    def test_pictures_of_the_reference(self, experiment, source, params, tmp_path):
        np.savez(tmp_path / "x.npz", np.zeros((3, 8, 8, 1), np.uint8))
        few = with_evaluation(experiment, reference=str(tmp_path / "x.npz"))
        with pytest.raises(InputError, match="the reference has 3 pictures: expected at least 4"):
            evaluation.evaluate(few, Weights(params), source)

    def test_moments_alone_need_fewer(self, experiment, tmp_path):
        np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
        wanted = with_evaluation(experiment, reference=str(tmp_path / "mu.npz"))
        opened = scoring.open_scorer(wanted, None)
        opened.check_count(2, "the number")
        with pytest.raises(InputError, match="the number is 1: expected at least 2 for Fréchet"):
            opened.check_count(1, "the number")


class TestBeforeTraining:
    """What an evaluation at the end needs is looked for at the start, in a moment."""

    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, monkeypatch):
        monkeypatch.setattr(reference_lib, "_compute", None)

    def test_a_reference_of_another_resolution(self, experiment, source, tmp_path):
        np.savez(tmp_path / "x.npz", np.zeros((100, 16, 16, 1), np.uint8))
        wanted = with_evaluation(experiment, reference=str(tmp_path / "x.npz"))
        with pytest.raises(InputError, match="samples are 8x8: reference x.npz has 16x16"):
            evaluation.check(wanted, source)

    def test_labels(self, experiment, source):
        config = copy.deepcopy(experiment.config)
        config.sampler.labels = "zebra"
        with pytest.raises(InputError, match="zebra"):
            evaluation.check(Experiment.from_config(config), source)


class TestBadInput:
    @pytest.fixture
    def bad(self, experiment, source, tmp_path):
        """Scores a bad sample set; nothing may be written then."""

        def score(path, **fields):
            out = tmp_path / "out"
            with pytest.raises(InputError) as caught:
                score_file(experiment, source, path, out, **fields)
            assert "\n" not in str(caught.value)
            return str(caught.value)

        return score

    def test_colour_for_digits(self, bad, tmp_path):
        np.savez(tmp_path / "x.npz", np.zeros((100, 8, 8, 3), np.uint8))
        assert "expected (N, 8, 8, 1)" in bad(tmp_path / "x.npz")

    def test_inception_weights(self, experiment, source, params, tmp_path):
        wanted = with_evaluation(experiment, features="inception")
        with pytest.raises(InputError, match="inception_path is empty.*https://"):
            evaluation.evaluate(wanted, Weights(params), source)
        path = str(tmp_path / "no.pth")
        wanted = with_evaluation(experiment, features="inception", inception_path=path)
        with pytest.raises(InputError, match="download https://"):
            evaluation.evaluate(wanted, Weights(params), source)

    def test_no_checkpoint(self, experiment, tmp_path):
        with pytest.raises(InputError, match="no checkpoint"):
            evaluation.run(experiment.config, str(tmp_path))
        assert not list(tmp_path.iterdir())

    def test_no_auxiliary_head(self, experiment, source, params):
        config = copy.deepcopy(experiment.config)
        config.model.auxiliary_depth = 0
        headless = Experiment.from_config(config)
        with pytest.raises(InputError, match="needs auxiliary head 0 of this model"):
            evaluation.evaluate(headless, Weights(params), source)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ig_jax.evaluation.metrics.FewSamplesWarning")
def test_pictures_by_inception(experiment, tmp_path, monkeypatch):
    """Small colour pictures against ADM's layout, by an Inception of seeded weights."""
    shapes = json.loads(str(golden("inception_seeded")["shapes_json"]))
    weights = inception_params(seeded_weights(shapes, True), "seeded")
    extractor = InceptionExtractor(weights, "ab", batch_size=8)
    monkeypatch.setitem(extractors.EXTRACTORS, "digits", lambda options, mesh: extractor)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 16, 16, 3), np.uint8)
    real, drawn = images[:12], images[12:]
    features = extractor(real)
    moments = {}
    for suffix, rows in (("", features.pool), ("_s", features.spatial)):
        found = statistics.gaussian_statistics(rows)
        moments |= {f"mu{suffix}": found.mean, f"sigma{suffix}": found.covariance}
    np.savez(tmp_path / "VIRTUAL_imagenet16_labeled.npz", arr_0=real, **moments)
    for name, pictures in (("drawn", drawn), ("real", real)):
        np.savez(tmp_path / f"{name}.npz", pictures)
    reference = str(tmp_path / "VIRTUAL_imagenet16_labeled.npz")
    found = score_file(experiment, None, tmp_path / "drawn.npz", tmp_path, reference=reference)
    expected = {"fid", "sfid", "kid", "mind", "inception_score", "precision", "recall"}
    assert set(found.metrics) == expected
    read = extractor(drawn)
    assert found.metrics["kid"] == pytest.approx(metrics.kid(read.pool, features.pool), rel=1e-3)
    for name, rows, other in (
        ("fid", read.pool, features.pool),
        ("sfid", read.spatial, features.spatial),
    ):
        pair = [statistics.gaussian_statistics(r) for r in (rows, other)]
        assert found.metrics[name] == pytest.approx(metrics.frechet_distance(*pair), rel=1e-4)
    score = metrics.inception_score(read.probabilities)
    assert found.metrics["inception_score"] == pytest.approx(score, rel=1e-6)
    assert "12 samples with 2048 features" in found.notes[0]
    assert found.protocol["resize"] == "TF1 bilinear to 299x299"
    assert report.line(found).startswith("FID ") and ", KID " in report.line(found)
    assert "real validation pictures of ImageNet score FID 1.68" in found.notes[-1]
    same = score_file(experiment, None, tmp_path / "real.npz", tmp_path, reference=reference)
    assert same.metrics["fid"] < 1e-3 * found.metrics["fid"]
    assert (same.metrics["precision"], same.metrics["recall"]) == (1, 1)


def test_pictures_by_dinov2(experiment, tmp_path):
    """Colour pictures against others, by weights that a config names."""
    weights = seeded_weights(json.loads(str(golden("dinov2_seeded")["shapes_json"])))
    weight_files.write_safetensors(tmp_path / "dinov2.safetensors", weights)
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    for name, pictures in (("drawn", images[12:]), ("real", images[:12])):
        np.savez(tmp_path / f"{name}.npz", pictures)
    found = score_file(
        experiment,
        None,
        tmp_path / "drawn.npz",
        tmp_path,
        reference=str(tmp_path / "real.npz"),
        features="dinov2",
        dinov2_path=str(tmp_path / "dinov2.safetensors"),
    )
    assert set(found.metrics) == {"fid", "kid", "mind", "precision", "recall"}
    assert report.line(found).startswith("FD-DINOv2 ")
    assert found.protocol["features"] == "dinov2-64"
    assert found.protocol["resize"] == "bicubic with antialias to 224x224"


@pytest.mark.parametrize(
    "extractor, reference, known",
    [
        ("inception-2015-12-05", "VIRTUAL_imagenet256_labeled.npz", True),
        ("inception-2015-12-05", "VIRTUAL_imagenet512.npz", True),
        ("inception-2015-12-05", "VIRTUAL_lsun_bedroom256.npz", False),
        ("dinov2-vitl14", "VIRTUAL_imagenet256_labeled.npz", False),
    ],
)
def test_what_real_pictures_score(extractor, reference, known):
    assert (scoring.real_pictures(extractor, reference) is not None) == known


_TWO_PROCESSES = """
import json, sys
from ig_jax.parallel import processes
processes.initialize({})
import jax
from ig_jax.evaluation import run as evaluation
from ig_jax.record import Weights
from ig_jax.experiment import Experiment
from tests.evaluation.common import tiny_config, tiny_params
experiment = Experiment.from_config(tiny_config())
assert jax.process_count() == 2
source = experiment.open_data()
weights = Weights(tiny_params(experiment))
results = evaluation.evaluate(experiment, weights, source, workdir=sys.argv[1])
config = experiment.config
config.evaluation.samples = sys.argv[2]
results.append(evaluation.evaluate_files(Experiment.from_config(config), source, sys.argv[1]))
print(json.dumps([r.metrics for r in results]))
"""


@pytest.mark.alone
@pytest.mark.slow
def test_two_processes_equal_one(experiment, source, results, pictures, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # More pictures than a chunk, so that both processes get some.
    many = np.concatenate([pictures[0]] * 4)
    np.savez(tmp_path / "many.npz", many)
    children = []
    for i in range(2):
        extra = {
            "IG_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "IG_JAX_PROCESS_ID": str(i),
            "IG_JAX_NUM_PROCESSES": "2",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", _TWO_PROCESSES, tmp_path, tmp_path / "many.npz"]
        children.append(
            subprocess.Popen(command, env=os.environ | extra, cwd=ROOT, stdout=subprocess.PIPE)
        )
    printed = [json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for child in children]
    assert printed[0] == printed[1]
    alone = score_file(experiment, source, tmp_path / "many.npz", tmp_path)
    expected = [r.metrics for r in results] + [alone.metrics]
    for a, b in zip(printed[0], expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
