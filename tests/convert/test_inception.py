"""The Inception weight file: names, folding of batch norms, hash, and what is refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ig_jax.convert import inception as convert
from ig_jax.errors import InputError
from ig_jax.storage import weight_files
from tests.common import golden, seeded_weights


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return seeded_weights(json.loads(str(golden("inception_seeded")["shapes_json"])), True)


def test_expected_names_are_those_of_the_pytorch_port():
    shapes = json.loads(str(golden("inception_seeded")["shapes_json"]))
    assert convert.expected_shapes() == {name: tuple(shape) for name, shape in shapes.items()}


def test_folding_equals_convolution_then_batch_norm(weights):
    params = convert.inception_params(weights, "seeded")
    name, conv = "Mixed_6b.branch7x7_2", params["mixed_6b"]["branch7x7_2"]
    patch = np.random.default_rng(0).standard_normal((1, 7, 128))
    kernel = weights[f"{name}.conv.weight"].astype(np.float64)
    plain = np.einsum("hwi,oihw->o", patch, kernel)
    gain, bias, mean, variance = (
        weights[f"{name}.bn.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = (plain - mean) / np.sqrt(variance + 1e-3) * gain + bias
    folded = np.einsum("hwi,hwio->o", patch, conv["kernel"]) + conv["bias"]
    np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-5)


def test_counters_are_ignored_and_the_bias_is_not_used(weights):
    counted = weights | {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.asarray(3)}
    params = convert.inception_params(counted, "seeded")
    np.testing.assert_array_equal(params["fc"], weights["fc.weight"].T)
    assert set(params) >= {"conv2d_1a_3x3", "mixed_7c", "fc"} and "fc_bias" not in params


def test_file_round_trip_and_hash(weights, tmp_path):
    path = tmp_path / "inception.safetensors"
    weight_files.write_safetensors(path, weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    params, found = convert.load_inception(path, sha256_prefix=digest[:8])
    assert found == digest
    expected = convert.inception_params(weights, "seeded")
    np.testing.assert_array_equal(
        params["mixed_7c"]["branch_pool"]["kernel"], expected["mixed_7c"]["branch_pool"]["kernel"]
    )
    with pytest.raises(InputError, match=f"starts with {digest[:8]}, expected 6726825d"):
        convert.load_inception(path)


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError) as caught:
        convert.load_inception(tmp_path / "nowhere.pth")
    line = str(caught.value)
    assert "\n" not in line and "nowhere.pth" in line
    assert "pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth" in line
    assert "6726825d)" in line


@pytest.mark.parametrize("change", ["missing", "shape", "nan", "foreign"])
def test_wrong_weights_are_named(weights, change):
    weights, name = dict(weights), "Mixed_5b.branch1x1.conv.weight"
    if change == "missing":
        del weights[name]
    elif change == "shape":
        weights[name] = weights[name][:3]
    elif change == "nan":
        weights[name] = np.full_like(weights[name], np.nan)
    else:
        name = "AuxLogits.conv0.conv.weight"
        weights[name] = np.zeros((2, 2))
    with pytest.raises(InputError, match=f"(?s)^a.pth: .*{name}") as caught:
        convert.inception_params(weights, "a.pth")
    assert "\n" not in str(caught.value)
