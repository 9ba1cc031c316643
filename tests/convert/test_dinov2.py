"""DINOv2's weight files: both kinds of names, the architecture, and what is refused."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
import pytest

from ig_jax.convert import dinov2 as convert
from ig_jax.errors import InputError
from ig_jax.models.dinov2 import DinoV2Spec
from ig_jax.storage import weight_files
from tests.common import golden, seeded_weights


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return seeded_weights(json.loads(str(golden("dinov2_seeded")["shapes_json"])))


def hub_names(weights):
    """The same weights as `facebook/dinov2-*` on the hub has them."""
    plain = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    found = {theirs: weights[ours] for ours, theirs in plain.items()}
    for index in range(3):
        release, layer = f"blocks.{index}", f"encoder.layer.{index}"
        for end in ("weight", "bias"):
            parts = np.split(weights[f"{release}.attn.qkv.{end}"], 3)
            for part, array in zip(("query", "key", "value"), parts, strict=True):
                found[f"{layer}.attention.attention.{part}.{end}"] = array
            dense = weights[f"{release}.attn.proj.{end}"]
            found[f"{layer}.attention.output.dense.{end}"] = dense
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{layer}.{name}.{end}"] = weights[f"{release}.{name}.{end}"]
        for scale in (1, 2):
            found[f"{layer}.layer_scale{scale}.lambda1"] = weights[f"{release}.ls{scale}.gamma"]
    return found


def test_expected_names_are_the_releases():
    shapes = json.loads(str(golden("dinov2_seeded")["shapes_json"]))
    del shapes["mask_token"]
    expected = convert.expected_shapes(DinoV2Spec(64, 3, 4))
    assert expected == {name: tuple(shape) for name, shape in shapes.items()}


def test_files_of_both_kinds_are_the_same(weights, tmp_path):
    found = []
    for name, arrays in (("release", weights), ("hub", hub_names(weights))):
        path = tmp_path / f"{name}.safetensors"
        weight_files.write_safetensors(path, arrays)
        spec, params, digest = convert.load_dinov2(path)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert spec == DinoV2Spec(64, 3, 1)  # a head for every 64 features
        found.append(params)
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    jax.tree.map(np.testing.assert_array_equal, *found)
    _, expected = convert.dinov2_params(weights, "seeded")
    jax.tree.map(np.testing.assert_array_equal, found[0], expected)


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match="nowhere.pth: DINOv2 weights not found; download https"):
        convert.load_dinov2(tmp_path / "nowhere.pth")


def test_another_network_is_refused(tmp_path):
    weight_files.write_safetensors(tmp_path / "x.safetensors", {"conv.weight": np.zeros((2, 2))})
    with pytest.raises(
        InputError, match="x.safetensors: found no weights of a DINOv2, such as cls"
    ):
        convert.load_dinov2(tmp_path / "x.safetensors")


@pytest.mark.parametrize("names", ["release", "hub"])
@pytest.mark.parametrize("change", ["missing", "shape", "nan", "foreign"])
def test_wrong_weights_are_named(weights, names, change):
    weights = dict(weights if names == "release" else hub_names(weights))
    last = "blocks.2.norm2.bias" if names == "release" else "encoder.layer.2.norm2.bias"
    name = "blocks.2.norm2.bias"
    if change == "missing":
        del weights[last]
    elif change == "shape":
        weights[last] = weights[last][:3]
    elif change == "nan":
        weights[last] = np.full_like(weights[last], np.nan)
    else:
        name = "register_tokens"
        weights[name] = np.zeros((1, 4, 64))
    with pytest.raises(InputError, match=f"^a.pth: .*{name}") as caught:
        convert.dinov2_params(weights, "a.pth")
    assert "\n" not in str(caught.value)


def test_widths_without_whole_heads(weights):
    narrow = weights | {"cls_token": np.zeros((1, 1, 63), np.float32)}
    with pytest.raises(InputError, match="a.pth: class token of width 63, expected .* of 64"):
        convert.dinov2_params(narrow, "a.pth")
