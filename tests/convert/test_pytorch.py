"""Transformer checkpoints: what goes in comes back bit for bit, and what is wrong is named."""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ig_jax.convert.pytorch import (
    from_pytorch,
    to_pytorch,
)
from ig_jax.errors import InputError
from ig_jax.models import functional
from ig_jax.models.families import add_auxiliary_head
from ig_jax.models.trunk import add_heads
from ig_jax.storage import weight_files
from tests.common import golden
from tests.release import random_weights, release_shapes, rope_buffers

# Every width is different, so that no two layouts have the same shape by chance.
SHAPE = dict(width=24, depth=3, heads=2, patch=2, channels=3, tokens=9, classes=5)
GIVEN = dict(heads=2, auxiliary_depth=1)


@pytest.fixture(scope="module")
def sit():
    """A small SiT with an auxiliary head; tests copy it before changing it."""
    return random_weights(release_shapes(**SHAPE))


@pytest.fixture(scope="module")
def lightningdit():
    return random_weights(release_shapes(**SHAPE | dict(patch=1), lightning=True, qk_norm=True))


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == np.float32
        assert actual[name].shape == array.shape, name
        assert np.ascontiguousarray(actual[name]).tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    "name", ["sit_params_small", "lightningdit_params_small", "lightningdit_params_qknorm_noshift"]
)
def test_golden_weights_come_back(name):
    weights = golden(name)
    assert_same(to_pytorch(from_pytorch(weights, heads=4, auxiliary_depth=2)), weights)


@pytest.mark.parametrize("family", ["sit", "dit", "lightningdit"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("learned_sigma", [True, False])
def test_every_combination_is_recognised_and_comes_back(family, patch, auxiliary, learned_sigma):
    for qk_norm, shift in itertools.product([True, False], repeat=2):
        options = dict(qk_norm=qk_norm, shift=shift, learned_sigma=learned_sigma)
        lightning = family == "lightningdit"
        weights = random_weights(
            release_shapes(
                **SHAPE | dict(patch=patch), auxiliary=auxiliary, lightning=lightning, **options
            )
        )
        depth = 2 if auxiliary else None
        model = from_pytorch(weights, family=family, heads=2, auxiliary_depth=depth)
        expected = options | dict(
            family=family,
            input_size=3 * patch,
            channels=3,
            patch_size=patch,
            width=24,
            depth=3,
            heads=2,
            num_classes=5,
            auxiliary_depths=(depth,) if depth else (),
            norm="rms" if lightning else "layer",
            mlp="swiglu" if lightning else "gelu",
            rope=lightning,
        )
        assert {name: getattr(model.spec, name) for name in expected} == expected
        assert_same(to_pytorch(model), weights)


def test_special_values_keep_their_bits(sit):
    weights = sit | {"blocks.2.mlp.fc1.bias": np.zeros(96, np.float32)}
    weights["blocks.2.mlp.fc1.bias"][:3] = [-0.0, 1e-42, 3.4e38]
    assert_same(to_pytorch(from_pytorch(weights, **GIVEN)), weights)


def test_model_does_not_share_the_callers_memory(sit):
    weights = {name: array.copy() for name, array in sit.items()}
    model = from_pytorch(weights, **GIVEN)
    for array in weights.values():
        array[...] = 0
    assert_same(to_pytorch(model), sit)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(sit, dtype):
    stored = {name: array.astype(dtype) for name, array in sit.items()}
    expected = {name: array.astype(np.float32) for name, array in stored.items()}
    assert_same(to_pytorch(from_pytorch(stored, **GIVEN)), expected)


@pytest.mark.parametrize("wrap", ["ema", "module", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "_fsdp_wrapped_module.net."])
def test_wrapped_and_prefixed_mappings(sit, wrap, prefix):
    prefixed = {f"{prefix}{name}": array for name, array in sit.items()}
    beside = {"ema": {}, "steps": np.int64(7), "opt": {"state": {0: {"exp_avg": np.ones(3)}}}}
    assert_same(to_pytorch(from_pytorch(beside | {wrap: prefixed}, **GIVEN)), sit)


def test_heads_of_training_alone_are_left_out_with_one_line(sit):
    heads = {f"projectors.0.{i}.weight": np.ones((4, 24), np.float32) for i in (0, 2)}
    with pytest.warns(UserWarning) as caught:
        model = from_pytorch({"ema": sit | heads}, **GIVEN)
    assert_same(to_pytorch(model), sit)
    assert [str(warning.message) for warning in caught] == [
        "weights: left out projectors.* (2 weights), a head that only training needs"
    ]
    assert caught[0].filename == __file__


def test_ema_is_preferred(sit):
    raw = {name: array + 1 for name, array in sit.items()}
    model = from_pytorch({"model": raw, "ema": sit, "opt": {"lr": 1.0}}, **GIVEN)
    assert_same(to_pytorch(model), sit)


@pytest.mark.torch
def test_training_checkpoint_file(sit, tmp_path):
    import torch

    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in sit.items()}
    content = dict(
        model={name: tensor + 1 for name, tensor in tensors.items()},
        ema=tensors,
        opt={"state": {}, "param_groups": [{"lr": 1e-4}]},
        args=argparse.Namespace(model="SiT-XL/2", encoder_depth=8),
        epoch=3,
        steps=100,
    )
    torch.save(content, tmp_path / "0000100.pt")
    assert_same(to_pytorch(from_pytorch(tmp_path / "0000100.pt", **GIVEN)), sit)


@pytest.mark.torch
def test_torch_tensors_in_a_mapping(sit):
    import torch

    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in sit.items()}
    tensors["pos_embed"] = torch.nn.Parameter(tensors["pos_embed"].float())
    expected = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    assert_same(to_pytorch(from_pytorch(tensors, **GIVEN)), expected)


def test_safetensors_both_ways(sit, tmp_path):
    path = tmp_path / "weights.safetensors"
    weight_files.write_safetensors(path, to_pytorch(from_pytorch(sit, **GIVEN)))
    model = from_pytorch(str(path), **GIVEN)
    assert {k: v.tobytes() for k, v in to_pytorch(model).items()} == {
        k: v.tobytes() for k, v in to_pytorch(from_pytorch(sit, **GIVEN)).items()
    }


def test_rotary_buffers_are_checked_and_come_back(lightningdit):
    buffers = rope_buffers(3, 12)
    model = from_pytorch(lightningdit | buffers, auxiliary_depth=1)
    assert model.spec.heads == 2
    assert_same(to_pytorch(model), lightningdit | buffers)
    assert_same(to_pytorch(functional.merge(*functional.split(model))), lightningdit | buffers)
    without = from_pytorch(lightningdit, auxiliary_depth=1)
    assert_same(to_pytorch(without), lightningdit)
    strict = to_pytorch(without, rope_buffers=True)
    assert list(strict) == [*lightningdit, *buffers]
    for name, array in buffers.items():
        np.testing.assert_allclose(strict[name], array, atol=2e-6)
    turned = {name: np.roll(array, 1, axis=1) for name, array in buffers.items()}
    message = "feat_rope.freqs_cos differs by .* another rotary embedding is not supported"
    with pytest.raises(InputError, match=message):
        from_pytorch(lightningdit | turned, auxiliary_depth=1)


def test_rotary_buffers_show_the_number_of_heads():
    weights = random_weights(release_shapes(**SHAPE, lightning=True, auxiliary=False))
    assert from_pytorch(weights | rope_buffers(3, 4)).spec.heads == 6


def test_published_sizes_need_no_arguments():
    shape = dict(SHAPE, width=384, depth=12, patch=2, channels=4, tokens=4, heads=6)
    spec = from_pytorch(random_weights(release_shapes(**shape))).spec
    assert (spec.family, spec.heads, spec.auxiliary_depths) == ("sit", 6, (4,))


def test_learned_sigma_is_taken_for_dit_with_a_warning(sit):
    weights = random_weights(release_shapes(**SHAPE, learned_sigma=True, auxiliary=False))
    with pytest.warns(UserWarning, match='taken for a DiT.*family="sit"') as caught:
        model = from_pytorch(weights, heads=2)
    assert (model.spec.family, model.spec.learned_sigma) == ("dit", True)
    assert caught[0].filename == __file__
    headed = random_weights(release_shapes(**SHAPE, learned_sigma=True))
    with pytest.warns(UserWarning, match="taken for a SiT, which predicts velocity"):
        assert from_pytorch(headed, **GIVEN).spec.family == "sit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_pytorch(weights, heads=2, family="sit").spec.family == "sit"
        assert from_pytorch(sit, **GIVEN).spec.family == "sit"


def changed(weights, **changes):
    """The weights with some replaced, or left out for None; `__` in a keyword stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {k: v for k, v in (weights | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(blocks__1__mlp__fc2__weight=None, blocks__1__mlp__fc3__weight=np.zeros((24, 96))),
            [
                "1 missing",
                "blocks.1.mlp.fc2.weight; did you mean blocks.1.mlp.fc3.weight",
                "1 unexpected: blocks.1.mlp.fc3.weight",
            ],
        ),
        (
            dict(blocks__1__attn__qkv__weight=np.zeros((24, 72))),
            ["blocks.1.attn.qkv.weight has (24, 72), expected (72, 24)"],
        ),
        (dict(extra=np.zeros(3)), ["1 unexpected: extra"]),
        (
            dict(pos_embed=None, pos_embedding=np.zeros((1, 9, 24))),
            ["pos_embed is missing; did you mean pos_embedding?"],
        ),
        (dict(pos_embed=np.zeros((1, 8, 24))), ["pos_embed has (1, 8, 24)", "square number"]),
        (
            dict(x_embedder__proj__weight=np.zeros((24, 12))),
            ["x_embedder.proj.weight has shape (24, 12)", "(width, channels, patch, patch)"],
        ),
        (
            dict(final_layer__linear__weight=np.zeros((18, 24))),
            ["final_layer.linear.weight has (18, 24), expected (12, 24)"],
        ),
        (
            dict(x_embedder__proj__weight=np.zeros((25, 3, 2, 2))),
            ["1 of another", "x_embedder.proj.weight has (25, 3, 2, 2), expected (24, 3, 2, 2)"],
        ),
        (
            dict(final_layer_xr__linear__weight=np.zeros((24, 24))),
            ["final_layer_xr.linear.weight has (24, 24), expected (12, 24)"],
        ),
        (dict(blocks__2__attn__proj__bias=np.full(24, np.nan)), ["blocks.2.attn.proj.bias", "NaN"]),
        (dict(pos_embed=np.full((1, 9, 24), np.inf)), ["pos_embed", "infinite"]),
        (dict(pos_embed=np.zeros((1, 9, 24), int)), ["pos_embed is int64, expected floating"]),
        (dict(blocks__0__mlp__fc1__weight=None), ["family cannot be told", "mlp.w12.weight"]),
        (
            dict(blocks__0__attn__q_norm__bias=np.zeros(12)),
            ["blocks.0.attn.q_norm.bias", "LayerNorm on queries and keys is not supported"],
        ),
        (dict(blocks__999999999__attn__proj__bias=np.zeros(24)), ["blocks.999999999.attn"]),
    ],
)
def test_faulty_weights_are_named(sit, change, words):
    with pytest.raises(InputError) as caught:
        from_pytorch(changed(sit, **change), **GIVEN)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("sit", dict(auxiliary_depth=1), "heads cannot be told for width 24.*give heads"),
        ("sit", dict(heads=2), "depth cannot be told for 3 blocks of width 24: give auxiliary_de"),
        ("sit", dict(heads=5, auxiliary_depth=1), "width 24 is not divisible by heads 5"),
        (
            "sit",
            dict(heads=2, auxiliary_depth=3),
            r"auxiliary_depths is \(3,\): expected incr.*1…2",
        ),
        (
            "sit",
            dict(heads=2, auxiliary_depth=(1, 2)),
            "auxiliary_depth is 1, 2, but there is 1 of",
        ),
        ("sit", GIVEN | dict(family="lightningdit"), "not a lightningdit checkpoint"),
        ("sit", GIVEN | dict(family="siT"), "unknown model 'siT': expected one of sit, dit"),
        ("lightningdit", GIVEN | dict(family="sit"), "not a sit checkpoint: only LightningDiT has"),
        ("lightningdit", GIVEN | dict(heads=3), "heads is 3, but weight blocks.0.attn.q_norm.we"),
    ],
)
def test_what_cannot_be_seen_is_asked_for(request, which, arguments, message):
    with pytest.raises(InputError, match=message):
        from_pytorch(request.getfixturevalue(which), **arguments)


def test_foreign_networks_are_refused():
    message = "no weights of a SiT, DiT or LightningDiT, .*; top-level keys: encoder.conv_in.weight"
    with pytest.raises(InputError, match=message):
        from_pytorch({"encoder.conv_in.weight": np.zeros((3, 3, 3, 3))})
    with pytest.raises(InputError, match="top-level keys: none"):
        from_pytorch({})


@pytest.mark.torch
def test_unsafe_and_damaged_files_are_refused(sit, tmp_path, capsys):
    import torch

    class Payload:
        def __reduce__(self):
            return (print, ("this must not run",))

    (tmp_path / "code.pt").write_bytes(pickle.dumps({"model": Payload()}, protocol=2))
    with pytest.raises(InputError, match="carries code.*re-save"):
        from_pytorch(tmp_path / "code.pt")
    assert "must not run" not in capsys.readouterr().out
    torch.save({name: torch.from_numpy(array) for name, array in sit.items()}, tmp_path / "a.pt")
    weight_files.write_safetensors(tmp_path / "a.safetensors", sit)
    for name, why in (
        ("a.pt", "damaged.* truncated"),
        ("a.safetensors", "cannot be read as a safetensors file .*incomplete"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=f"cut_{name}: {why}"):
            from_pytorch(tmp_path / f"cut_{name}")
    with pytest.raises(InputError, match="no such file"):
        from_pytorch(tmp_path / "missing.safetensors")


# Compiling is most of the time here, and each program runs once.
@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def run(graphdef, params, *args):
    return functional.merge(graphdef, params)(*args)


def forward(model, *args):
    return run(*functional.split(model), *args)


@pytest.mark.parametrize("lightning", [False, True])
def test_fresh_auxiliary_head_keeps_the_final_prediction(lightning):
    weights = random_weights(release_shapes(**SHAPE, lightning=lightning, auxiliary=False))
    plain = from_pytorch(weights, heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    args = (x, jnp.array([0.1, 0.8]), jnp.array([4, 5]))
    before = forward(plain, *args)
    assert before.auxiliary == () and plain.spec.auxiliary_depths == ()
    model = add_auxiliary_head(plain, 2, nnx.Rngs(0))
    after = forward(model, *args)
    np.testing.assert_allclose(after.final, before.final, rtol=1e-5, atol=1e-5)
    (auxiliary,) = after.auxiliary
    assert auxiliary.shape == x.shape
    # The LightningDiT release does not start its auxiliary head at zero.
    assert np.any(auxiliary) == lightning
    exported = to_pytorch(model)
    assert {name for name in exported if name not in weights} == {
        name for name in exported if name.startswith("final_layer_xr.")
    }
    assert_same({name: exported[name] for name in weights}, weights)
    again = from_pytorch(exported, heads=2, auxiliary_depth=2)
    assert again.spec == model.spec
    for ours, theirs in zip(
        jax.tree.leaves(functional.split(again)[1]),
        jax.tree.leaves(functional.split(model)[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_auxiliary_head_is_added_once_and_inside(sit):
    model = from_pytorch(sit, **GIVEN)
    with pytest.raises(InputError, match="has an auxiliary head after block 1 already"):
        add_auxiliary_head(model, 1, nnx.Rngs(0))
    plain = {name: array for name, array in sit.items() if "final_layer_xr" not in name}
    with pytest.raises(InputError, match=r"auxiliary_depths is \(3,\): expected incr.*1…2"):
        add_auxiliary_head(from_pytorch(plain, heads=2), 3, nnx.Rngs(0))
    with pytest.raises(InputError, match="auxiliary_depth is 1, but there is no auxiliary head"):
        from_pytorch(plain, **GIVEN)


def test_several_heads_come_back_under_names_of_our_own(sit):
    second = {
        name.replace("_xr.", "_xr_2."): array + 1
        for name, array in sit.items()
        if name.startswith("final_layer_xr.")
    }
    with pytest.raises(InputError, match="the 2 heads' depths cannot be told.*depth, 1…2"):
        from_pytorch(sit | second, heads=2)
    model = from_pytorch(sit | second, heads=2, auxiliary_depth=(1, 2))
    assert model.spec.auxiliary_depths == (1, 2)
    weights = to_pytorch(model)
    assert_same(dict(sorted(weights.items())), dict(sorted((sit | second).items())))
    args = (jax.random.normal(jax.random.key(0), (2, 6, 6, 3)), jnp.ones(2), jnp.array([4, 5]))
    both = forward(model, *args)
    # The second head is where it says, and the first one where it was.
    moved = {name.replace("_xr_2.", "_xr."): array for name, array in second.items()}
    for i, weights, depth in ((0, sit, 1), (1, sit | moved, 2)):
        alone = forward(from_pytorch(weights, heads=2, auxiliary_depth=depth), *args)
        np.testing.assert_allclose(both.auxiliary[i], alone.auxiliary[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(both.final, alone.final, rtol=1e-5, atol=1e-5)
    fresh = add_auxiliary_head(from_pytorch(sit, heads=2, auxiliary_depth=2), 1, nnx.Rngs(0))
    old, new = to_pytorch(fresh)["final_layer_xr_2.linear.weight"], "final_layer_xr.linear.weight"
    np.testing.assert_array_equal(old, sit[new])
    assert not to_pytorch(fresh)[new].any()


def test_parameters_alone_get_heads_inside_a_compiled_function(sit):
    plain = {name: array for name, array in sit.items() if "final_layer_xr" not in name}
    model, with_head = from_pytorch(plain, heads=2), from_pytorch(sit, heads=2, auxiliary_depth=2)
    (_, params), (_, fresh) = map(functional.split, (model, with_head))
    zeros = jax.tree.map(jnp.zeros_like, fresh) | {"auxiliary_head": fresh["auxiliary_head"]}
    add = jax.jit(lambda params, fresh: add_heads(params, model.spec, with_head.spec, fresh))
    jax.tree.map(np.testing.assert_array_equal, add(params, zeros), fresh)
    with pytest.raises(InputError, match=r"auxiliary_depths is \(\): expected \(2,\), where"):
        add_heads(fresh, with_head.spec, model.spec, params)


FULL_SIZE = """
import resource, sys
import numpy as np
from ig_jax.convert.pytorch import from_pytorch, to_pytorch
from tests.release import random_weights, release_shapes, rope_buffers

lightning = sys.argv[1] == "lightningdit"
patch, channels = (1, 32) if lightning else (2, 4)
weights = random_weights(release_shapes(
    width=1152, depth=28, heads=16, patch=patch, channels=channels, tokens=256, classes=1000,
    lightning=lightning,
))
print(sum(array.size for array in weights.values()))
if lightning:
    weights |= rope_buffers(16, 72)
back = to_pytorch(from_pytorch(weights))
assert list(back) == list(weights)
assert all(np.array_equal(back[name], weights[name]) for name in weights)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("family", "count"), [("sit", 677_786_144), ("lightningdit", 677_951_296)])
def test_full_size_weights_come_back_within_8_gib(family, count):
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, family],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    parameters, kilobytes = map(int, run.stdout.split())
    assert parameters == count
    assert kilobytes < 8 * 2**20
