import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest

from ig_jax import config as config_lib
from ig_jax.data import images, pipeline, prepare
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models import layers
from ig_jax.parallel import sharding
from ig_jax.plan import fit, roofline, topology
from tests import meshes
from tests.common import tiny_config
from tests.data.common import OPTIONS, encode, make_tree

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (the test extra) is not installed"
)


def test_what_the_compiler_refuses_is_understood():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.50G) exceeds available HBM (15.75G)."
    )
    assert fit._refused(message) == 16.5 * topology.GIB
    assert fit._refused("INTERNAL: 16.50G") is None


class Refusing:
    """A lowered program whose compiler runs out of memory."""

    def compile(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: requires 20.00G of HBM")


class Spare:
    """A lowered program without temporaries."""

    def compile(self):
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(
            argument_size_in_bytes=3, output_size_in_bytes=1, alias_size_in_bytes=1,
            temp_size_in_bytes=0,
        )  # fmt: skip

    def as_text(self):
        return "ENTRY %main (x: f32[2]) -> f32[2] {\n"


def test_refused_is_what_the_compiler_refused_and_nothing_else(monkeypatch):
    """A program that needs no temporaries fits; one that was refused does not, whatever it said."""
    monkeypatch.setattr(topology, "device_memory", lambda devices: 16 * topology.GIB)
    monkeypatch.setattr(fit, "_changes", lambda *arguments: iter(()))
    monkeypatch.setitem(fit._LOWER, "train step", lambda experiment: Spare())
    table = fit.report(meshes.wide_config(), ("train step",)).table()
    assert "refused" not in table and "temporaries 0.00 GiB" in table
    assert table.endswith("\nit fits")
    monkeypatch.setitem(fit._LOWER, "train step", lambda experiment: Refusing())
    report = fit.report(meshes.wide_config(), ("train step",))
    assert report.programs[0].refused and not report.fits
    assert "refused by the compiler: needs 20.00 GiB or more" in report.table()
    assert report.table().splitlines()[-1].startswith("it does not fit")
    # On devices whose memory is unknown, too.
    monkeypatch.setattr(topology, "device_memory", lambda devices: None)
    report = fit.report(meshes.wide_config(), ("train step",))
    assert report.table().splitlines()[-1].startswith("it does not fit")


def test_the_present_devices():
    config = meshes.wide_config()
    config.mesh.fsdp = 4
    report = fit.report(config)
    train, sampler = report.programs
    assert report.fits and report.memory is None and report.advice == {}
    assert train.temporaries > 0 and train.peak >= train.arguments + train.temporaries
    # The state is written over its old self.
    assert train.peak < 1.5 * train.arguments + train.temporaries
    assert "reduce-scatter" in train.collectives and set(sampler.collectives) == {"all-gather"}
    table = report.table()
    assert "8 × cpu: data 2 × fsdp 4" in table and "all-gather" in table
    assert f"{report.parameters / 1e6:.1f} M parameters" in table


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:4x4", "is 'v9:4x4': expected a TPU topology such as v5e:2x4, v5e:4x4.*did you mean"),
        ("v5e:3x5", "'v5e:3x5': expected a TPU topology such as .* not divisible"),
        ("pod", "'pod': expected a TPU topology such as"),
        ("v5e:4x4*two", "expected a number after"),
    ],
)
def test_unknown_topologies(topology, message):
    config = meshes.wide_config()
    config.mesh.topology = topology
    with pytest.raises(InputError, match=message):
        fit.run(config, "")


def test_a_missing_compiler_is_one_line_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "libtpu==0\.0\.42\.\*"$'):
        topology.devices("v5e:4x4")


@pytest.mark.parametrize("name", ["latents", "folder", "digits"])
def test_the_batch_is_what_the_data_give(name, tmp_path, monkeypatch):
    """For VA-VAE as for SD-VAE, which --mode=prepare writes alike."""
    config = tiny_config(batch_size=16)
    tree = make_tree(tmp_path / "tree")
    if name == "latents":
        prepare.prepare(images.ImageFolder(tree), str(tmp_path / "latents"), encode, **OPTIONS)
        config.data.path = str(tmp_path / "latents")
        config.model.update(family="lightningdit", input_size=4, channels=4, num_classes=2)
    elif name == "folder":
        config.data.path = tree
        config.model.update(channels=3, num_classes=2)
    config.data.update(name=name, num_validation=0, autoencoder=OPTIONS["autoencoder"])
    experiment = Experiment.from_config(config)
    batch = next(pipeline.make_iterator(experiment.open_data().train, batch_size=16, seed=0))
    assumed = fit.batch_shapes(experiment)
    found = {key: (array.shape, array.dtype) for key, array in batch.items()}
    assert found == {key: (array.shape, array.dtype) for key, array in assumed.items()}
    monkeypatch.setitem(fit._LOWER, "train step", lambda experiment: Spare())
    table = fit.report(config, ("train step",)).table()
    for key, (shape, dtype) in found.items():
        assert f"{key} {dtype} {shape}" in table
    assert ("LightningDiT's shards hold x alone" in table) == (name == "latents")


@needs_libtpu
def test_topologies_have_memory_and_slices():
    memory = {name: topology.device_memory(topology.devices(name)) for name in topology.TOPOLOGIES}
    assert memory["v5e:4x4"] == 16 * topology.GIB and memory["v5p:2x2x2"] == 95 * topology.GIB
    # Two cores share a chip's memory.
    assert topology.device_memory(topology.devices("v4:2x2x1")) == 16 * topology.GIB
    two = topology.devices("v5e:4x4*2")
    assert len(two) == 32
    mesh = sharding.make_mesh(-1, 4, two)
    assert mesh.shape == {"data": 8, "fsdp": 4}
    for row in mesh.devices:  # a slice's fast links carry all of fsdp
        assert len({device.slice_index for device in row}) == 1
    with pytest.raises(InputError, match="mesh.data is 1: expected a multiple of the number of sl"):
        sharding.make_mesh(1, 32, two)
    # Gathers of a mesh that follows the wires stay on one row of chips.
    mesh = sharding.make_mesh(-1, 4, topology.devices("v5e:4x4"))
    assert all(len({device.coords[0] for device in row}) == 1 for row in mesh.devices) or all(
        len({device.coords[1] for device in row}) == 1 for row in mesh.devices
    )


@needs_libtpu
@pytest.mark.slow
def test_a_topology_decides_on_precision_and_attention(monkeypatch):
    """bfloat16 for a TPU, and never the host's own attention kernel."""
    config = meshes.wide_config()
    config.mesh.update(topology="v5e:2x4", fsdp=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = []
    choose = layers.choose_attention
    monkeypatch.setattr(
        layers, "choose_attention", lambda *a: chosen.append((a[1], choose(*a))) or chosen[-1][1]
    )
    report = fit.report(config)
    assert report.fits and report.choices["model.dtype"] == "bfloat16"
    assert 0 < report.bound.mfu < 1 and report.bound.line() in report.table()
    assert {(jnp.dtype(dtype).name, name) for dtype, name in chosen} == {("bfloat16", "xla")}
    train, sampler = report.programs
    allowed = {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    assert {"all-gather", "reduce-scatter"} <= set(train.collectives) <= allowed
    assert set(sampler.collectives) == {"all-gather"}


@needs_libtpu
def test_advice_is_the_first_change_that_compiles_to_fit(monkeypatch):
    """With little memory, sharding helps first; with less, only smaller microbatches do."""
    config = meshes.wide_config(batch_size=64)
    config.mesh.topology = "v5e:2x4"
    compiled = []

    def pretend(name, experiment, memory):
        fields = experiment.config
        needed = 100 // experiment.mesh.shape["fsdp"] + 64 // fields.train.accumulate
        compiled.append((fields.mesh.fsdp, fields.model.remat, fields.train.accumulate))
        return fit.Compiled(name, 0.0, 1, 1, needed, needed <= memory, {})

    monkeypatch.setattr(fit, "_compile", pretend)
    monkeypatch.setattr(fit, "_bound", lambda *arguments: None)
    for memory, advice in (
        (164, {}),
        (120, {"mesh.fsdp": 2, "mesh.data": -1}),
        (80, {"mesh.fsdp": 8, "mesh.data": -1}),
        (10, None),
    ):
        monkeypatch.setattr(topology, "device_memory", lambda devices, memory=memory: memory)
        report = fit.report(config, ("train step",))
        assert report.advice == advice
    assert "use a larger topology" in report.table()
    config.mesh.fsdp = 8
    monkeypatch.setattr(topology, "device_memory", lambda devices: 50)
    report = fit.report(config, ("train step",))
    assert report.advice == {"train.accumulate": 2}
    assert compiled[-3:] == [(8, "dots", 1), (8, "full", 1), (8, "none", 2)]
    assert "it would with --config.train.accumulate=2" in report.table()


@needs_libtpu
def test_the_search_shows_what_no_other_way_beats(monkeypatch):
    """Larger batches need more memory and are faster here; remat saves some and costs time."""
    config = meshes.wide_config(batch_size=64)
    config.mesh.update(topology="v5e:2x4", fsdp=4)

    def peak(fields):
        return fields.train.batch_size * (2 if fields.model.remat == "none" else 1)

    def compiled(name, experiment, memory):
        needed = peak(experiment.config) * topology.GIB // 16
        return fit.Compiled(name, 0.0, 1, 1, needed, needed <= memory, {})

    def bound(config, devices, programs):
        slow = {"none": 1.0, "dots": 1.25, "full": 1.5}[config.model.remat]
        work = roofline.Work(197e12 * slow, 0, 0, 197e12)
        return roofline.Bound(work, topology.CHIPS["TPU v5 lite"])

    monkeypatch.setattr(fit, "_compile", compiled)
    monkeypatch.setattr(fit, "_bound", bound)
    lines = fit.run(config, "", sweep=True).splitlines()
    assert [line.partition(" of")[0] for line in lines] == ["4.00 GiB", "8.00 GiB", "16.00 GiB"]
    assert "at most 51 images/s (MFU 80%)" in lines[0] and "model.remat=dots" in lines[0]
    assert all("--config.mesh.fsdp=4" in line for line in lines)
    config.mesh.topology = ""
    with pytest.raises(InputError, match="config.mesh.topology is empty: expected a TPU's"):
        fit.run(config, "", sweep=True)


# The published recipes on real topologies.


def published(family, topology, batch_size):
    config = config_lib.default_config(family, "xl")
    config.mesh.update(topology=topology, fsdp=4)
    config.model.remat = "dots"
    config.train.batch_size = batch_size
    config.sampler.batch_size = 256
    return config


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "topology", "batch_size"),
    [
        ("sit", "v5e:4x4", 256),
        ("sit", "v5e:16x16", 4096),
        ("lightningdit", "v5e:4x4", 256),
        ("lightningdit", "v5e:16x16", 1024),
    ],
)
def test_published_recipes_fit_with_a_quarter_of_memory_to_spare(
    family, topology, batch_size, monkeypatch
):
    monkeypatch.setattr(fit, "_bound", lambda *arguments: None)  # of other tests
    # The sampler's program is compiled on the small one, where a device has more of its batch.
    small = topology == "v5e:4x4"
    names = ("train step", "sampler") if small else ("train step",)
    report = fit.report(published(family, topology, batch_size), names)
    assert report.fits and report.memory == 16 * 2**30
    assert all(p.peak <= 0.75 * report.memory for p in report.programs), report.table()
    train, *samplers = report.programs
    assert all(set(p.collectives) == {"all-gather"} for p in samplers)
    found = {kind: exchange.bytes for kind, exchange in train.collectives.items()}
    whole = 4 * report.parameters
    # bfloat16 parameters forward and backward, float32 gradients once over fsdp and, a quarter
    # of them on each device, over data; nothing that grows with the batch.
    muon = family == "lightningdit"
    assert found["all-gather"] <= (1.4 if muon else 1.01) * whole
    assert 0.95 * whole <= found["reduce-scatter"] <= 1.05 * whole
    assert found["all-reduce"] <= (0.3 if muon else 0.26) * whole
    assert found.pop("all-to-all", 0) <= (0.25 * whole if muon else 0)
    assert found.pop("collective-permute", 0) <= 0.01 * whole  # padding of odd pieces
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
