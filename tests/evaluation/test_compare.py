"""Results in one line, and what `compare` says of two."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from ig_jax.config import default_config
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import compare as compare_lib
from ig_jax.evaluation import report
from ig_jax.evaluation.report import Result
from ig_jax.experiment import Experiment, ToImages
from ig_jax.record import SAMPLING_FIELDS, Weights
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import make_engine, sampling_record


@functools.cache
def xl(sampler: tuple) -> tuple:
    config = default_config("sit", "xl")
    config.sampler.update(dict(sampler))
    experiment = Experiment.from_config(config)
    return experiment, make_engine(experiment), label_rule(config, ())


WEIGHTS = Weights({}, 400_000, True, 0.9999)
# As if loaded.
WEIGHTS.__dict__["hash"] = "ab" * 8


def record(guidance: GuidanceOptions, changes: dict | None = None, **fields) -> dict:
    experiment, engine, rule = xl(tuple((changes or {}).items()))
    to_images = ToImages(np.zeros(1), np.full(1, 5.5), "sd-vae-ft-ema", None, "float32")
    drawn = sampling_record(experiment, engine, guidance, WEIGHTS, rule, 0, to_images)
    scoring = {
        "num_samples": 50_000,
        "samples": "drawn for this score",
        "samples_hash": "cd" * 32,
        "resolution": "256x256",
        "features": "inception-2015-12-05",
        "features_hash": "ef" * 32,
        "resize": "TF1 bilinear to 299x299",
        "uint8": True,
        "reference": "VIRTUAL_imagenet256_labeled.npz",
        "reference_hash": "12" * 32,
        "reference_count": 10_000,
        "versions": {"ig_jax": "0.1.0", "jax": "0.10.2"},
        "device": "TPU v4",
    }
    return drawn | scoring | fields


BEST = GuidanceOptions(1.4, (0.0, 1.0), 1.35, (0.0, 0.7))


def result(guidance=BEST, fid=1.46, **fields) -> Result:
    return Result({"fid": fid, "sfid": 4.79}, record(guidance, **fields), ("a note",))


@pytest.fixture
def compare(tmp_path):
    def run(a, b):
        for name, results in (("a", a), ("b", b)):
            report.save(tmp_path / f"{name}.json", results)
        return compare_lib.compare(tmp_path / "a.json", tmp_path / "b.json")

    return run


class TestRecord:
    def test_every_field_has_a_note_or_is_a_circumstance(self):
        """So that `compare` never names a field without saying what it does."""
        known = {*compare_lib.NOTES, *compare_lib.CIRCUMSTANCES}
        others = {"tolerances", "epochs_to_fid"}  # of older versions; where targets were given
        assert set(record(GuidanceOptions())) | others == known

    def test_sampling_fields(self):
        assert set(SAMPLING_FIELDS) < set(record(GuidanceOptions()))
        found = record(GuidanceOptions(1.4, (0.3, 1.0)))
        assert (found["sampler"], found["sampler_kind"]) == ("euler_maruyama", "SDE")
        assert found["ig_interval"] == [0.3, 1.0] and found["cfg_interval"] is None
        adaptive = record(GuidanceOptions(), changes=dict(name="dopri5", rtol=1e-4))
        assert adaptive["num_steps"] is None and adaptive["time_shift"] is None
        assert adaptive["sampler_options"]["rtol"] == 1e-4
        assert "dopri5(rtol=0.0001) (ODE); IG 1" in report.line(Result({}, adaptive))

    def test_line(self):
        line = report.line(result())
        assert "\n" not in line
        for words in (
            "FID 1.46, sFID 4.79 | 50,000 samples at 256x256",
            "euler_maruyama (SDE) 250 steps",
            "IG 1.4, CFG 1.35 on [0, 0.7]",
            "labels random, seed 0",
            "EMA 0.9999 weights of step 400000 (abababab)",
            "sd-vae-ft-ema (hash unknown)",
            "reference VIRTUAL_imagenet256_labeled.npz (12121212)",
            "resize: TF1 bilinear to 299x299, uint8",
            "jax 0.10.2",
        ):
            assert words in line

    def test_only_inceptions_distance_is_called_fid(self):
        assert report.line(result(features="digits-mlp")).startswith("Fréchet distance 1.46")

    def test_save_and_load(self, tmp_path):
        report.save(tmp_path / "x.json", [result()])
        assert report.load(tmp_path / "x.json") == [result()]


class TestCompare:
    def test_same(self, compare):
        text = compare([result()], [result(fid=1.50)])
        assert "The protocols are the same" in text
        assert "fid: 1.46 | 1.5 (+2.74 %)" in text

    def test_names_what_differs_with_a_note(self, compare):
        other = result(labels="balanced", sampler="heun", sampler_kind="ODE", num_samples=10_000)
        text = compare([result()], [other])
        assert "protocol fields that differ (3):" in text
        assert "labels: random | balanced" in text and "1.19 random, 1.07 balanced" in text
        assert "sampler: euler_maruyama | heun" in text and "SDE and ODE" in text
        assert "num_samples: 50000 | 10000" in text and "biased upwards" in text
        assert "resize" not in text and "seed" not in text

    def test_circumstances_are_apart(self, compare):
        text = compare([result()], [result(device="cpu")])
        assert "The protocols are the same" in text and "(device: TPU v4 | cpu)" in text

    def test_unknown(self, compare):
        unknown = dict.fromkeys(SAMPLING_FIELDS)
        other = Result({"fid": 1.5}, record(GuidanceOptions()) | unknown)
        text = compare([result()], [other])
        assert "seed: 0 | none (unknown on one side)" in text
        assert "IG 1.4, CFG 1.35 on [0, 0.7] | unknown guidance" in text

    def test_rows_of_the_same_guidance(self, compare):
        scales = [result(GuidanceOptions(w), fid=w) for w in (1.0, 1.5, 2.0)]
        other = [dataclasses.replace(r, metrics={"fid": 2 * r.metrics["fid"]}) for r in scales[1:]]
        text = compare(scales, other)
        assert "fid: 1.5 | 3 (+100.00 %)" in text and "fid: 2 | 4" in text
        assert "fid: 1 |" not in text and "The protocols are the same" in text

    def test_the_best_where_no_guidance_is_shared(self, compare):
        a = [result(GuidanceOptions(1.0), fid=8.0), result(GuidanceOptions(1.4), fid=2.0)]
        text = compare(a, [result(GuidanceOptions(1.5), fid=3.0)])
        assert "IG 1.4 | IG 1.5" in text and "fid: 2 | 3" in text
        assert "ig_scale: 1.4 | 1.5" in text

    @pytest.mark.parametrize("content", [None, "not json", "[]", '{"results": []}', "{}"])
    def test_not_a_result(self, tmp_path, content):
        report.save(tmp_path / "a.json", [result()])
        if content is not None:
            (tmp_path / "b.json").write_text(content)
        with pytest.raises(InputError, match=r"b\.json: (found no|cannot be read as)"):
            compare_lib.compare(tmp_path / "a.json", tmp_path / "b.json")
