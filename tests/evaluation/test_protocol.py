"""The protocol record: hashes, the one line, and what `compare` says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ig_jax.config import default_config
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.evaluation import protocol
from ig_jax.evaluation.protocol import Result


def record(guidance: GuidanceOptions, **fields) -> dict:
    config = default_config("sit", "xl")
    drawn = protocol.sampling_record(
        config, guidance, step=400_000, weights="ab" * 8, ema=True, weak=None
    )
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
            protocol.save(tmp_path / f"{name}.json", results)
        return protocol.compare(tmp_path / "a.json", tmp_path / "b.json")

    return run


class TestRecord:
    def test_every_field_has_a_note_or_is_a_circumstance(self):
        """So that `compare` never names a field without saying what it does."""
        known = {*protocol._NOTES, *protocol._CIRCUMSTANCES}
        assert set(record(GuidanceOptions())) == known

    def test_sampling_fields(self):
        assert set(protocol.SAMPLING_FIELDS) < set(record(GuidanceOptions()))
        found = record(GuidanceOptions(1.4, (0.3, 1.0)))
        assert (found["sampler"], found["sampler_kind"]) == ("euler_maruyama", "SDE")
        assert found["ig_interval"] == [0.3, 1.0] and found["cfg_interval"] is None
        config = default_config("sit", "b")
        config.sampler.update(name="dopri5", rtol=1e-4)
        adaptive = protocol.sampling_record(
            config, GuidanceOptions(), step=1, weights="", ema=False, weak=None
        )
        assert adaptive["num_steps"] is None and adaptive["tolerances"] == [1e-4, 1e-6]
        assert adaptive["weights"] == "raw"

    def test_autoencoder_is_hashed(self, tmp_path):
        config = default_config("sit", "b")
        config.data.autoencoder_path = str(tmp_path / "vae.pt")
        with pytest.raises(InputError, match="vae.pt: no such file"):
            protocol.sampling_record(config, GuidanceOptions(), step=1, weights="", ema=True)
        (tmp_path / "vae.pt").write_bytes(b"abc")
        found = protocol.sampling_record(config, GuidanceOptions(), step=1, weights="", ema=True)
        # SHA-256 of "abc", FIPS 180-2.
        assert found["autoencoder_hash"].startswith("ba7816bf8f01cfea")
        assert found["autoencoder"] == "sd-vae-ft-ema"

    def test_line(self):
        line = protocol.line(result())
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
        assert protocol.line(result(features="digits-mlp")).startswith("Fréchet distance 1.46")

    def test_save_and_load(self, tmp_path):
        protocol.save(tmp_path / "x.json", [result()])
        assert protocol.load(tmp_path / "x.json") == [result()]


class TestWeightsHash:
    @pytest.fixture(scope="class")
    def params(self):
        generator = np.random.default_rng(0)
        return {
            "a": {"kernel": generator.standard_normal((16, 24)).astype(np.float32)},
            "b": generator.standard_normal((8,)).astype(np.float32),
            "step": np.int32(3),
        }

    def test_sharding_does_not_matter(self, params):
        mesh = jax.make_mesh((4, 2), ("x", "y"))
        whole = protocol.weights_hash(params)
        for spec in (PartitionSpec(), PartitionSpec("x", "y"), PartitionSpec(None, ("x", "y"))):
            kernel = jax.device_put(params["a"]["kernel"], NamedSharding(mesh, spec))
            assert protocol.weights_hash({**params, "a": {"kernel": kernel}}) == whole

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: {**p, "b": np.nextafter(p["b"], 9)},
            lambda p: {**p, "b": p["b"][::-1]},
            lambda p: {**p, "b": p["b"].reshape(2, 4)},
            lambda p: {**p, "b": p["b"].astype(jnp.bfloat16)},
            lambda p: {**p, "a": {"kernel": p["a"]["kernel"].T}},
            lambda p: {"a": p["a"], "c": p["b"], "step": p["step"]},
            lambda p: {**p, "step": np.int32(4)},
        ],
    )
    def test_everything_else_does(self, params, change):
        assert protocol.weights_hash(change(params)) != protocol.weights_hash(params)


class TestCompare:
    def test_same(self, compare):
        text = compare([result()], [result(fid=1.50)])
        assert "The protocols are the same" in text
        assert "fid: 1.46 | 1.5 (+2.74 %)" in text

    def test_names_what_differs_with_a_note(self, compare):
        other = result(labels="balanced", sampler="heun", sampler_kind="ODE", num_samples=10_000)
        text = compare([result()], [other])
        assert "protocol fields that differ (4):" in text
        assert "labels: random | balanced" in text and "1.19 random, 1.07 balanced" in text
        assert "sampler: euler_maruyama | heun" in text and "SDE and ODE" in text
        assert "num_samples: 50000 | 10000" in text and "biased upwards" in text
        assert "resize" not in text and "seed" not in text

    def test_circumstances_are_apart(self, compare):
        text = compare([result()], [result(device="cpu")])
        assert "The protocols are the same" in text and "(device: TPU v4 | cpu)" in text

    def test_unknown(self, compare):
        unknown = dict.fromkeys(protocol.SAMPLING_FIELDS)
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
        protocol.save(tmp_path / "a.json", [result()])
        if content is not None:
            (tmp_path / "b.json").write_text(content)
        with pytest.raises(InputError, match=r"b\.json: (no such file|not a result)"):
            protocol.compare(tmp_path / "a.json", tmp_path / "b.json")
