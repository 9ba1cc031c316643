"""Inception-v3 against the PyTorch port, and its pools and resize against plain arithmetic."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.convert.inception import abstract_inception, inception_params
from ig_jax.models import functional, inception
from tests.common import golden, nhwc, relative_error, seeded_weights


@pytest.fixture(scope="module")
def case():
    """(golden arrays, parameters, jitted forward)."""
    arrays = golden("inception_seeded")
    weights = seeded_weights(json.loads(str(arrays["shapes_json"])), inception=True)
    graphdef, _ = abstract_inception()
    forward = jax.jit(lambda params, x: functional.merge(graphdef, params)(x))
    return arrays, inception_params(weights, "seeded"), forward


def test_golden(case):
    arrays, params, forward = case
    output = forward(params, nhwc(arrays["inputs/images_nchw_uint8"]))
    assert relative_error(output.pool3, arrays["outputs/pool3"]) < 1e-5
    assert relative_error(output.spatial, nhwc(arrays["outputs/spatial"])) < 1e-5
    assert relative_error(output.logits, arrays["outputs/logits_unbiased"]) < 1e-5
    for name in ("pool3", "logits"):
        expected = arrays["outputs/pool3" if name == "pool3" else "outputs/logits_unbiased"]
        np.testing.assert_allclose(getattr(output, name), expected, atol=1e-4)


def test_an_image_does_not_see_its_batch(case):
    arrays, params, forward = case
    images = nhwc(arrays["inputs/images_nchw_uint8"])
    forwards, backwards = forward(params, images), forward(params, images[::-1])
    np.testing.assert_allclose(forwards.pool3, backwards.pool3[::-1], atol=1e-5)
    assert relative_error(forwards.pool3[0], forwards.pool3[1]) > 1e-3


def test_output_sizes_without_running():
    graphdef, params = abstract_inception()
    output = jax.eval_shape(
        lambda p, x: functional.merge(graphdef, p)(x),
        params,
        jax.ShapeDtypeStruct((3, 256, 200, 3), jnp.uint8),
    )
    assert output.pool3.shape == (3, inception.POOL_WIDTH) == (3, 2048)
    assert output.spatial.shape == (3, 17, 17, inception.SPATIAL_CHANNELS)
    assert inception.SPATIAL_WIDTH == 2023
    assert output.logits.shape == (3, 1008)


@pytest.mark.parametrize("height, width", [(64, 256), (299, 512)])
def test_resize_is_tf1_bilinear(height, width):
    """Output (i, j) is the bilinear value at (i·H/299, j·W/299), the last row and column held."""
    image = np.random.default_rng(0).uniform(0, 255, (height, width))

    def interpolate(rows: np.ndarray, length: int) -> np.ndarray:
        at = np.arange(299) * length / 299
        low = np.floor(at + 1e-9).astype(int)
        part = (at - low)[:, None]
        return rows[low] * (1 - part) + rows[np.minimum(low + 1, length - 1)] * part

    expected = interpolate(interpolate(image, height).T, width).T
    actual = inception.resize_bilinear_tf1(jnp.asarray(image, jnp.float32)[None, :, :, None])
    np.testing.assert_allclose(actual[0, :, :, 0], expected, atol=0.02)


def test_average_pool_leaves_padding_out():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    pooled = inception.average_pool(x)[0, :, :, 0]
    np.testing.assert_allclose(pooled[0, 0], np.mean([0, 1, 4, 5]))
    np.testing.assert_allclose(pooled[1, 0], np.mean([0, 1, 4, 5, 8, 9]))
    np.testing.assert_allclose(pooled[1, 1], np.mean([0, 1, 2, 4, 5, 6, 8, 9, 10]))
    np.testing.assert_allclose(inception.average_pool(jnp.ones((1, 5, 6, 2))), 1, rtol=1e-6)
