"""Published autoencoder weights (SD-VAE, VA-VAE) under diffusers' or LDM's names, into ours.

The network's shape is read off the names and shapes, so any KL autoencoder of that family loads.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ig_jax.errors import InputError, look_up, suggest
from ig_jax.models import functional
from ig_jax.models.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderSpec, abstract
from ig_jax.storage import weight_files
from ig_jax.storage.files import digest

# How each segment of one of our parameter paths is called elsewhere.
_LDM = {
    "blocks": "block",
    "attentions": "attn",
    "downsample": "downsample.conv",
    "upsample": "upsample.conv",
    "middle": "mid",
    "block1": "block_1",
    "block2": "block_2",
    "attention": "attn_1",
    "shortcut": "nin_shortcut",
    "group_norm": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
    "kernel": "weight",
    "scale": "weight",
}
_DIFFUSERS = {
    "blocks": "resnets",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "middle": "mid_block",
    "block1": "resnets.0",
    "block2": "resnets.1",
    "attention": "attentions.0",
    "norm_out": "conv_norm_out",
    "shortcut": "conv_shortcut",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
    "kernel": "weight",
    "scale": "weight",
}
_OLD_DIFFUSERS = _DIFFUSERS | {
    "query": "query",
    "key": "key",
    "value": "value",
    "out": "proj_attn",
}

_OURS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Weights that both layouts have.
_LANDMARKS = tuple(
    f"{half}.{conv}.weight" for half in ("encoder", "decoder") for conv in ("conv_in", "conv_out")
)
_ATTENTION_WEIGHT = re.compile(
    r"\.(to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn|q|k|v|proj_out)\.weight$"
)


def autoencoder_from_pytorch(
    source: os.PathLike | str | Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    groups: int = 32,
    preset: str | None = None,
) -> Autoencoder:
    """Loads a KL autoencoder from diffusers-named or LDM-named weights.

    Args:
        source: a file (`weight_files.SUFFIXES`), or its content: arrays by name, in PyTorch's (out,
            in, height, width) order, wrapped as checkpoints do or bare. Weights of losses,
            discriminators, foundation models and averages are ignored. Without a preset, a missing
            1×1 convolution before or after the latents (`quant_conv`) means identity.
        dtype: what the module computes in, float32 or bfloat16; parameters stay float32.
        groups: groups of the group norms, which shapes do not tell (all published ones: 32).
        preset: a name in `AUTOENCODERS` whose network the weights must be, or None for any.

    Returns:
        The module: `encode` of (B, H, W, 3) images in [−1, 1], `decode` of (B, h, w, C) latents.

    Raises:
        InputError: if the file cannot be read, is no such autoencoder or not the preset's; if a
            weight is missing, unexpected, of another shape, NaN or infinite.
    """
    if isinstance(source, Mapping):
        where, content = "autoencoder weights", source
    else:
        where, content = str(source), weight_files.read_checkpoint(source)
    weights = _select(content, where)
    names = _names(weights, where)
    spec = _infer_spec(weights, names, groups, where)
    _check_preset(spec, preset, where)
    if preset is None:  # those in the table all have them, where a missing one is damage
        weights |= _quant_identities(weights, spec.latent_channels)

    graphdef, shapes = functional.split(abstract(spec, dtype))
    paths = traverse_util.flatten_dict(shapes)
    their_names = {path: _their_name(path, names, len(spec.multipliers)) for path in paths}
    expected = {their_names[path]: _their_shape(leaf.shape) for path, leaf in paths.items()}
    weight_files.match_keys(expected, weights, where)
    weight_files.check_finite(weights, where)
    params = {path: jnp.asarray(_our_array(weights[their_names[path]])) for path in paths}
    return functional.merge(graphdef, traverse_util.unflatten_dict(params))


def fingerprint(params: Mapping[str, Any]) -> str:
    """Returns 16 hex digits of the SHA-256 of an autoencoder's parameters (a nested dict).

    It depends on names, shapes and float32 values alone, so the same weights from either layout,
    on any device and for any compute dtype, have the same fingerprint.
    """
    flat = traverse_util.flatten_dict(dict(params))
    named = sorted((".".join(map(str, path)), leaf) for path, leaf in flat.items())
    parts = ((f"{name} {leaf.shape}\n", np.asarray(leaf, np.float32)) for name, leaf in named)
    return digest(*itertools.chain.from_iterable(parts))[:16]


def _select(content: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Returns the autoencoder's own weights; attention ones as matrices, however stored."""
    weights = weight_files.network_weights(content, _LANDMARKS, "an autoencoder", where)
    ours = {name: array for name, array in weights.items() if name.startswith(_OURS)}
    for name, array in ours.items():
        if _ATTENTION_WEIGHT.search(name) and array.shape[2:] == (1, 1):
            ours[name] = array[:, :, 0, 0]
    return ours


def _names(weights: Mapping[str, Any], where: str) -> Mapping[str, str]:
    if any(name.startswith("encoder.down_blocks.") for name in weights):
        old = any(".attentions." in name and ".query." in name for name in weights)
        return _OLD_DIFFUSERS if old else _DIFFUSERS
    if any(name.startswith("encoder.down.") for name in weights):
        return _LDM
    raise InputError(
        f"{where}: found neither encoder.down_blocks.… (diffusers) nor encoder.down.… (LDM); "
        "expected an autoencoder under one of those names"
    )


def _infer_spec(
    weights: Mapping[str, np.ndarray], names: Mapping[str, str], groups: int, where: str
) -> AutoencoderSpec:
    """Reads the network's shape off the encoder's names and the shapes of a few weights."""
    down = r"encoder\.down\." if names is _LDM else r"encoder\.down_blocks\."
    blocks, attentions = names["blocks"], names.get("attentions", "attentions")

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            closest = suggest(name, list(weights), limit=1)
            raise InputError(f"{where}: weight {name} is missing{closest}")
        if weights[name].ndim != 4:
            raise InputError(
                f"{where}: weight {name} has shape {weights[name].shape}, expected 4 axes"
            )
        return weights[name].shape

    def indices(pattern: str) -> list[int]:
        matches = (re.match(down + pattern, name) for name in weights)
        return sorted({int(match[1]) for match in matches if match})

    width, image_channels = shape("encoder.conv_in.weight")[:2]
    prefix = down.replace("\\", "")
    levels = range(max(indices(r"(\d+)\."), default=-1) + 1)
    widths = [shape(f"{prefix}{i}.{blocks}.0.conv1.weight")[0] for i in levels]
    for i in levels:
        if width == 0 or widths[i] % width:
            raise InputError(
                f"{where}: level {i} has {widths[i]} channels, expected a multiple of the "
                f"{width} of encoder.conv_in.weight"
            )
    return AutoencoderSpec(
        width=width,
        multipliers=tuple(w // width for w in widths),
        blocks_per_level=max(indices(rf"\d+\.{blocks}\.(\d+)\.")) + 1,
        latent_channels=shape("decoder.conv_in.weight")[1],
        attention_levels=tuple(indices(rf"(\d+)\.{attentions}\.")),
        groups=groups,
        image_channels=image_channels,
    )


def _check_preset(spec: AutoencoderSpec, preset: str | None, where: str) -> None:
    if preset is None:
        return
    expected = look_up(AUTOENCODERS, preset, "autoencoder").spec
    if spec != expected:
        raise InputError(
            f"{where}: found {_describe(spec)}, expected {preset} with {_describe(expected)}"
        )


def _quant_identities(weights: Mapping[str, Any], channels: int) -> dict[str, np.ndarray]:
    """Identities for the convolutions around the latents that an autoencoder does without."""
    identities = {}
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if not any(key.startswith(f"{name}.") for key in weights):
            identities[f"{name}.weight"] = np.eye(width, dtype=np.float32)[:, :, None, None]
            identities[f"{name}.bias"] = np.zeros(width, np.float32)
    return identities


def _describe(spec: AutoencoderSpec) -> str:
    return (
        f"width {spec.width}, multipliers {spec.multipliers}, {spec.blocks_per_level} blocks per "
        f"level, {spec.latent_channels} latent channels, attention at levels "
        f"{spec.attention_levels}"
    )


def _their_name(path: tuple[str | int, ...], names: Mapping[str, str], levels: int) -> str:
    """Translates one of our parameter paths, `("encoder", "levels", 0, "blocks", …)`."""
    half, *rest = path
    if len(rest) > 1 and rest[0] == "levels":
        level = rest[1]
        if names is _LDM:
            start = f"down.{level}" if half == "encoder" else f"up.{level}"
        else:  # diffusers counts decoder blocks in the order they run, from the lowest resolution
            start = (
                f"down_blocks.{level}" if half == "encoder" else f"up_blocks.{levels - 1 - level}"
            )
        rest = [start, *rest[2:]]
    return ".".join(names.get(segment, str(segment)) for segment in (half, *rest))


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape


def _our_array(array: np.ndarray) -> np.ndarray:
    """Turns (out, in) and (out, in, height, width) into (in, out) and (height, width, in, out)."""
    array = np.asarray(array, np.float32)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array
