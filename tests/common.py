"""What many tests share: the golden numbers, relative errors, and weights seeded by name."""

from __future__ import annotations

import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ig_jax.config import default_config

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of `tests/golden/{name}.npz` (computed with the authors' PyTorch code)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def nhwc(array: np.ndarray) -> np.ndarray:
    """Turns a golden (..., C, H, W) array into ours, (..., H, W, C)."""
    return np.moveaxis(array, -3, -1)


def relative_error(actual: Any, expected: Any) -> float:
    """Returns ‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) + 1e-30))


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], inception: bool = False) -> dict:
    """Makes the weights of the autoencoders', Inception's and DINOv2's golden runs from names."""
    weights = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        r = np.random.default_rng([zlib.crc32(name.encode()), 0]).standard_normal(shape)
        if name in ("pos_embed", "cls_token", "mask_token"):
            r = 0.5 * r
        elif len(shape) >= 2:
            r = r / math.sqrt(math.prod(shape[1:]))
            if inception and len(shape) == 4:
                r = r * math.sqrt(2)
        elif name.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        elif name.endswith("gamma") or (
            name.endswith("weight") and ("norm" in name or ".bn." in name)
        ):
            r = 1 + 0.1 * r
        else:
            r = 0.1 * r
        weights[name] = r.astype(np.float32)
    return weights


def tiny_config(**train: Any) -> ConfigDict:
    """The digits experiment with a network of a few thousand parameters, for tests of the loop."""
    config = default_config("sit", "s")
    config.model.update(
        width=32,
        depth=3,
        heads=2,
        auxiliary_depth=1,
        input_size=8,
        channels=1,
        patch_size=2,
        num_classes=10,
    )
    config.data.update(name="digits", image_size=8, num_validation=100, autoencoder="")
    config.optimizer.update(learning_rate=1e-3)
    config.train.update(
        batch_size=32,
        num_steps=6,
        ema_decay=0.9,
        log_every=2,
        validate_every=3,
        sample_every=0,
        checkpoint_every=3,
    )
    config.train.update(train)
    config.sampler.update(name="heun", num_steps=3, num_samples=16, batch_size=16)
    config.evaluation.update(num_samples=64, ig_scales=(0.0, 1.0, 2.0))
    return config
