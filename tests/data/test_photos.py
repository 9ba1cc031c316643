"""Crops of photographs that come with packages."""

import pathlib
import sys

import numpy as np
import pytest

from ig_jax.data import photos
from ig_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_a_balanced_data_source_of_eight_classes():
    source = photos.open_photos(num_validation=512)
    assert source.shape == (32, 32, 3) and source.num_classes == 8
    assert source.class_names[:3] == ("astronaut", "cat", "coffee")
    assert (len(source.train), len(source.validation)) == (4096 - 512, 512)
    assert source.autoencoder is None and (source.shift, source.scale) == (0, 1)
    example = source.train[0]
    assert example["x"].shape == source.shape and example["x"].dtype == np.uint8
    crops, labels = photos.load()
    np.testing.assert_array_equal(np.bincount(labels), 512)
    # In colour, and hardly any two the same.
    assert np.abs(np.float32(crops[..., 0]) - crops[..., 2]).mean() > 20
    assert len({crop.tobytes() for crop in crops}) > 0.97 * len(crops)


def test_crops_are_parts_of_their_photograph():
    """In each class the mean colour varies less than between classes."""
    crops, labels = photos.load()
    colours = crops.mean((1, 2))
    means = np.stack([colours[labels == label].mean(0) for label in range(8)])
    within = np.mean([colours[labels == label].var(0).sum() for label in range(8)])
    assert means.var(0).sum() > 3 * within
    photos.load.cache_clear()
    np.testing.assert_array_equal(photos.load()[0], crops)


def test_the_readme_names_each_photograph_and_its_licence():
    for name, (_, origin) in photos.PHOTOS.items():
        assert name in README and origin in README, name


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    photos.load.cache_clear()
    with pytest.raises(InputError, match=r'expected scikit-image.*pip install "ig_jax\[photos\]"'):
        photos.open_photos()


def test_too_many_held_out():
    with pytest.raises(InputError, match="num_validation is 4096: expected 0…4095"):
        photos.open_photos(num_validation=4096)
