"""Random crops of eight colour photographs that come with scikit-image and scikit-learn: real
pictures that need no download. The class is the photograph."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from ig_jax.data.source import ArraySource, DataSource, hold_out
from ig_jax.errors import InputError
from ig_jax.streams import numpy_stream

# Class → (function of skimage.data, or file of scikit-learn's samples; licence and origin).
PHOTOS = {
    "astronaut": ("astronaut", "public domain, NASA"),
    "cat": ("cat", "CC0, Stefan van der Walt"),
    "coffee": ("coffee", "CC0, Rachel Michetti"),
    "tissue": ("immunohistochemistry", "no known copyright restrictions, CMMI"),
    "rocket": ("rocket", "public domain, SpaceX"),
    "retina": ("retina", "CC0, Mikael Häggström"),
    "pagoda": ("china.jpg", "CC BY 2.0, danielbuechele on Flickr"),
    "flower": ("flower.jpg", "CC BY 2.0, vultilion on Flickr"),
}
CROPS = 4096
# Side of a crop as a share of the photograph's shorter side.
_SHARES = (0.7, 1.0)


def _photo(name: str) -> Image.Image:
    """A photograph by its name in `PHOTOS`; raises `InputError` without scikit-image."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    try:
        from skimage import data
    except ImportError:
        raise InputError(
            "config.data.name is 'photos': expected scikit-image, whose photographs these are "
            '(pip install "ig_jax[photos]")'
        ) from None
    return Image.fromarray(getattr(data, name)())


def _shrunk(photo: Image.Image, side: int) -> Image.Image:
    """The photograph with a shorter side of so many pixels."""
    scale = side / min(photo.size)
    width, height = (round(extent * scale) for extent in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


@functools.cache
def load(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The crops, (4096, size, size, 3) uint8, and their (4096,) int32 labels; always the same.

    Raises:
        InputError: scikit-image is not installed.
    """
    # Large enough that even crops of nearly a whole photograph begin at different pixels.
    photos = [_shrunk(_photo(name), 5 * size) for name, _ in PHOTOS.values()]
    generator = numpy_stream(0, "photographs")
    labels = np.arange(CROPS, dtype=np.int32) % len(photos)
    crops = np.empty((CROPS, size, size, 3), np.uint8)
    for crop, label in zip(crops, labels, strict=True):
        photo = photos[label]
        side = round(min(photo.size) * generator.uniform(*_SHARES))
        left, top = (generator.integers(extent - side + 1) for extent in photo.size)
        box = (left, top, left + side, top + side)
        crop[:] = photo.resize((size, size), Image.Resampling.LANCZOS, box)
    return crops, labels


def open_photos(size: int = 32, num_validation: int = 512) -> DataSource:
    """Opens the crops as a data set of pixels of shape (size, size, 3) with 8 classes.

    Args:
        size: side of a crop in pixels.
        num_validation: number of crops to hold out.

    Raises:
        InputError: scikit-image is not installed, or nothing would be left to train on.
    """
    train, validation = hold_out(ArraySource(*load(size)), num_validation)
    return DataSource(
        train=train,
        validation=validation,
        shape=(size, size, 3),
        num_classes=len(PHOTOS),
        class_names=tuple(PHOTOS),
        shift=np.zeros(1, np.float32),
        scale=np.ones(1, np.float32),
        autoencoder=None,
    )
