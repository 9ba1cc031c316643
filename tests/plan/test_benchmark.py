"""The benchmark times what a config describes, and counts its operations by the model's formula."""

import json

import jax
import jax.numpy as jnp
import pytest

from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.experiment import Experiment
from ig_jax.plan import benchmark, topology
from ig_jax.sampling.run import make_engine
from tests.common import tiny_config


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setitem(benchmark._CEILING, "cpu", 64)


@pytest.mark.slow
def test_every_line_of_a_config_is_measured_and_written(quick, tmp_path, capsys):
    config = tiny_config()
    config.sampler.update(name="euler", num_steps=2)
    last = benchmark.run(config, str(tmp_path / "w"))
    found = json.loads((tmp_path / "w" / "benchmark.json").read_text())
    assert [line["name"] for line in found["lines"]] == [
        "train step",
        "train step, no head",
        "sampler: no guidance",
        "sampler: IG",
        "sampler: CFG",
        "sampler: IG + CFG, interval",
        "sampler: CFG, shallow",
        "reading",
    ]
    for line in found["lines"]:
        assert len(line["seconds"]) == 2 and line["images_per_second"] > 0, line["name"]
        assert (line["peak"] or 0) > 0 or line["name"] == "reading"
        assert line["mfu_of_data_sheet"] is None  # of a CPU there is none
    assert "float32 product of 64×64 matrices" in last and "the auxiliary head costs" in last
    printed = capsys.readouterr().out
    assert "train step, no head" in printed and "MFU product" in printed


def test_a_network_without_head_and_labels_has_fewer_lines():
    config = tiny_config()
    config.model.update(auxiliary_depth=0, num_classes=0)
    names = [case.name for case in benchmark.cases(config)]
    assert names == ["train step", "sampler: no guidance", "reading"]


def test_operations_are_those_of_the_branches_that_are_computed():
    experiment = Experiment.from_config(tiny_config())
    engine, spec = make_engine(experiment), experiment.spec

    def flops(**guidance):
        return benchmark.sampler_flops(spec, engine, GuidanceOptions(**guidance))

    # Heun's three steps, the last of which is Euler's; and so the engine counts them.
    assert flops() / spec.forward_flops() == 5
    assert engine.forward_passes(spec, GuidanceOptions().build()) == 5
    assert flops(ig_scale=1.4) == flops()  # the same forward pass
    assert flops(cfg_scale=1.4) == 2 * flops()
    assert flops() < flops(cfg_scale=1.4, cfg_interval=(0.0, 0.5)) < 2 * flops()
    assert flops() < flops(cfg_scale=1.4, cfg_source="shallow") < 1.6 * flops()


def timed(cases, rounds):
    """Every case takes three seconds, scanned "dots" one; without recomputing memory runs out."""
    lines = []
    for case in cases:
        if "remat=none" in case.name:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        line = benchmark.Line(case.name, case.images, case.flops, 0.0, 0.0, 0)
        fast = "scan_blocks=true --config.model.remat=dots" in case.name
        line.seconds = [1.0 if fast else 3.0]
        lines.append(line)
    return lines


def test_the_search_names_the_fastest_way_and_survives_want_of_memory(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "measure", timed)
    last = benchmark.run(tiny_config(batch_size=16), str(tmp_path), sweep=True)
    flags = "--config.model.scan_blocks=true --config.model.remat=dots --config.train.batch_size=32"
    assert f"fastest training: {flags} (32.0 images/s)" in last
    tried = json.loads((tmp_path / "benchmark.json").read_text())["sweep"]
    assert len(tried) == 2 * 3 * 3
    assert [way["images_per_second"] for way in tried[:3]] == [None] * 3


def test_what_was_measured_before_the_search_was_stopped_is_kept(quick, monkeypatch, tmp_path):
    """Each way compiles for minutes at full size, and the longest may be stopped by hand."""

    def measure(cases, rounds):
        if "remat=full" in cases[0].name:
            raise KeyboardInterrupt
        return timed(cases, rounds)

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(tiny_config(batch_size=16), str(tmp_path), sweep=True)
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["lines"][0]["name"] == "train step" and 3 <= len(found["sweep"]) < 18


def test_chips_are_known_by_how_their_kind_begins():
    class Device:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    assert topology.chip(Device("TPU v5 lite")).flops == 197e12
    assert topology.chip(Device("TPU v5")).flops == 459e12
    assert topology.chip(Device("NVIDIA H100 80GB HBM3")).memory_rate == 3350e9
    assert topology.chip(Device("cpu")) is None


def test_the_ceiling_is_a_rate():
    rate, about = benchmark.matmul_ceiling(jnp.float32, rounds=1)
    assert 1e8 < rate < 1e15 and "2048" in about
