"""The transformer against the authors' numbers, and its compilation options against each other."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ig_jax.convert.pytorch import from_pytorch
from ig_jax.errors import InputError
from ig_jax.models import families, functional, layers, network
from ig_jax.models.dit import DiT, DiTSpec
from ig_jax.models.network import Heads
from tests.common import golden, nhwc, relative_error
from tests.release import random_weights, release_shapes

# Compiling is most of the time here, and most programs run once.
QUICK = {"xla_backend_optimization_level": 0}
VARIANTS = ("sit_{}_small", "lightningdit_{}_small", "lightningdit_{}_qknorm_noshift")


def load(variant: str, **options) -> DiT:
    return from_pytorch(golden(variant.format("params")), heads=4, auxiliary_depth=2, **options)


def inputs(variant: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    numbers = golden(variant.format("forward"))
    x, t, y = (numbers[f"inputs/{name}"] for name in "xty")
    return jnp.asarray(nhwc(x)), jnp.asarray(t), jnp.asarray(y, jnp.int32)


@nnx.jit
def forward(model: DiT, *args: jax.Array) -> Heads:
    return model(*args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_release(variant):
    numbers = golden(variant.format("forward"))
    prediction = forward(load(variant), *inputs(variant))
    (auxiliary,) = prediction.auxiliary
    for name, head in (("final", prediction.final), ("auxiliary", auxiliary)):
        assert relative_error(head, nhwc(numbers[f"outputs/{name}"])) < 1e-5
    assert prediction.variance is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_inputs_are_no_outputs(variant):
    x, t, y = inputs(variant)
    heads = nnx.eval_shape(load(variant), x[:0], t[:0], y[:0])
    assert heads.final.shape == heads.auxiliary[0].shape == (0, *x.shape[1:])


@pytest.fixture(scope="module")
def reference():
    """Outputs, gradients and program text of the scanned network without rematerialisation."""
    return run_and_differentiate()


def run_and_differentiate(**options):
    variant = VARIANTS[2]
    graphdef, params = functional.split(load(variant, **options))
    args = inputs(variant)

    def loss(params):
        prediction = functional.merge(graphdef, params)(*args)
        return jnp.square(prediction.final).sum() + prediction.auxiliary[0].sum(), prediction

    lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(params)
    return lowered.compile(QUICK)(params), lowered.as_text()


@pytest.mark.parametrize(
    "options", [dict(scan_blocks=False), dict(remat="full"), dict(remat="dots")]
)
def test_compilation_options_change_no_number(reference, options):
    actual, text = run_and_differentiate(**options)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(reference[0]), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale + 1e-9)
    assert ("stablehlo.while" in text) == options.get("scan_blocks", True)
    # Rematerialisation runs the forward pass again in the backward pass: norms always, matrix
    # products and attention unless they are what is saved.
    if "remat" in options:
        norms, products = (
            text.count(f"stablehlo.{name}") - reference[1].count(f"stablehlo.{name}")
            for name in ("rsqrt", "dot_general")
        )
        assert norms > 0
        assert products == 0 if options["remat"] == "dots" else products > 0


def test_bfloat16_compute_keeps_float32_parameters_and_outputs():
    variant = VARIANTS[0]
    model = load(variant, dtype=jnp.bfloat16)
    _, params = functional.split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    prediction = forward(model, *inputs(variant))
    assert prediction.final.dtype == jnp.float32
    expected = nhwc(golden(variant.format("forward"))["outputs/final"])
    error = relative_error(prediction.final, expected)
    assert 1e-4 < error < 3e-2


def test_learned_sigma_splits_channels():
    """The release's rows are (p, p, 2C): the first C channels predict, the others are variance."""
    shape = dict(width=16, depth=2, heads=2, patch=2, channels=3, tokens=4, classes=5)
    wide = random_weights(release_shapes(**shape, learned_sigma=True, auxiliary=False))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(graphdef: nnx.GraphDef, params: functional.Params) -> Heads:
        model = functional.merge(graphdef, params)
        return model(x, jnp.array([3.0, 999.0]), jnp.array([0, 5]))

    def predict(weights: dict[str, np.ndarray]) -> Heads:
        return run(*functional.split(from_pytorch(weights, heads=2, family="dit")))

    both = predict(wide)
    assert both.auxiliary == ()
    for channels, actual in ((slice(0, 3), both.final), (slice(3, 6), both.variance)):
        narrow = dict(wide)
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = wide[name].reshape(2, 2, 6, *wide[name].shape[1:])[:, :, channels]
            narrow[name] = rows.reshape(12, *wide[name].shape[1:])
        plain = predict(narrow)
        assert plain.variance is None
        np.testing.assert_allclose(actual, plain.final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "auxiliary_is_zero"), [("sit", True), ("dit", True), ("lightningdit", False)]
)
def test_fresh_network_starts_as_published(family, auxiliary_is_zero):
    spec = DiTSpec.of(
        family, "s", width=16, depth=3, heads=2, auxiliary_depths=(1,), input_size=4, num_classes=5
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def fresh() -> Heads:
        x = jax.random.normal(jax.random.key(0), (2, 4, 4, spec.channels))
        return DiT(spec, rngs=nnx.Rngs(0))(x, jnp.array([0.2, 0.7]), jnp.array([1, 5]))

    prediction = fresh()
    assert not np.any(prediction.final)
    assert np.any(prediction.auxiliary[0]) != auxiliary_is_zero


@pytest.mark.parametrize(
    ("family", "size", "options", "published"),
    [
        # 675 129 632 is what the DiT and SiT authors' programs print for their XL/2 networks.
        ("dit", "xl", dict(learned_sigma=True, auxiliary_depths=()), 675_129_632),
        ("sit", "b", {}, None),
        ("sit", "xl", {}, None),
        ("lightningdit", "xl", {}, None),
        ("lightningdit", "1p0b", dict(qk_norm=True, shift=False, patch_size=2), None),
    ],
)
def test_parameter_counts_are_the_releases(family, size, options, published):
    spec = DiTSpec.of(family, size, **options)
    shapes = release_shapes(
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        patch=spec.patch_size,
        channels=spec.channels,
        tokens=(spec.input_size // spec.patch_size) ** 2,
        classes=1000,
        lightning=family == "lightningdit",
        qk_norm=spec.qk_norm,
        shift=spec.shift,
        learned_sigma=spec.learned_sigma,
        auxiliary=bool(spec.auxiliary_depths),
    )
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    _, params = functional.split(families.abstract(spec))
    assert functional.parameter_count(params) == count
    assert published in (None, count)


def test_parameter_names_are_those_of_older_checkpoints():
    """A network with one head, or none, is stored under the names it always had."""
    shared = {"patch_embed", "time_embed", "label_embed", "position", "final_head", "before"}
    for depths, more in (
        ((), set()),
        ((1,), {"after", "auxiliary_head"}),
        ((1, 2), {"between_1", "after", "auxiliary_head", "auxiliary_head_2"}),
    ):
        spec = dataclasses.replace(SPEC, auxiliary_depths=depths)
        graphdef, params = functional.split(families.abstract(spec))
        assert set(params) == shared | more
        facts = network.layout(graphdef, params)
        heads = {name: {p.head for p in jax.tree.leaves(part)} for name, part in facts.items()}
        named = {"auxiliary_head": {0}, "auxiliary_head_2": {1}}
        assert heads == {name: named.get(name, {None}) for name in params}
        stacks = ("before", "between_1", "after")
        for name, part in facts.items():
            assert {p.stacked for p in jax.tree.leaves(part)} == {name in stacks}


def test_stopping_at_a_head_computes_nothing_deeper():
    spec = DiTSpec.of("sit", "s", width=32, depth=6, heads=2, auxiliary_depths=(1, 3), input_size=4)
    graphdef, shapes = functional.split(families.abstract(spec, scan_blocks=False))
    args = (jnp.ones((2, 4, 4, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32))

    def lower(upto):
        run = jax.jit(lambda params, *args: functional.merge(graphdef, params)(*args, upto=upto))
        return run.lower(shapes, *args)

    everything = lower(None).cost_analysis()["flops"]
    for upto, share in ((0, 1 / 6), (1, 3 / 6)):
        stopped = lower(upto)
        assert stopped.out_info.final is None and len(stopped.out_info.auxiliary) == upto + 1
        assert stopped.cost_analysis()["flops"] < (share + 0.1) * everything
    for upto in (-1, 2):
        with pytest.raises(InputError, match=f"upto is {upto}: expected the index of one of 2 aux"):
            lower(upto)


def test_flops_of_the_published_network():
    flops = DiTSpec.of("sit", "xl").forward_flops()
    assert abs(flops / 237e9 - 1) < 0.01


SPEC = DiTSpec.of("sit", "s", width=16, depth=3, heads=2, auxiliary_depths=(1,), input_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width=18), r"width 18 is not divisible by 4"),
        (dict(heads=3), r"width 16 is not divisible by heads 3"),
        (dict(depth=0), r"depth is 0: expected at least 1"),
        (dict(patch_size=3), r"image size 4 is not divisible by patch size 3"),
        (
            dict(auxiliary_depths=(3,)),
            r"auxiliary_depths is \(3,\): expected increasing .* 1…2 for 3",
        ),
        (dict(auxiliary_depths=(0, 1)), r"auxiliary_depths is \(0, 1\): expected increasing"),
        (dict(auxiliary_depths=(2, 1)), r"auxiliary_depths is \(2, 1\): expected increasing"),
        (dict(auxiliary_depths=(1, 1)), r"auxiliary_depths is \(1, 1\): expected increasing"),
        (dict(auxiliary_depths=1), r"auxiliary_depths is 1: expected a tuple"),
        (dict(rope=True, heads=8), r"head width 2 is not divisible by 4"),
    ],
)
def test_impossible_architecture_is_refused(change, message):
    with pytest.raises(InputError, match=message) as caught:
        dataclasses.replace(SPEC, **change)
    assert "\n" not in str(caught.value)


def test_unknown_size_and_wrong_input_are_refused():
    with pytest.raises(InputError, match="unknown model size 'xxl': expected one of s, b"):
        DiTSpec.of("sit", "xxl")
    model = families.abstract(SPEC)
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    expected = "input has shape (8, 8, 4): this model expects (4, 4, 4) (HWC)"
    with pytest.raises(InputError, match=re.escape(expected)):
        nnx.eval_shape(model, x, jnp.zeros(2), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_and_its_derivatives_are_jaxs_own(dtype):
    """Heads folded into the batch and weights computed anew change no value and no gradient."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 8)).astype(dtype)
    weight = jax.random.normal(jax.random.key(1), (2, 9, 4, 8))

    def both(attend):
        def total(q, k, v):
            return (attend(q, k, v).astype(jnp.float32) * weight).sum()

        forward = jax.jvp(total, (q, k, v), (v, q, k))
        return forward, jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    limit = 1e-6 if dtype == jnp.float32 else 2e-2
    found, expected = both(layers.attend), both(jax.nn.dot_product_attention)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) < limit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_repeats_one_product_of_attention(dtype):
    """Queries and keys; what the weights do to the values is kept. Two forward, one again, four
    derivatives."""
    batch, tokens, heads, width = shape = (1, 128, 2, 64)
    one = 2 * batch * heads * tokens**2 * width

    def both(q, k, v, change):
        out, pull = jax.vjp(layers.attend, q, k, v)
        return out, pull(change)

    inputs = [jax.ShapeDtypeStruct(shape, dtype)] * 4
    assert 7 * one < jax.jit(both).lower(*inputs).compile().cost_analysis()["flops"] < 7.5 * one


@pytest.mark.parametrize(("mlp", "taken", "given"), [("gelu", 48, 48), ("swiglu", 32, 64)])
def test_an_mlp_keeps_what_its_products_take_and_what_the_activation_takes(mlp, taken, given):
    """For the backward pass; nothing of what the activation computes on the way."""
    kind = {"gelu": layers.GeluMlp, "swiglu": layers.SwiGlu}[mlp]
    graphdef, weights = nnx.split(kind(12, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    _, pull = jax.vjp(lambda *at: nnx.merge(graphdef, at[0])(at[1]), weights, jnp.ones((2, 5, 12)))
    kept = sorted(kept.size for kept in jax.tree.leaves(pull))
    assert kept == sorted([12 * given, taken * 12, 10 * 12, 10 * given, 10 * taken])
