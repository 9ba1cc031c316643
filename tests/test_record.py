"""What made a number: hashes, and a sampling's record of all that its pictures depend on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ig_jax import experiment as experiment_lib
from ig_jax import record, tables
from ig_jax.data.source import DataSource
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models.functional import merge
from ig_jax.models.pixels import to_uint8
from ig_jax.record import Weights
from ig_jax.sampling import run as sampling
from ig_jax.sampling.folder import folder_name
from ig_jax.sampling.labels import label_rule
from tests.common import tiny_config

NAMES = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
FACTS = DataSource(
    train=None,
    validation=None,
    shape=(8, 8, 1),
    num_classes=10,
    class_names=NAMES,
    shift=np.zeros(1, np.float32),
    scale=np.ones(1, np.float32),
    autoencoder=None,
)


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
        whole = record.weights_hash(params)
        for spec in (PartitionSpec(), PartitionSpec("x", "y"), PartitionSpec(None, ("x", "y"))):
            kernel = jax.device_put(params["a"]["kernel"], NamedSharding(mesh, spec))
            assert record.weights_hash({**params, "a": {"kernel": kernel}}) == whole

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
        assert record.weights_hash(change(params)) != record.weights_hash(params)


class TestPlain:
    def test_json_values(self):
        @dataclasses.dataclass(frozen=True)
        class Row:
            width: int
            times: tuple[float, ...]
            dtype: np.dtype

        found = record.plain({"row": Row(3, (0.0, 1.0), jnp.dtype(jnp.bfloat16)), "none": None})
        row = {"kind": "Row", "width": 3, "times": [0.0, 1.0], "dtype": "bfloat16"}
        assert found == {"row": row, "none": None}
        assert json.loads(json.dumps(found)) == found
        assert record.plain(to_uint8) == "ig_jax.models.pixels.to_uint8"
        assert record.plain(np.float32([0.5, 2])) == [0.5, 2.0]

    def test_large_arrays_are_told_apart(self):
        large = np.zeros(100, np.float32)
        other = large.copy()
        other[-1] = 1
        found = {
            record.plain(x) for x in (large, other, large.reshape(10, 10), large.view(np.int32))
        }
        assert len(found) == 4

    def test_what_has_no_name_is_refused(self):
        with pytest.raises(InputError, match="cannot be recorded"):
            record.plain(object())


class TestStoredRecord:
    def test_round_trip(self, tmp_path):
        made = sampled(tiny_config())[1]
        record.save_sampling(tmp_path / "protocol.json", made, 3, "abc")
        assert record.load_sampling(tmp_path / "protocol.json", 3) == (made, "abc")
        assert record.load_sampling(tmp_path / "protocol.json", 4) == (None, "abc")

    def test_of_an_older_version(self, tmp_path):
        """It knows neither the hash of the pictures nor today's fields."""
        old = {"model": "sit", "weights_hash": "ab", "sampler": "heun", "tolerances": None}
        values = {"num_samples": 3, "protocol": old}
        (tmp_path / "protocol.json").write_text(json.dumps(values))
        found, digest = record.load_sampling(tmp_path / "protocol.json", 3)
        assert found["sampler"] == "heun" and found["seed"] is None and digest == ""

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_samples": 3, "protocol": {}}'])
    def test_something_else(self, tmp_path, text):
        (tmp_path / "protocol.json").write_text(text)
        with pytest.raises(InputError, match="protocol.json: cannot be read as JSON with num_s"):
            record.load_sampling(tmp_path / "protocol.json", 3)


class TestWeights:
    def test_what_is_known_of_them(self):
        known = Weights({"a": np.ones(2, np.float32)}, 7, True, 0.999).record()
        assert (known["weights"], known["checkpoint_step"]) == ("EMA 0.999", 7)
        assert known["weights_hash"] == record.weights_hash({"a": np.ones(2, np.float32)})
        assert Weights({}, 7, True).record()["weights"] == "EMA"
        assert Weights({}, 7, False, 0.999).record()["weights"] == "raw"


def test_autoencoder_is_hashed(tmp_path):
    with pytest.raises(InputError, match="vae.pt: found no such file"):
        record.file_hash(tmp_path / "vae.pt")
    (tmp_path / "vae.pt").write_bytes(b"abc")
    # SHA-256 of "abc", FIPS 180-2.
    assert record.file_hash(tmp_path / "vae.pt").startswith("ba7816bf8f01cfea")


# --- the sampling record holds everything that pictures depend on --------------------------------

WEIGHTS = Weights({"a": np.zeros(1, np.float32)}, 7, True, 0.9999)


def sampled(config: ConfigDict, facts: DataSource = FACTS):
    """What sample i of a config is computed from, as the code takes it; and its record."""
    experiment = Experiment.from_config(config)
    engine = sampling.make_engine(experiment)
    options = GuidanceOptions.of(config.guidance)
    rule = label_rule(config, facts.class_names)
    to_images = experiment_lib.make_to_images(experiment, facts)
    made = sampling.sampling_record(
        experiment, engine, options, WEIGHTS, rule, config.seed, to_images
    )
    branches, guidance = engine.settings.prepare(options.build(engine.weaker))
    settings = dataclasses.replace(engine.settings, num_steps=0, time_shift=0)
    inputs = (
        # Where the times are known beforehand, they are all that steps and shift decide.
        engine.settings.grid.tolist() if settings.sampler.fixed_grid else None,
        settings,
        str(jax.tree.leaves(guidance)),
        str(jax.tree.structure(guidance)),
        branches,
        config.seed,
        rule(np.arange(64)).tolist(),
        [np.asarray(v).tolist() for v in (to_images.shift, to_images.scale)],
        to_images.autoencoder_hash,
        to_images.decoder_precision,
    )
    return inputs, made


def leaves(section, prefix=""):
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


FIELDS = dict(leaves(tiny_config()))
# Other values where one that is a little larger will not do.
OTHERS = {
    "model.family": "dit",
    "model.size": "b",
    "model.auxiliary_depth": 2,
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.width": 64,
    "model.heads": 4,
    "model.input_size": 16,
    "model.patch_size": 4,
    "data.name": "latents",
    "loss.path": "cosine",
    "loss.prediction": "data",
    "loss.times": "lognormal",
    "loss.guided_target": "null",
    "loss.weight": "velocity",
    "optimizer.name": "muon",
    "optimizer.schedule": "cosine",
    "optimizer.newton_schulz_dtype": "float32",
    "optimizer.trainable": "auxiliary_head",
    "train.batch_size": 64,
    "train.not_finite": "skip",
    "train.allow_changes": "optimizer",
    "guidance.ig_scale": 1.5,
    "guidance.ig_interval": (0.2, 1.0),
    "guidance.cfg_scale": 1.5,
    "guidance.cfg_interval": (0.0, 0.5),
    "guidance.ig_source": "auxiliary(head=0)",
    "guidance.ig_rule": "zero_star",
    "guidance.cfg_rule": "projected(eta=0.5)",
    "guidance.ig_schedule": "ramp",
    "guidance.cfg_schedule": "ramp(start=0.5)",
    "guidance.ig_null_scale": "1.7",
    "guidance.cfg_source": "shallow",
    "guidance.weak_step": "best",
    "sampler.name": "euler",
    "sampler.labels": "balanced",
    "sampler.batch_size": 64,
    "mesh.data": 8,
    "mesh.fsdp": 2,
    "evaluation.features": "inception",
    "evaluation.ig_scales": (3.0,),
    "evaluation.fid_targets": (3.0,),
    "sweep.ig_scales": (3.0,),
    "sweep.ig_intervals": (0.0, 0.5),
    "sweep.cfg_scales": (3.0,),
    "sweep.cfg_intervals": (0.0, 0.5),
    "sweep.ig_sources": ("shallow",),
    "sweep.ig_rules": ("zero_star",),
    "sweep.ig_schedules": ("ramp",),
    "sweep.cfg_sources": ("shallow",),
    "sweep.cfg_rules": ("zero_star",),
    "sweep.cfg_schedules": ("ramp",),
    "sweep.metric": "label_accuracy",
    "ablation.questions": ({"name": "which"},),
    "ablation.trainings": ({"name": "other"},),
    "ablation.fast": (1, 2, 3),
}
# Taken from a workdir: the first is recorded by the hash of its weights, the other is training's.
WORKDIRS = ("guidance.weak", "train.init_from")
# One row in its table.
NO_OTHER = ("loss.error",)
# How a network is compiled: the same pictures, up to rounding.
EXECUTION = ("model.remat", "model.scan_blocks")


def another(field, value):
    if field in OTHERS:
        return OTHERS[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.9 if value else 0.1
    if isinstance(value, tuple):
        return ("rows.py",)
    return "other"


class TestEverythingIsInTheRecord:
    """By construction, for each field of the config in turn: equal inputs or another record."""

    # Guidance is on, so that its fields matter; and a sampler with tolerances, once.
    BASES = {
        "guided": dict(ig_scale=1.3, cfg_scale=1.2, cfg_interval=(0.1, 0.9)),
        "null scale only": dict(ig_scale=1.0, ig_null_scale="1.6"),
        "adaptive": dict(ig_scale=1.3),
    }

    @staticmethod
    @functools.cache
    def base(name):
        config = tiny_config()
        config.guidance.update(TestEverythingIsInTheRecord.BASES[name])
        if name == "adaptive":
            config.sampler.name = "dopri5"
        return config, *sampled(config)

    @pytest.mark.parametrize(
        "name,field",
        [
            (name, field)
            for name in BASES
            for field in sorted({*FIELDS} - {*WORKDIRS, *NO_OTHER})
            if name == "guided" or field.startswith(("guidance.", "sampler."))
        ],
    )
    def test_field(self, name, field):
        config, inputs, made = self.base(name)
        changed = copy.deepcopy(config)
        *sections, last = field.split(".")
        section = changed
        for part in sections:
            section = section[part]
        section[last] = another(field, FIELDS[field])
        assert changed.to_dict() != config.to_dict()
        # A field whose new value is refused needs another one in `OTHERS`.
        other_inputs, other = sampled(changed)
        if field in EXECUTION:
            assert other == made
        elif other_inputs != inputs:
            assert other != made
            assert folder_name(other) != folder_name(made)

    def test_the_test_can_fail(self):
        """Fields that change pictures are seen to change the inputs."""
        config, inputs, _ = self.base("guided")
        for field in ("seed", "loss.prediction", "loss.path", "model.dtype", "sampler.labels"):
            changed = copy.deepcopy(config)
            section, _, name = field.rpartition(".")
            target = changed[section] if section else changed
            target[name] = another(field, FIELDS[field])
            assert sampled(changed)[0] != inputs, field

    @pytest.mark.parametrize(
        "change", [dict(shift=np.float32([0.1])), dict(scale=np.float32([0.9]))]
    )
    def test_facts_of_the_data(self, change):
        config = tiny_config()
        inputs, made = sampled(config)
        other_inputs, other = sampled(config, dataclasses.replace(FACTS, **change))
        assert inputs != other_inputs and made != other

    def test_decoder(self, tmp_path, monkeypatch):
        """Another autoencoder, or the same name with other weights."""
        monkeypatch.setattr(experiment_lib, "load_autoencoder", lambda config: None)
        monkeypatch.setattr(
            experiment_lib.autoencoder, "make_decoder", lambda model, uint8: to_uint8
        )
        facts = dataclasses.replace(FACTS, autoencoder="sd-vae-ft-ema")
        config, records = tiny_config(), []
        for name, content in (("sd-vae-ft-ema", b"a"), ("sd-vae-ft-ema", b"b"), ("other", b"a")):
            (tmp_path / f"{len(records)}.pt").write_bytes(content)
            config.data.update(
                autoencoder=name, autoencoder_path=str(tmp_path / f"{len(records)}.pt")
            )
            records.append(sampled(config, facts)[1])
        assert len({folder_name(made) for made in records}) == 3
        # A model of pixels has none, whatever the config says.
        assert sampled(config)[1]["autoencoder"] is None

    def test_weights(self):
        config = tiny_config()
        experiment = Experiment.from_config(config)
        engine = sampling.make_engine(experiment)
        rule, to_images = (
            label_rule(config, NAMES),
            experiment_lib.make_to_images(experiment, FACTS),
        )
        names = set()
        for weights in (
            WEIGHTS,
            dataclasses.replace(WEIGHTS, params={"a": np.ones(1, np.float32)}),
            dataclasses.replace(WEIGHTS, step=8),
            dataclasses.replace(WEIGHTS, ema=False),
        ):
            made = sampling.sampling_record(
                experiment, engine, GuidanceOptions(), weights, rule, 0, to_images
            )
            names.add(folder_name(made))
        assert len(names) == 4

    def test_imported_files(self, tmp_path, monkeypatch):
        """A rule may come from one; an edited file is another rule."""
        file, config, names = tmp_path / "rows.py", tiny_config(), set()
        monkeypatch.setattr(tables, "IMPORTED", [])
        for text in (None, "a = 1", "a = 22"):
            if text:
                file.write_text(text)
                monkeypatch.setattr(tables, "IMPORTED", [str(file)])
            names.add(folder_name(sampled(config)[1]))
        assert len(names) == 3

    def test_networks_that_the_spec_does_not_tell_apart(self):
        """What the graph holds besides the spec and the precision changes no picture."""
        config = tiny_config()
        experiment = Experiment.from_config(config)
        network = merge(experiment.graphdef, experiment.shapes)
        assert network.spec == experiment.spec


def test_words_tell_apart_what_is_guided_in_another_way():
    usual = GuidanceOptions(1.4, (0.3, 1.0), 1.35, (0.0, 0.7))
    assert record.describe(usual) == "IG 1.4 on [0.3, 1], CFG 1.35 on [0, 0.7]"
    others = [
        dict(ig_rule="projected(eta=0.5)"),
        dict(ig_source="auxiliary(head=1)"),
        dict(ig_schedule="ramp(start=0.3, stop=0.9)"),
        dict(ig_null_scale="1.1"),
        dict(cfg_source="shallow"),
        dict(cfg_rule="zero_star"),
        dict(cfg_schedule="ramp"),
        dict(cfg_channels=3),
    ]
    words = [record.describe(dataclasses.replace(usual, **other)) for other in others]
    assert len({record.describe(usual), *words}) == 1 + len(others)
    assert words[0] == "IG 1.4 on [0.3, 1] by projected(eta=0.5), CFG 1.35 on [0, 0.7]"
