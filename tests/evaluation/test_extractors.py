"""Feature extractors: batching, sharding, the digits classifier, and images that are refused."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier

from ig_jax.config import default_config
from ig_jax.convert.inception import inception_params
from ig_jax.errors import InputError
from ig_jax.evaluation import extractors, metrics
from ig_jax.evaluation.statistics import gaussian_statistics
from ig_jax.models.pixels import to_uint8
from ig_jax.storage import weight_files
from tests.common import golden, nhwc, relative_error, seeded_weights

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return seeded_weights(json.loads(str(golden("inception_seeded")["shapes_json"])), True)


@pytest.fixture(scope="module")
def inception(weights) -> extractors.InceptionExtractor:
    return extractors.InceptionExtractor(inception_params(weights, "seeded"), "ab", batch_size=2)


@pytest.fixture(scope="module")
def five_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def digits() -> extractors.DigitsExtractor:
    return extractors.DigitsExtractor()


class TestInception:
    def test_golden(self, inception):
        arrays = golden("inception_seeded")
        found = inception(nhwc(arrays["inputs/images_nchw_uint8"]))
        assert relative_error(found.pool, arrays["outputs/pool3"]) < 1e-5
        spatial = nhwc(arrays["outputs/spatial"]).reshape(2, inception.spatial_width)
        assert relative_error(found.spatial, spatial) < 1e-5
        logits = arrays["outputs/logits_unbiased"].astype(np.float64)
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert relative_error(found.probabilities, expected) < 1e-5

    def test_padded_last_batch(self, inception, five_images):
        with jax.transfer_guard("disallow"):
            together = inception(five_images)
        assert together.pool.shape == (5, inception.width)
        assert together.spatial.shape == (5, 2023)
        assert together.probabilities.shape == (5, 1008)
        alone = np.concatenate([inception(image[None]).pool for image in five_images])
        np.testing.assert_allclose(alone, together.pool, atol=1e-5)

    @pytest.mark.slow
    def test_eight_devices_equal_one(self, inception, weights, five_images, tmp_path):
        weight_files.write_safetensors(tmp_path / "weights.safetensors", weights)
        np.savez(tmp_path / "images.npz", five_images)
        code = """
import sys
import jax, numpy as np
from ig_jax.storage import weight_files
from ig_jax.convert.inception import inception_params
from ig_jax.evaluation.extractors import InceptionExtractor
folder = sys.argv[1]
assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("data", "model"))
params = inception_params(weight_files.read_weights(f"{folder}/weights.safetensors"), "seeded")
extractor = InceptionExtractor(params, "ab", batch_size=5, mesh=mesh)
assert extractor.batch_size == 8
found = extractor(np.load(f"{folder}/images.npz")["arr_0"])
np.savez(f"{folder}/found.npz", pool=found.pool, spatial=found.spatial)
"""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=300
        )
        one = inception(five_images)
        with np.load(tmp_path / "found.npz") as eight:
            assert relative_error(eight["pool"], one.pool) < 1e-5
            assert relative_error(eight["spatial"], one.spatial) < 1e-5

    def test_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="download https://github.com/mseitzer/pytorch-fid"):
            extractors.InceptionExtractor.from_file(tmp_path / "no.pth")

    @pytest.mark.parametrize(
        "images, message",
        [
            (np.zeros((2, 64, 64, 3), np.float32), "dtype float32, expected uint8"),
            (np.zeros((2, 64, 64, 1), np.uint8), r"shape \(2, 64, 64, 1\), expected \(N, any, any"),
            (np.zeros((64, 64, 3), np.uint8), r"shape \(64, 64, 3\)"),
            (np.zeros((0, 64, 64, 3), np.uint8), r"shape \(0, 64, 64, 3\)"),
        ],
    )
    def test_other_images_are_refused(self, inception, images, message):
        with pytest.raises(InputError, match=message):
            inception(images)


class TestPhotos:
    def test_reads_crops_and_is_what_auto_means(self):
        found = extractors.PhotosExtractor()
        images, labels = found.real()
        assert found.accuracy > 0.95 and found.fingerprint != extractors.DigitsExtractor.__name__
        assert np.mean(found.classify(images[:512]) == labels[:512]) > 0.95
        with pytest.raises(InputError, match="expected .N, 32, 32, 3. for photos-mlp"):
            found(images[:2, :8, :8])
        config = default_config()
        config.data.name = "photos"
        assert extractors.check_name(config) == "photos"


class TestDigits:
    def test_reads_held_out_digits(self, digits):
        assert digits.accuracy >= 0.97

    def test_shapes_and_probabilities(self, digits):
        images, labels = extractors.digits_images()
        found = digits(images)
        assert images.shape == (1797, 8, 8, 1) and labels.shape == (1797,)
        assert found.pool.shape == (1797, digits.width) and found.pool.dtype == np.float32
        assert found.spatial is None and digits.spatial_width is None
        np.testing.assert_allclose(found.readings.sum(1), 1, atol=1e-5)
        np.testing.assert_array_equal(digits.classify(images), found.readings.argmax(1))
        assert np.mean(digits.classify(images) == labels) > 0.98

    def test_seed_decides_everything(self, digits):
        assert extractors.DigitsExtractor().fingerprint == digits.fingerprint
        assert extractors.DigitsExtractor(seed=1).fingerprint != digits.fingerprint

    def test_quantisation_does_not_hurt(self, digits):
        """Quantising moves the distance by far less than the distance between halves of the data.

        The reference reads the unquantised pixels by the classifier's own weights.
        """
        images, _ = extractors.digits_images()
        pixels = images.astype(np.float64) / 255
        noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 0.1, pixels.shape), 0, 1)
        exact = noisy.reshape(len(noisy), -1) @ digits._weights[0] + digits._biases[0]
        real = gaussian_statistics(digits(images).pool)
        unquantised = metrics.frechet_distance(gaussian_statistics(np.maximum(exact, 0)), real)
        rounded = digits(to_uint8(noisy * 2 - 1).checked())
        quantised = metrics.frechet_distance(gaussian_statistics(rounded.pool), real)
        halves = metrics.frechet_distance(
            gaussian_statistics(digits(images[::2]).pool),
            gaussian_statistics(digits(images[1::2]).pool),
        )
        assert abs(quantised - unquantised) < 0.01 * halves

    def test_distance_and_recall_see_a_missing_class(self, digits):
        images, labels = extractors.digits_images()
        real, seven = digits(images[::2]).pool, digits(images[1::2])
        whole = metrics.frechet_distance(gaussian_statistics(real), gaussian_statistics(seven.pool))
        kept = seven.pool[labels[1::2] != 7]
        missing = metrics.frechet_distance(gaussian_statistics(real), gaussian_statistics(kept))
        assert missing > 2 * whole
        full_recall = metrics.precision_recall(real, seven.pool).recall
        assert metrics.precision_recall(real, kept).recall < full_recall - 0.05

    def test_ctrl_c_ends_its_training(self, monkeypatch):
        """scikit-learn would warn, and return a classifier that is half trained."""

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(MLPClassifier, "_backprop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extractors.DigitsExtractor()

    def test_other_images_are_refused(self, digits):
        with pytest.raises(InputError, match="dtype float64, expected uint8"):
            digits(np.zeros((2, 8, 8, 1)))
        with pytest.raises(InputError, match=r"shape \(2, 16, 16, 1\), expected \(N, 8, 8, 1\)"):
            digits(np.zeros((2, 16, 16, 1), np.uint8))
