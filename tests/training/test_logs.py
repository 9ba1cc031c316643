"""Where numbers and pictures go, and that none is there twice."""

import importlib.util
import json
import re

import numpy as np
import pytest
from etils import epath

from ig_jax.errors import InputError
from ig_jax.training import logs, loop
from ig_jax.training.setup import Setup
from ig_jax.training.validation import Validation
from tests.common import tiny_config

HAS_WANDB = importlib.util.find_spec("wandb") is not None


def lines(workdir):
    return [json.loads(line) for line in (workdir / logs.FILE).read_text().splitlines()]


def events(workdir):
    """What TensorBoard reads."""
    from tensorboard.backend.event_processing import plugin_event_accumulator

    everything = {plugin_event_accumulator.TENSORS: 0}
    found = plugin_event_accumulator.EventAccumulator(str(workdir), everything)
    found.Reload()
    return found


def scalars(workdir, tag):
    """Steps and values that TensorBoard shows of a tag."""
    from tensorboard.util.tensor_util import make_ndarray

    found = events(workdir).Tensors(tag)
    return [(e.step, float(make_ndarray(e.tensor_proto))) for e in found]


def write(workdir, first_step, steps):
    """A run that logs each of these steps, with its number as the loss."""
    opened = logs.open_logs(tiny_config(), epath.Path(workdir), first_step)
    for step in steps:
        opened.write_scalars(step, {"train/loss": np.float32(step)})
    opened.close()


@pytest.mark.tensorflow
def test_a_killed_run_that_continues_has_every_step_once(tmp_path):
    write(tmp_path, 0, range(1, 8))
    with (tmp_path / logs.FILE).open("a") as file:
        file.write('{"step": 8, "tra')
    # TensorBoard orders files by the second in their names; runs take longer than that.
    for first in list(tmp_path.glob("events.*")):
        first.rename(tmp_path / re.sub(r"\d{10}", "1000000000", first.name))
    write(tmp_path, 4, range(5, 10))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    assert [line["train/loss"] for line in lines(tmp_path)] == list(range(1, 10))
    assert scalars(tmp_path, "train/loss") == [(step, step) for step in range(1, 10)]


def test_scores_of_a_finished_run_replace_themselves(tmp_path):
    write(tmp_path, 0, (1, 2))
    for value in (0.5, 0.25):
        opened = logs.Lines(epath.Path(tmp_path / logs.FILE), 2)
        opened.write_scalars(2, {"evaluation/fid": value})
    assert [line.get("evaluation/fid") for line in lines(tmp_path)] == [None, None, 0.25]
    assert [line.get("train/loss") for line in lines(tmp_path)] == [1, 2, None]


@pytest.mark.tensorflow
def test_training_logs_under_readable_names(tmp_path):
    setup = Setup.from_config(tiny_config(num_steps=4, checkpoint_every=4), tmp_path)
    loop.train(setup, [Validation(setup)])
    groups = {name.split("/")[0] for line in lines(tmp_path) for name in line if "/" in name}
    assert groups == {"train", "validation", "speed"}
    shown = events(tmp_path).Tags()["tensors"]
    assert {name.split("/")[0] for name in shown} - {"_hparams_"} == groups
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [2, 4]


@pytest.mark.tensorflow
def test_pictures_reach_tensorboard(tmp_path):
    opened = logs.open_logs(tiny_config(), epath.Path(tmp_path), 0)
    opened.write_images(3, {"samples/grid": np.full((8, 12, 3), 200, np.uint8)})
    opened.close()
    (event,) = events(tmp_path).Tensors("samples/grid")
    width, height, *pictures = event.tensor_proto.string_val
    assert (event.step, int(width), int(height), len(pictures)) == (3, 12, 8, 1)


@pytest.mark.tensorflow
def test_scores_of_one_step_are_a_table_in_tensorboard(tmp_path):
    opened = logs.open_logs(tiny_config(), epath.Path(tmp_path), 0)
    opened.write_scores(3, {"evaluation/fid IG 1.5": 2.0}, "| guidance | FID |")
    opened.close()
    assert [line["evaluation/fid IG 1.5"] for line in lines(tmp_path)] == [2.0]
    shown = events(tmp_path)
    names = [name for name in shown.Tags()["tensors"] if not name.startswith("_hparams_")]
    assert names == ["evaluation/scores"]
    (event,) = shown.Tensors("evaluation/scores")
    assert event.tensor_proto.string_val == [b"| guidance | FID |"]


@pytest.mark.tensorflow
def test_tensorboards_table_has_what_tells_runs_apart(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = tiny_config()
    config.update(seed=5)
    config.loss.label_dropout = 0.2
    logs.open_logs(config, epath.Path(tmp_path), 0).close()
    found = events(tmp_path).PluginTagToContent("hparams")
    data = [plugin_data_pb2.HParamsPluginData.FromString(content) for content in found.values()]
    (experiment,) = (d.experiment for d in data if d.HasField("experiment"))
    (session,) = (d.session_start_info for d in data if d.HasField("session_start_info"))
    shown = [info.name for info in experiment.hparam_infos]
    assert {"seed", "loss.label_dropout", "model.width", *logs._ALWAYS} <= set(shown)
    assert not {"data.autoencoder", "model.remat", "train.log_every"} & set(shown)
    assert set(shown) < set(session.hparams) == set(logs.hyperparameters(config))
    assert [info.name.tag for info in experiment.metric_infos] == list(logs._METRICS)


def test_without_tensorflow_a_line_says_so_and_scalars_are_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    write(tmp_path, 0, (1,))
    assert "no TensorBoard files, as TensorFlow is not installed" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == [logs.FILE]


def test_weights_and_biases_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"config.train.wandb is 'ig': .*install 'ig_jax\[wandb\]"):
        Setup.from_config(tiny_config(wandb="ig"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WANDB, reason="the extra wandb is not installed")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """The same run goes on, with the config's fields, numbers and pictures."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, ids = tiny_config(wandb="ig"), []
    for first_step in (0, 2):
        opened = logs.open_logs(config, epath.Path(tmp_path), first_step)
        opened.write_scalars(first_step + 1, {"train/loss": 0.5})
        opened.write_images(first_step + 1, {"samples/grid": np.zeros((4, 4, 3), np.uint8)})
        run = opened._writers[-1]._run
        ids.append(run.id)
        assert run.config["train.batch_size"] == config.train.batch_size
        assert run.project == "ig"
        opened.close()
    assert ids == [(tmp_path / "wandb_id.txt").read_text()] * 2
    stored = [path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(stored) == 2 and all(b"train/loss" in content for content in stored)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/*.png"))) == 2
