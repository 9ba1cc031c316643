import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ig_jax import config as config_lib
from ig_jax.errors import InputError
from ig_jax.models import layers
from ig_jax.training import aot, sharding
from tests.training import meshes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (the test extra) is not installed"
)


# Reading compiled programs.


def exchanged(function, shape, spec, mesh=None):
    mesh = mesh or sharding.make_mesh(2, 4)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    run = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    return aot.collectives(run.lower(x).compile().as_text())


def test_exchanges_are_counted_with_their_whole_arrays():
    def gather(x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return x + whole[: len(x)]

    def scatter(x):
        return jax.lax.psum_scatter(jnp.concatenate([x] * 4), "fsdp", tiled=True)

    def summed(x):
        return jax.lax.psum(x, "data")

    # Each device holds 16 of the 64 rows of 32 float32.
    piece = 16 * 32 * 4
    spec = P("fsdp")
    assert exchanged(gather, (64, 32), spec) == {"all-gather": aot.Collective(1, 4 * piece)}
    assert exchanged(scatter, (64, 32), spec) == {"reduce-scatter": aot.Collective(1, 4 * piece)}
    assert exchanged(summed, (64, 32), spec) == {"all-reduce": aot.Collective(1, piece)}


def test_exchanges_in_loops_count_as_often_as_they_run():
    def loop(x):
        def body(x, _):
            return jax.lax.psum(x, "fsdp") * 0.5, None

        def outer(x, _):
            return jax.lax.scan(body, x, None, length=7)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert exchanged(loop, (64, 32), P("fsdp"))["all-reduce"] == aot.Collective(21, 21 * 2048)


def test_an_axis_of_one_device_exchanges_nothing():
    mesh = sharding.make_mesh(1, 8)
    assert exchanged(lambda x: jax.lax.psum(x, "data"), (64, 32), P("fsdp"), mesh) == {}


TPU_MODULE = """\
HloModule step, is_scheduled=true

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %cut = f32[16,128]{1,0:T(8,128)} dynamic-slice(%sum, %i, %j), dynamic_slice_sizes={16,128}
}

%first (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %g = bf16[32,128]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (bf16[8,128]{1,0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: bf16[8,128]) -> bf16[32,128] {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,128]{1,0} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}
}

%last (p: bf16[8,128]) -> bf16[32,128] {
  %p.2 = bf16[8,128]{1,0} parameter(0)
  %g.2 = bf16[32,128]{1,0} all-gather(%p.2), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %d = bf16[32,128]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%condition (c: (s32[], f32[64,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(28)
  %c = (s32[]{:T(128)}, f32[64,128]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%body (b: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %b = (s32[]{:T(128)}, f32[64,128]{1,0}) parameter(0)
  %x = f32[64,128]{1,0} get-tuple-element(%b), index=1
  %f = f32[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %g0 = bf16[32,128]{1,0} fusion(%x), kind=kLoop, calls=%first
  %g1 = bf16[32,128]{1,0} fusion(%g0), kind=kOutput, calls=%async_collective_fusion.2
  %g2 = bf16[32,128]{1,0} fusion(%g1), kind=kLoop, calls=%last
  ROOT %t = (s32[]{:T(128)}, f32[64,128]{1,0}) tuple(%m, %x)
}

ENTRY %main (x: f32[64,128]) -> f32[64,128] {
  %x.1 = f32[64,128]{1,0} parameter(0)
  %w = (s32[]{:T(128)}, f32[64,128]{1,0}) while(%t.0), condition=%condition, body=%body
  %move = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x.1), channel_id=1
  ROOT %r = f32[64,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_tpu_programs_are_read_as_the_compiler_writes_them():
    """A gather spread over several fusions is one; a sum cut into pieces is a reduce-scatter."""
    assert aot.collectives(TPU_MODULE) == {
        "reduce-scatter": aot.Collective(28, 28 * 64 * 128 * 4),
        "all-gather": aot.Collective(28, 28 * 32 * 128 * 2),
        "collective-permute": aot.Collective(1, 4 * 8 * 4),
    }


def test_what_the_compiler_refuses_is_understood():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.50G) exceeds available HBM (15.75G)."
    )
    assert aot._refused(message) == 16.5 * aot.GIB
    assert aot._refused("INTERNAL: 16.50G") is None


# Reports.


def test_the_present_devices():
    config = meshes.wide_config()
    config.mesh.fsdp = 4
    report = aot.report(config)
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
        aot.run(config, "")


def test_a_missing_compiler_is_one_line_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "libtpu==0\.0\.42\.\*"$'):
        aot.topology_devices("v5e:4x4")


@needs_libtpu
def test_topologies_have_memory_and_slices():
    memory = {name: aot.device_memory(aot.topology_devices(name)) for name in aot.TOPOLOGIES}
    assert memory["v5e:4x4"] == 16 * aot.GIB and memory["v5p:2x2x2"] == 95 * aot.GIB
    # Two cores share a chip's memory.
    assert aot.device_memory(aot.topology_devices("v4:2x2x1")) == 16 * aot.GIB
    two = aot.topology_devices("v5e:4x4*2")
    assert len(two) == 32
    mesh = sharding.make_mesh(-1, 4, two)
    assert mesh.shape == {"data": 8, "fsdp": 4}
    for row in mesh.devices:  # a slice's fast links carry all of fsdp
        assert len({device.slice_index for device in row}) == 1
    with pytest.raises(InputError, match="mesh.data is 1: expected a multiple of the number of sl"):
        sharding.make_mesh(1, 32, two)
    # Gathers of a mesh that follows the wires stay on one row of chips.
    mesh = sharding.make_mesh(-1, 4, aot.topology_devices("v5e:4x4"))
    assert all(len({device.coords[0] for device in row}) == 1 for row in mesh.devices) or all(
        len({device.coords[1] for device in row}) == 1 for row in mesh.devices
    )


@needs_libtpu
def test_a_topology_decides_on_precision_and_attention(monkeypatch):
    """bfloat16 for a TPU, and never the host's own attention kernel."""
    config = meshes.wide_config()
    config.mesh.update(topology="v5e:2x4", fsdp=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = []
    backend = layers._attention_backend
    monkeypatch.setattr(
        layers, "_attention_backend", lambda *a: chosen.append((a[0], backend(*a))) or chosen[-1][1]
    )
    report = aot.report(config)
    assert report.fits and report.choices["model.dtype"] == "bfloat16"
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
        return aot.Compiled(name, 0.0, 1, 1, needed, needed <= memory, {})

    monkeypatch.setattr(aot, "_compile", pretend)
    for memory, advice in (
        (164, {}),
        (120, {"mesh.fsdp": 2, "mesh.data": -1}),
        (80, {"mesh.fsdp": 8, "mesh.data": -1}),
        (10, None),
    ):
        monkeypatch.setattr(aot, "device_memory", lambda devices, memory=memory: memory)
        report = aot.report(config, ("train step",))
        assert report.advice == advice
    assert "use a larger topology" in report.table()
    config.mesh.fsdp = 8
    monkeypatch.setattr(aot, "device_memory", lambda devices: 50)
    report = aot.report(config, ("train step",))
    assert report.advice == {"train.accumulate": 2}
    assert compiled[-3:] == [(8, "dots", 1), (8, "full", 1), (8, "none", 2)]
    assert "it would with --config.train.accumulate=2" in report.table()


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
        ("sit", "v5e:16x16", 1024),
        ("sit", "v5e:16x16", 4096),
        ("lightningdit", "v5e:4x4", 256),
        ("lightningdit", "v5e:16x16", 1024),
        ("lightningdit", "v5e:16x16", 4096),
    ],
)
def test_published_recipes_fit_with_a_quarter_of_memory_to_spare(family, topology, batch_size):
    report = aot.report(published(family, topology, batch_size))
    train, sampler = report.programs
    assert report.fits and report.memory == 16 * aot.GIB
    assert max(train.peak, sampler.peak) <= 0.75 * report.memory, report.table()
    assert set(sampler.collectives) == {"all-gather"}
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
