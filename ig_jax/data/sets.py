"""The data sets that `config.data.name` can ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ig_jax.data import digits, images, latents, photos, samples, toy2d
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError


def _digits(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    return digits.open_digits(data.num_validation, data.flip)


def _toy2d(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    return toy2d.open_toy2d(data.num_validation, data.flip)


def _photos(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    return photos.open_photos(data.image_size, data.num_validation)


def _samples(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    return samples.open_samples(data.path, data.num_validation)


def _latents(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    return latents.open_latents(
        data.path,
        autoencoder=data.autoencoder or None,
        expected_shape=shape,
        num_classes=num_classes or None,
        num_validation=data.num_validation,
        skip_damaged=data.skip_damaged,
    )


def _folder(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    if not data.path:
        raise InputError("config.data.path is empty: expected a folder of class/name.jpg")
    return images.open_folder(data.path, data.image_size, data.num_validation)


def _tfds(data: Any, shape: tuple[int, ...], num_classes: int) -> DataSource:
    if not data.tfds_name:
        raise InputError("config.data.tfds_name is empty: expected a name such as cifar10")
    return images.open_tfds(
        data.tfds_name, data.image_size, data.num_validation, data_dir=data.path
    )


# `row(data, shape, num_classes) -> DataSource`: the section `config.data`, and what the model
# expects, (H, W, C) or (D,) and the number of its classes (0: unconditional).
DATA_SETS: dict[str, Callable[[Any, tuple[int, ...], int], DataSource]] = {
    "digits": _digits,
    "toy2d": _toy2d,
    "photos": _photos,
    "latents": _latents,
    "folder": _folder,
    "tfds": _tfds,
    "samples": _samples,
}
