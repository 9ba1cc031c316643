"""scikit-learn's 1,797 handwritten 8×8 digits: real images that need no download.

Pixels 0…16 become [−1, 1] (`x = pixel/8 − 1`) and are trained on directly, as if they were latents.
"""

from __future__ import annotations

import functools

import numpy as np

from ig_jax.data.source import ArraySource, DataSource
from ig_jax.errors import InputError


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns all digits, (1797, 8, 8, 1) float32 in [−1, 1], and their (1797,) int32 labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] / 8 - 1).astype(np.float32)
    return images, digits.target.astype(np.int32)


def open_digits(num_validation: int = 180, flip: bool = False) -> DataSource:
    """Opens the digits, the last `num_validation` of a fixed shuffle held out.

    Args:
        num_validation: number of held-out digits, below 1797.
        flip: refused: a mirrored digit is not a digit.

    Returns:
        A `DataSource` of shape (8, 8, 1) with 10 classes. Raises `InputError`.
    """
    images, labels = load()
    if not 0 <= num_validation < len(images):
        raise InputError(
            f"config.data.num_validation is {num_validation}: expected 0…{len(images) - 1}"
        )
    if flip:
        raise InputError("config.data.flip is True: expected False, mirrored digits are not digits")
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = np.split(order, [len(images) - num_validation])
    return DataSource(
        train=ArraySource(images[train], labels[train]),
        validation=ArraySource(images[held_out], labels[held_out]) if num_validation else None,
        shape=(8, 8, 1),
        num_classes=10,
        class_names=tuple(str(i) for i in range(10)),
        shift=np.zeros(1, np.float32),
        scale=np.ones(1, np.float32),
        autoencoder=None,
    )
