import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ig_jax.experiment import Experiment
from ig_jax.parallel import sharding
from ig_jax.plan import fit, hlo
from ig_jax.training.setup import make_programs
from tests.common import tiny_config


def exchanged(function, shape, spec, mesh=None):
    mesh = mesh or sharding.make_mesh(2, 4)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    run = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    return hlo.collectives(run.lower(x).compile().as_text())


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
    assert exchanged(gather, (64, 32), spec) == {"all-gather": hlo.Collective(1, 4 * piece)}
    assert exchanged(scatter, (64, 32), spec) == {"reduce-scatter": hlo.Collective(1, 4 * piece)}
    assert exchanged(summed, (64, 32), spec) == {"all-reduce": hlo.Collective(1, piece)}


def test_exchanges_in_loops_count_as_often_as_they_run():
    def loop(x):
        def body(x, _):
            return jax.lax.psum(x, "fsdp") * 0.5, None

        def outer(x, _):
            return jax.lax.scan(body, x, None, length=7)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert exchanged(loop, (64, 32), P("fsdp"))["all-reduce"] == hlo.Collective(21, 21 * 2048)


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
    assert hlo.collectives(TPU_MODULE) == {
        "reduce-scatter": hlo.Collective(28, 28 * 64 * 128 * 4),
        "all-gather": hlo.Collective(28, 28 * 32 * 128 * 2),
        "collective-permute": hlo.Collective(1, 4 * 8 * 4),
    }


def moved(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.memory_traffic(jax.jit(function).lower(*arrays).compile().as_text())


def test_memory_traffic_is_each_array_once():
    m, k, n = 64, 128, 32
    product = moved(jnp.matmul, (m, k), (k, n))
    assert product == 4 * (m * k + k * n + m * n)
    # What is multiplied is written first, and then read.
    between = moved(lambda a, b: jnp.sin(a) @ b, (m, k), (k, n))
    assert between == product + 4 * 2 * m * k


ON_CHIP = """\
ENTRY %main (x: bf16[8,128], w: f32[128,256]) -> (bf16[8,256], f32[4]) {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[128,256]{1,0:T(8,128)S(1)} parameter(1)
  %s = (bf16[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %c = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)
  %f = (bf16[8,256]{1,0:T(8,128)S(1)}, bf16[8,256]{1,0}) fusion(%c, %w), kind=kOutput, calls=%f.1
  %g = bf16[8,256]{1,0} get-tuple-element(%f), index=1
  %r = f32[4]{0:T(128)} fusion(%f), kind=kLoop, calls=%f.2
  %d = f32[4]{0:T(128)} fusion(%r), kind=kLoop, calls=%f.3
  ROOT %t = (bf16[8,256]{1,0}, f32[4]{0:T(128)}) tuple(%g, %d)
}
"""


def test_what_stays_on_the_chip_is_no_memory_traffic():
    # The argument x; the results; and r, which is written and read.
    assert hlo.memory_traffic(ON_CHIP) == 8 * 128 * 2 + (8 * 256 * 2 + 4 * 4) + 2 * 4 * 4


def test_a_bfloat16_step_lowered_for_cuda_has_no_large_float32_products_and_no_host():
    """Only the embedding of the (B,) times is float32; nothing goes to the host and back."""
    config = tiny_config()
    config.model.dtype = "bfloat16"
    experiment = Experiment.from_config(config, jax.devices()[:1])
    programs = make_programs(experiment, fit.shapes_only(experiment))
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = programs.step.trace(programs.shapes, fit.batch_shapes(experiment), key)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"dot_general.* : \(tensor<([\w]+)>, tensor<([\w]+)>\)", text)
    assert len(products) > 50 and sum("bf16" in left for left, _ in products) > 50
    batch = config.train.batch_size
    for operands in products:
        if any("xf32" in operand for operand in operands):
            # Matrices with the batch, and without tokens.
            assert all(operand.count("x") == 2 for operand in operands), operands
            assert any(operand.startswith(f"{batch}x") for operand in operands), operands
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text
