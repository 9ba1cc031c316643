import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from ig_jax import config as config_lib
from ig_jax.errors import InputError
from ig_jax.training.setup import Setup
from tests.common import tiny_config


@pytest.mark.parametrize("family", ["sit", "dit", "lightningdit"])
def test_defaults_are_valid(family):
    config_lib.validate(config_lib.default_config(family))


@pytest.mark.parametrize(
    ("value", "depths"), [("2", (2,)), ("1,2", (1, 2)), ("(1,)", (1,)), ("0", ()), ("-1", (4,))]
)
def test_one_number_or_several_say_where_the_heads_are(value, depths, monkeypatch):
    values = flags.FlagValues()
    config = tiny_config()
    config.model.depth = 6
    monkeypatch.setattr(sys, "argv", ["", f"--config.model.auxiliary_depth={value}"])
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(sys.argv)
    config_lib.validate(config)
    assert config_lib.model_spec(config).auxiliary_depths == depths
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.model_spec(again).auxiliary_depths == depths


def test_a_model_without_auxiliary_head_refuses_internal_guidance():
    config = tiny_config()
    config.model.auxiliary_depth = 0
    config_lib.validate(config)
    config.guidance.ig_scale = 1.5
    with pytest.raises(InputError, match="config.guidance.ig_scale is 1.5: expected 1.*no auxil"):
        config_lib.validate(config)


@pytest.mark.parametrize("target", ["null", "segmented"])
def test_an_unconditional_model_has_no_target_at_the_null_label(target):
    config = tiny_config()
    config.model.num_classes = 0
    config.loss.update(guided_target=target, guided_target_scale=0.5)
    with pytest.raises(InputError, match=f"config.loss.guided_target is '{target}', which needs a"):
        config_lib.validate(config)
    config.loss.guided_target_scale = 0.0
    config_lib.validate(config)


def test_a_variance_without_a_loss_is_sampled_from_but_not_trained(tmp_path):
    config = tiny_config()
    config.model.learned_sigma = True
    config_lib.validate(config)
    with pytest.raises(InputError, match="config.model.learned_sigma is True: expected False to"):
        Setup.from_config(config, tmp_path)
    assert not list(tmp_path.iterdir())
    config.optimizer.trainable = "auxiliary_head"  # leaves the final head as it is
    config_lib.check_training(config)


def test_latents_are_not_mirrored(tmp_path):
    config = tiny_config()
    config.data.update(name="latents", flip=True)
    config_lib.validate(config)  # a workdir that was trained so can still be sampled from
    with pytest.raises(InputError, match="config.data.flip is True: expected False for latents"):
        Setup.from_config(config, tmp_path)
    assert not list(tmp_path.iterdir())
    saved = config.copy_and_resolve_references()
    config.data.flip = False
    assert config_lib.differences(config, saved) == []
    saved.data.name = config.data.name = "folder"
    assert config_lib.differences(config, saved) == [
        "config.data.flip is False, the checkpoint has True"
    ]


def test_unconditional_model_refuses_cfg():
    config = tiny_config()
    config.model.num_classes = 0
    config_lib.validate(config)
    config.guidance.cfg_scale = 2.0
    with pytest.raises(InputError, match="config.guidance.cfg_scale is 2.0: expected 1"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    "data,fsdp,devices,message",
    [
        (4, 1, 8, "data=4, fsdp=1: expected a product that is the number of devices, 8"),
        (-1, 3, 8, "data=-1, fsdp=3: expected a product that divides the number of devices, 8"),
        (-1, -1, 8, "at most one of them -1"),
        (-1, 1, 5, "batch_size / config.train.accumulate is 32: expected a multiple"),
    ],
)
def test_meshes_that_do_not_fit(data, fsdp, devices, message):
    config = tiny_config()
    config.mesh.update(data=data, fsdp=fsdp)
    with pytest.raises(InputError, match=message):
        config_lib.check_devices(config, devices)


def test_json_round_trip():
    config = tiny_config()
    again = config_lib.from_json(config_lib.to_json(config))
    config_lib.validate(again)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["sit", "lightningdit"])
def test_a_config_saved_before_a_field_was_there_is_completed(family):
    """Of every field and section at once: whichever is new one day, older workdirs open."""
    config = config_lib.default_config(family, "b")
    saved = config_lib.to_json(config)
    older = {"seed": 0, "model": {"family": family, "size": "b"}, "train": {}}
    for values in (older, *({k: v for k, v in saved.items() if k != gone} for gone in saved)):
        values = values | {"model": {"family": family, "size": "b"}}
        found = config_lib.from_json(values)
        config_lib.validate(found)
        assert found.to_dict() == config.to_dict()
        assert config_lib.differences(config, found) == []
    for section, fields in saved.items():
        for gone in fields if isinstance(fields, dict) else ():
            if (section, gone) not in (("model", "family"), ("model", "size")):
                values = saved | {section: {k: v for k, v in fields.items() if k != gone}}
                assert config_lib.from_json(values).to_dict() == config.to_dict()


@pytest.mark.parametrize("section", ["train", "later"])
def test_a_field_of_a_newer_version_is_named(section):
    values = config_lib.to_json(tiny_config())
    values.setdefault(section, {})["field"] = 1
    name = "train.field" if section == "train" else "later"
    message = f"^w has a field config.{name}, unknown to this version.*a newer ig_jax reads it"
    with pytest.raises(InputError, match=message) as caught:
        config_lib.from_json(values, "w")
    assert "\n" not in str(caught.value)


def test_the_length_of_a_run_is_fixed_where_its_learning_rate_depends_on_it():
    config = tiny_config()
    config.optimizer.schedule = "cosine"
    longer = config.copy_and_resolve_references()
    longer.train.num_steps = 100
    assert config_lib.differences(config, config) == []
    assert config_lib.differences(longer, config) == [
        "config.train.num_steps is 100, the checkpoint has 6: the learning rate depends on it "
        "(config.optimizer.schedule is 'cosine')"
    ]
    config.optimizer.schedule = longer.optimizer.schedule = "constant"
    assert config_lib.differences(longer, config) == []


def test_only_what_does_not_alter_what_is_learned_may_change():
    """Of every field: the rule that it declares is the one that resuming follows."""
    free = {path for path, field in config_lib.FIELDS.items() if field.resume == "free"}
    assert {"guidance.ig_scale", "sampler.name", "train.num_steps", "model.remat"} < free
    assert not free & {"seed", "loss.path", "model.width", "optimizer.b2", "train.batch_size"}
    for path in config_lib.FIELDS:
        config = tiny_config().to_dict()
        section, _, name = path.rpartition(".")
        (config[section] if section else config)[name] = "other"
        found = config_lib.differences(ConfigDict(config), tiny_config())
        assert [line.split()[0] for line in found] == [f"config.{path}"] * (path not in free)


def test_differences_name_what_matters_and_only_that():
    saved, config = tiny_config(), tiny_config()
    config.guidance.ig_scale = 3.0
    config.train.num_steps = 100
    assert config_lib.differences(config, saved) == []
    config.model.width = 64
    config.seed = 1
    assert sorted(config_lib.differences(config, saved)) == [
        "config.model.width is 64, the checkpoint has 32",
        "config.seed is 1, the checkpoint has 0",
    ]
