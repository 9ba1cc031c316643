"""Autoencoder weights from both published layouts: golden numbers, full sizes, and bad files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ig_jax.errors import InputError
from ig_jax.models import functional
from ig_jax.models.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderSpec
from ig_jax.storage import weight_files
from ig_jax.storage.autoencoders import autoencoder_from_pytorch, fingerprint
from tests.common import golden, nhwc, relative_error, seeded_weights

GROUPS = {"vae_diffusers_small": 8, "vae_ldm_small": 32}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def small_weights(name: str) -> dict[str, np.ndarray]:
    return seeded_weights(json.loads(str(golden(name)["shapes_json"])))


def old_names(weights: dict[str, np.ndarray], convolutions: bool) -> dict[str, np.ndarray]:
    """Renames attention weights as older diffusers did, as matrices or as 1×1 convolutions."""
    renamed = {}
    for name, array in weights.items():
        for new, old in OLD_NAMES.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if convolutions and array.ndim == 2:
                    array = array[:, :, None, None]
        renamed[name] = array
    return renamed


@pytest.fixture(scope="module", params=sorted(GROUPS))
def small(request) -> tuple[str, Autoencoder]:
    name = request.param
    return name, autoencoder_from_pytorch(small_weights(name), groups=GROUPS[name])


def test_golden(small: tuple[str, Autoencoder]) -> None:
    name, model = small
    numbers = golden(name)
    moments = nnx.jit(Autoencoder.encode)(model, nhwc(numbers["inputs/image"]))
    decoded = nnx.jit(Autoencoder.decode)(model, nhwc(numbers["inputs/latent"]))
    assert relative_error(moments.mean, nhwc(numbers["outputs/mean"])) < 1e-5
    assert relative_error(moments.std, nhwc(numbers["outputs/std"])) < 1e-5
    assert relative_error(decoded, nhwc(numbers["outputs/decoded"])) < 1e-5


def test_inferred_spec(small: tuple[str, Autoencoder]) -> None:
    name, model = small
    diffusers = name == "vae_diffusers_small"
    assert model.spec == AutoencoderSpec(
        width=32,
        multipliers=(1, 2),
        blocks_per_level=1 if diffusers else 2,
        latent_channels=4,
        attention_levels=() if diffusers else (1,),
        groups=GROUPS[name],
    )


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names(convolutions: bool) -> None:
    weights = small_weights("vae_diffusers_small")
    _, new = functional.split(autoencoder_from_pytorch(weights, groups=8))
    _, old = functional.split(autoencoder_from_pytorch(old_names(weights, convolutions), groups=8))
    assert jax.tree.all(jax.tree.map(np.array_equal, new, old))
    assert fingerprint(new) == fingerprint(old)


def test_no_quant_convolutions_mean_identity() -> None:
    weights = small_weights("vae_diffusers_small")
    plain = {name: array for name, array in weights.items() if "quant_conv" not in name}
    identities = {}
    for name, width in (("quant_conv", 8), ("post_quant_conv", 4)):
        identities[f"{name}.weight"] = np.eye(width, dtype=np.float32)[:, :, None, None]
        identities[f"{name}.bias"] = np.zeros(width, np.float32)
    _, found = functional.split(autoencoder_from_pytorch(plain, groups=8))
    _, expected = functional.split(autoencoder_from_pytorch(plain | identities, groups=8))
    assert fingerprint(found) == fingerprint(expected)
    # Half a convolution is a damaged file, and so is none where the network is known to have it.
    half = plain | {"quant_conv.bias": weights["quant_conv.bias"]}
    with pytest.raises(InputError, match="1 missing of .* weights: quant_conv.weight"):
        autoencoder_from_pytorch(half, groups=8)


def test_a_preset_has_its_quant_convolutions(monkeypatch) -> None:
    weights = small_weights("vae_ldm_small")
    spec = autoencoder_from_pytorch(weights).spec
    known = dataclasses.replace(AUTOENCODERS["va-vae-f16d32"], spec=spec)
    monkeypatch.setitem(AUTOENCODERS, "small", known)
    del weights["post_quant_conv.weight"], weights["post_quant_conv.bias"]
    with pytest.raises(
        InputError, match="2 missing of .* weights: post_quant_conv.bias, post_quant"
    ):
        autoencoder_from_pytorch(weights, preset="small")


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "module.first_stage_model."])
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pt", marks=pytest.mark.torch)])
def test_files_with_other_weights(tmp_path: pathlib.Path, prefix: str, suffix: str) -> None:
    weights = small_weights("vae_ldm_small")
    stored = {prefix + name: array for name, array in weights.items()} | {
        "loss.discriminator.main.0.weight": np.ones((64, 3, 4, 4), np.float32),
        "foundation_model.model.cls_token": np.ones((1, 1, 8), np.float32),
        "linear_proj.weight": np.full((8, 4, 1, 1), np.nan, np.float32),
        "model_ema.decay": np.float32(0.999),
    }
    path = tmp_path / f"vae{suffix}"
    if suffix == ".pt":
        import torch

        tensors = {name: torch.tensor(array) for name, array in stored.items()}
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    else:
        weight_files.write_safetensors(path, stored)
    _, read = functional.split(autoencoder_from_pytorch(path))
    _, expected = functional.split(autoencoder_from_pytorch(weights))
    assert fingerprint(read) == fingerprint(expected)


def test_fingerprint_tells_weights_apart() -> None:
    weights = small_weights("vae_diffusers_small")
    _, params = functional.split(autoencoder_from_pytorch(weights, groups=8))
    _, half = functional.split(autoencoder_from_pytorch(weights, groups=8, dtype=jnp.bfloat16))
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + np.float32(1e-6)
    _, changed = functional.split(autoencoder_from_pytorch(weights, groups=8))
    # A change of this text would orphan every latent that was ever prepared.
    assert fingerprint(params) == "088c9cad54ed4907"
    assert fingerprint(half) == fingerprint(params) != fingerprint(changed)
    assert fingerprint(jax.device_get(params)) == fingerprint(params)


def conv(name: str, inputs: int, outputs: int, size: int = 3) -> Iterator[tuple[str, tuple]]:
    yield f"{name}.weight", (outputs, inputs, size, size)
    yield f"{name}.bias", (outputs,)


def norm(name: str, channels: int) -> Iterator[tuple[str, tuple]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def block(name: str, inputs: int, outputs: int, shortcut: str) -> Iterator[tuple[str, tuple]]:
    yield from norm(f"{name}.norm1", inputs)
    yield from conv(f"{name}.conv1", inputs, outputs)
    yield from norm(f"{name}.norm2", outputs)
    yield from conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from conv(f"{name}.{shortcut}", inputs, outputs, 1)


def sd_vae() -> Iterator[tuple[str, tuple]]:
    """Names and shapes of `diffusion_pytorch_model.safetensors` as published for SD-VAE."""
    for half, inputs, outputs in [("encoder", 3, 8), ("decoder", 4, 3)]:
        encoder = half == "encoder"
        blocks = [(128, 128), (128, 256), (256, 512), (512, 512)]
        if not encoder:
            blocks = [(512, 512), (512, 512), (512, 256), (256, 128)]
        yield from conv(f"{half}.conv_in", inputs, blocks[0][0])
        for i, (before, after) in enumerate(blocks):
            stage = f"{half}.{'down' if encoder else 'up'}_blocks.{i}"
            for j in range(2 if encoder else 3):
                yield from block(
                    f"{stage}.resnets.{j}", after if j else before, after, "conv_shortcut"
                )
            if i < 3:
                sampler = "downsamplers" if encoder else "upsamplers"
                yield from conv(f"{stage}.{sampler}.0.conv", after, after)
        for j in range(2):
            yield from block(f"{half}.mid_block.resnets.{j}", 512, 512, "conv_shortcut")
        attention = f"{half}.mid_block.attentions.0"
        yield from norm(f"{attention}.group_norm", 512)
        for part in ("query", "key", "value", "proj_attn"):  # the published file's own names
            yield f"{attention}.{part}.weight", (512, 512)
            yield f"{attention}.{part}.bias", (512,)
        yield from norm(f"{half}.conv_norm_out", blocks[-1][1])
        yield from conv(f"{half}.conv_out", blocks[-1][1], outputs)
    yield from conv("quant_conv", 8, 8, 1)
    yield from conv("post_quant_conv", 4, 4, 1)


def ldm_attention(name: str, channels: int) -> Iterator[tuple[str, tuple]]:
    yield from norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from conv(f"{name}.{part}", channels, channels, 1)


def va_vae() -> Iterator[tuple[str, tuple]]:
    """Names and shapes of the autoencoder inside `vavae-imagenet256-f16d32-dinov2.pt`."""
    widths = [128, 128, 256, 256, 512]
    for half, inputs, outputs in [("encoder", 3, 64), ("decoder", 32, 3)]:
        encoder = half == "encoder"
        yield from conv(f"{half}.conv_in", inputs, 128 if encoder else 512)
        for i, after in enumerate(widths):
            stage = f"{half}.{'down' if encoder else 'up'}.{i}"
            before = widths[max(i - 1, 0)] if encoder else widths[min(i + 1, 4)]
            for j in range(2 if encoder else 3):
                yield from block(
                    f"{stage}.block.{j}", after if j else before, after, "nin_shortcut"
                )
                if i == 4:
                    yield from ldm_attention(f"{stage}.attn.{j}", 512)
            if encoder and i < 4:
                yield from conv(f"{stage}.downsample.conv", after, after)
            if not encoder and i > 0:
                yield from conv(f"{stage}.upsample.conv", after, after)
        yield from block(f"{half}.mid.block_1", 512, 512, "nin_shortcut")
        yield from ldm_attention(f"{half}.mid.attn_1", 512)
        yield from block(f"{half}.mid.block_2", 512, 512, "nin_shortcut")
        yield from norm(f"{half}.norm_out", 512 if encoder else 128)
        yield from conv(f"{half}.conv_out", 512 if encoder else 128, outputs)
    yield from conv("quant_conv", 64, 64, 1)
    yield from conv("post_quant_conv", 32, 32, 1)
    yield "linear_proj.weight", (1024, 32, 1, 1)
    yield "foundation_model.model.pos_embed", (1, 1370, 1024)
    yield from norm("loss.discriminator.main.3", 128)
    yield "loss.discriminator.main.3.num_batches_tracked", ()


@pytest.mark.parametrize(
    ("preset", "layout", "parameters"),
    [("sd-vae-ft-ema", sd_vae, 83_653_863), ("va-vae-f16d32", va_vae, 69_836_067)],
)
def test_full_size(preset: str, layout, parameters: int) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in layout()}
    model = autoencoder_from_pytorch({"state_dict": weights}, preset=preset)
    assert model.spec == AUTOENCODERS[preset].spec
    _, params = functional.split(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    level = "decoder.up_blocks.2.resnets.0" if preset.startswith("sd") else "decoder.up.1.block.0"
    np.testing.assert_array_equal(  # resolution level 1 in both, though diffusers counts backwards
        params["decoder"]["levels"][1]["blocks"][0]["conv1"]["kernel"],
        weights[f"{level}.conv1.weight"].transpose(2, 3, 1, 0),
    )


def test_bfloat16_computes_in_bfloat16() -> None:
    numbers = golden("vae_diffusers_small")
    weights = small_weights("vae_diffusers_small")
    model = autoencoder_from_pytorch(weights, groups=8, dtype=jnp.bfloat16)
    decoded = nnx.jit(Autoencoder.decode)(model, nhwc(numbers["inputs/latent"]))
    assert decoded.dtype == jnp.float32
    assert 1e-4 < relative_error(decoded, nhwc(numbers["outputs/decoded"])) < 3e-2


def without(name: str):
    return lambda weights: weights.pop(name)


def replaced(name: str, array: np.ndarray):
    return lambda weights: weights.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("encoder.conv_in.weight"), "weight encoder.conv_in.weight is missing"),
        (without("decoder.conv_in.weight"), "weight decoder.conv_in.weight is missing"),
        (without("decoder.conv_out.bias"), "1 missing of 124 weights: decoder.conv_out.bias"),
        (replaced("decoder.conv_oat.bias", np.ones(3)), "unexpected: decoder.conv_oat.bias; did"),
        (
            replaced("quant_conv.bias", np.ones(9)),
            r"1 of another shape: quant_conv.bias has \(9,\), expected \(8,\)",
        ),
        (
            replaced("quant_conv.bias", np.full(8, np.nan)),
            "weight quant_conv.bias has 8 NaN or infinite of 8 values",
        ),
        (replaced("encoder.conv_in.weight", np.ones(32)), r"has shape \(32,\), expected 4 axes"),
        (
            replaced("encoder.conv_in.weight", np.ones((48, 3, 3, 3))),
            "level 0 has 32 channels, expected a multiple of the 48",
        ),
    ],
)
def test_bad_weights(change, message: str) -> None:
    weights = small_weights("vae_diffusers_small")
    change(weights)
    with pytest.raises(InputError, match=message) as error:
        autoencoder_from_pytorch(weights, groups=8)
    assert "\n" not in str(error.value)


def test_other_models_and_presets(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sit.safetensors"
    weight_files.write_safetensors(path, {"x_embedder.proj.weight": np.ones((32, 4, 2, 2))})
    message = "sit.safetensors: found no weights of an autoencoder.*top-level keys: x_embedder.proj"
    with pytest.raises(InputError, match=message):
        autoencoder_from_pytorch(path)
    both = {f"{half}.conv_in.weight": np.ones((8, 3, 3, 3)) for half in ("encoder", "decoder")}
    with pytest.raises(InputError, match="neither encoder.down_blocks.* nor encoder.down"):
        autoencoder_from_pytorch(both)
    weights = small_weights("vae_ldm_small")
    with pytest.raises(InputError, match="found width 32.*expected va-vae-f16d32 with width 128"):
        autoencoder_from_pytorch(weights, preset="va-vae-f16d32")
    with pytest.raises(InputError, match="'sd-vae-ft-ma': .*did you mean sd-vae-ft"):
        autoencoder_from_pytorch(weights, preset="sd-vae-ft-ma")
    with pytest.raises(InputError, match="32 channels does not split into 12 groups"):
        autoencoder_from_pytorch(weights, groups=12)
