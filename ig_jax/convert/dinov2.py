"""Loads DINOv2 from facebookresearch's `.pth` files or the hub's safetensors, told by their names.

The architecture is read off names and shapes: ViT-S, B and L, without registers. (ViT-g has another
MLP.) The position table is brought to 224×224 pixels here, once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np

from ig_jax.errors import InputError
from ig_jax.models import functional
from ig_jax.models.dinov2 import (
    PATCH,
    TRAINED_GRID,
    DinoV2Spec,
    abstract,
    interpolate_positions,
)
from ig_jax.paths import resolve
from ig_jax.storage import weight_files
from ig_jax.storage.files import file_digest

# The network that EDM2's FD-DINOv2 is defined with.
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
HEAD_WIDTH = 64

# Our parameter of a block → the release's.
_BLOCK = {
    "norm1.scale": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "qkv.kernel": "attn.qkv.weight",
    "qkv.bias": "attn.qkv.bias",
    "proj.kernel": "attn.proj.weight",
    "proj.bias": "attn.proj.bias",
    "gamma1": "ls1.gamma",
    "norm2.scale": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "fc1.kernel": "mlp.fc1.weight",
    "fc1.bias": "mlp.fc1.bias",
    "fc2.kernel": "mlp.fc2.weight",
    "fc2.bias": "mlp.fc2.bias",
    "gamma2": "ls2.gamma",
}
# Part of the hub's names → the release's.
_HUB = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.attention.": "attn.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}
_LANDMARKS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight")
_HUB_LANDMARKS = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "layernorm.weight",
)


def expected_shapes(spec: DinoV2Spec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight that is read, by the release's name."""
    width = spec.width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + TRAINED_GRID**2, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    block = abstract(spec)[1]["blocks"]
    for index in range(spec.depth):
        for ours, theirs in _BLOCK.items():
            # The first axis counts blocks; kernels are (in, out) here and (out, in) there.
            shapes[f"blocks.{index}.{theirs}"] = _at(block, ours).shape[:0:-1]
    return shapes


def dinov2_params(
    weights: Mapping[str, np.ndarray], where: str, heads: int | None = None
) -> tuple[DinoV2Spec, functional.Params]:
    """Turns a state dict under either of the two kinds of names into our parameters.

    Args:
        weights: arrays by name.
        where: the file, for messages.
        heads: of attention, if not one for every 64 features.

    Returns:
        The architecture and the nested dict of `DinoV2`'s parameters, float32.

    Raises:
        InputError: if weights are missing, unexpected, of another shape, or not finite.
    """
    if any(name.startswith("embeddings.") for name in weights):
        weights = _from_hub(weights)
    weights = {name: w for name, w in weights.items() if name != "mask_token"}  # for training
    spec = _spec(weights, where, heads)
    weight_files.match_keys(expected_shapes(spec), weights, where)
    weight_files.check_finite(weights, where)
    _, params = abstract(spec)
    blocks = range(spec.depth)
    for ours, theirs in _BLOCK.items():
        stacked = np.stack([weights[f"blocks.{index}.{theirs}"].T for index in blocks])
        _put(params["blocks"], ours, stacked)
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(-1, spec.width)
    _put(params, "patch_embed.kernel", kernel)
    _put(params, "patch_embed.bias", weights["patch_embed.proj.bias"])
    _put(params, "class_token", weights["cls_token"][0, 0])
    _put(params, "position", interpolate_positions(weights["pos_embed"][0]))
    _put(params, "norm.scale", weights["norm.weight"])
    _put(params, "norm.bias", weights["norm.bias"])
    return spec, params


def load_dinov2(path: os.PathLike | str) -> tuple[DinoV2Spec, functional.Params, str]:
    """Reads, checks and converts a weight file.

    Args:
        path: facebookresearch's `dinov2_vitl14_pretrain.pth` (or S, B), or the hub's
            `facebook/dinov2-large/model.safetensors`; local or gs://.

    Returns:
        The architecture, the parameters of `DinoV2` and the file's SHA-256 in hex.

    Raises:
        InputError: if the file is missing (the line says where to get it) or does not hold these
            weights.
    """
    file = resolve(path)
    if not file.exists() or file.is_dir():
        raise InputError(
            f"{path}: DINOv2 weights not found; download {URL}, or model.safetensors of "
            "facebook/dinov2-large"
        )
    content = weight_files.read_checkpoint(path)
    hub = any(str(name).startswith("embeddings.") for name in content)
    landmarks = _HUB_LANDMARKS if hub else _LANDMARKS
    weights = weight_files.network_weights(content, landmarks, "a DINOv2", str(path))
    return *dinov2_params(weights, str(path)), file_digest(file)


def _spec(weights: Mapping[str, np.ndarray], where: str, heads: int | None) -> DinoV2Spec:
    found = weights["cls_token"].shape[-1:] if "cls_token" in weights else ()
    width = found[0] if found else 0
    if width < 1 or (heads is None and width % HEAD_WIDTH):
        raise InputError(
            f"{where}: class token of width {width}, expected DINOv2's cls_token with a multiple "
            f"of {HEAD_WIDTH} features"
        )
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in weights]
    depth = 1 + max((int(number[1]) for number in numbers if number), default=0)
    return DinoV2Spec(width, depth, heads or width // HEAD_WIDTH)


def _from_hub(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The release's names for the hub's; query, key and value become one matrix again."""
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in _HUB.items():
            name = name.replace(theirs, ours)
        renamed[name] = weight
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            whole = np.concatenate([renamed.pop(part) for part in parts])
            renamed[name.replace("query", "qkv")] = whole
    return renamed


def _at(params: functional.Params, path: str) -> np.ndarray:
    for name in path.split("."):
        params = params[name]
    return params


def _put(params: functional.Params, path: str, array: np.ndarray) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        params = params[parent]
    params[name] = np.ascontiguousarray(array, np.float32)
