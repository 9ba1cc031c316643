"""DINOv2 against the release by golden numbers: resize, position table and features."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.convert.dinov2 import dinov2_params
from ig_jax.evaluation.extractors import DinoV2Extractor
from ig_jax.models import dinov2
from tests.common import golden, nhwc, relative_error, seeded_weights


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return golden("dinov2_seeded")


@pytest.fixture(scope="module")
def weights(arrays) -> dict[str, np.ndarray]:
    return seeded_weights(json.loads(str(arrays["shapes_json"])))


@pytest.fixture(scope="module")
def extractor(weights) -> DinoV2Extractor:
    return DinoV2Extractor(*dinov2_params(weights, "seeded", heads=4), "ab", batch_size=3)


def test_position_table(arrays, weights):
    found = dinov2.interpolate_positions(weights["pos_embed"][0])
    np.testing.assert_allclose(found, arrays["outputs/position_16x16"][0], atol=2e-5)


def test_resize(arrays):
    images = nhwc(arrays["inputs/images_97_nchw_uint8"]).astype(np.float32)
    row = np.asarray(dinov2.resize_bicubic(jnp.asarray(images)))[:, 100]
    np.testing.assert_allclose(np.moveaxis(row, -1, 1), arrays["outputs/resized_97_row"], atol=1e-3)


@pytest.mark.parametrize("size", [97, 256])
def test_features(arrays, extractor, size):
    """Of pictures that grow and that shrink, in a batch that is filled up."""
    found = extractor(nhwc(arrays[f"inputs/images_{size}_nchw_uint8"]))
    assert found.pool.shape == (2, 64) and found.spatial is None and found.probabilities is None
    assert relative_error(found.pool, arrays[f"outputs/features_{size}"]) < 1e-5
    np.testing.assert_allclose(found.pool, arrays[f"outputs/features_{size}"], atol=1e-4)
