"""Labelled images from a folder or from TFDS, cropped as ADM crops them, and data sets of them.

Rules for irregular images: whatever Pillow decodes becomes 8-bit RGB (greyscale, palette, CMYK, 16
bit, floating point), white shows where it is transparent, smaller ones are enlarged to the target,
and one that cannot be decoded, whose range of values is unknown, or that is over 50 times longer
than wide, is skipped. Photographs of a folder are turned as their EXIF orientation says; ADM, which
ignores it, takes those of ImageNet as they lie, and so do we where they come from TFDS. Which files
of a folder are images is the rule of `pictures.list_folder`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, TiffImagePlugin

from ig_jax import pictures
from ig_jax.data.source import DataSource, Example, hold_out
from ig_jax.errors import InputError, suggest
from ig_jax.paths import resolve
from ig_jax.storage.files import digest

# Beyond it an image has no middle worth cutting out, and scaling it would take gigabytes.
MAX_ASPECT = 50

# How far beyond its range floating point may go, as a share of it: resampling overshoots.
_OVERSHOOT = 0.1
# Floating point whose brightest value lies between 1 and this is hardly a black picture of [0, 255]
# but one of another range.
_DARK = 16

log = logging.getLogger("ig_jax")


# What is said of a picture that was transparent, after its mode.
ON_WHITE = ", on white"


class UnreadableImage(Exception):
    """A file that is no image, or a damaged one; the message says why."""


class Images(Protocol):
    """Encoded, labelled images by index.

    Attributes:
        class_names: a name a class, in label order.
        turned: whether EXIF's orientation counts.
    """

    class_names: tuple[str, ...]
    turned: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded file and its label."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in a message."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values that tell this set of images from another one."""
        ...


class ImageFolder:
    """Files `class/name.jpg`; classes and files in the order of their names' bytes.

    Images that lie in the folder itself, without folders for classes, have no labels: there are no
    class names then, and every label is 0, the ∅ of an unconditional model.

    Args:
        path: a local folder with a folder for each class, or with unlabelled images.

    Attributes:
        class_names: the folders' names as `pictures.printable` writes them.

    Raises:
        InputError: no such folder, no images in it, or none in one of its classes.
    """

    turned = True

    def __init__(self, path: str):
        path = os.fspath(resolve(path))
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such folder, expected images as class/name.jpg")
        self._path = path
        files, folders = pictures.list_folder(path)
        loose = list(filter(pictures.is_picture, files))
        found = {folder: _images(os.path.join(path, folder)) for folder in folders}
        labelled = any(found.values())
        if labelled:
            _check_classes(path, found, loose)
        elif loose:
            found = {".": loose}
        else:
            raise InputError(
                f"{path}: {_without_images(path)}, expected a folder for each class with images in "
                f"it (class/name.jpg, one of {' '.join(pictures.SUFFIXES)}), or unlabelled images"
            )
        self._folders = list(found)
        self.class_names = readable_names(map(pictures.printable, found)) if labelled else ()
        # Byte strings in one array: a list of a million objects would be copied into every worker.
        self._names = np.array([os.fsencode(f) for names in found.values() for f in names])
        self._labels = np.repeat(np.arange(len(found)), list(map(len, found.values())))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(os.path.join(self._path, self._file(index)), "rb") as file:
            return file.read(), int(self._labels[index])

    def _file(self, index: int) -> str:
        return f"{self._folders[self._labels[index]]}/{os.fsdecode(self._names[index])}"

    def name(self, index: int) -> str:
        return pictures.printable(self._file(index))

    def describe(self) -> dict[str, Any]:
        names = b"\n".join([*map(os.fsencode, self._folders), *self._names])
        count = len(self)
        return {"kind": "folder", "count": count, "names_sha256": digest(names), "turned": True}


def _images(folder: str) -> list[str]:
    return list(filter(pictures.is_picture, pictures.list_folder(folder)[0]))


def _check_classes(path: str, found: Mapping[str, Sequence[str]], loose: Sequence[str]) -> None:
    """Refuses classes without images, whose absence would shift every later label; names images
    that belong to no class."""
    empty = [folder for folder, files in found.items() if not files]
    if empty:
        others = f" (nor do {len(empty) - 1} others)" if len(empty) > 1 else ""
        why = _without_images(os.path.join(path, empty[0]))
        raise InputError(
            f"{path}: class folder {pictures.printable(empty[0])} has no images{others}: {why}; "
            "expected some in every folder, since labels follow the folders' order: add them, or "
            "move the folder elsewhere"
        )
    if loose:
        log.warning(
            "%s: %d images lie beside the classes' folders, such as %s: they have no class and are "
            "left out", path, len(loose), pictures.printable(loose[0]),
        )  # fmt: skip


def _without_images(folder: str) -> str:
    """What a folder holds that has no images of its own."""
    files, folders = pictures.list_folder(folder)
    for name in folders:
        if below := _images(os.path.join(folder, name)):
            deeper = pictures.printable(f"{name}/{below[0]}")
            return f"its images lie one level deeper, such as {deeper}"
    inside = ", ".join(map(pictures.printable, [*files, *folders][:3]))
    if inside:
        return f"found {inside}"
    return "found only hidden files or dangling links" if os.listdir(folder) else "found nothing"


class TfdsImages:
    """A split of a TFDS image classification data set, read by random access.

    Args:
        name: e.g. "imagenet2012" or "cifar10:3.0.2".
        split: e.g. "train" or "train[:1%]".
        data_dir: TFDS' data directory; its default if empty.

    Raises:
        InputError: an unknown set or split, one not prepared with random access, or one without
            the features "image" and "label"; or no TensorFlow, which TFDS needs.
    """

    turned = False

    def __init__(self, name: str, split: str = "train", data_dir: str = ""):
        if importlib.util.find_spec("tensorflow") is None:
            raise InputError(
                f"TFDS {name} needs TensorFlow, which is not installed (it has no wheels for the "
                "newest Python): expected it, or the images as a folder"
            )
        import tensorflow_datasets as tfds

        self._name, self._split = name, split
        data_dir = os.fspath(resolve(data_dir)) if data_dir else ""
        info = _tfds_builder(name, data_dir).info
        features = info.features
        if not {"image", "label"} <= set(features):
            raise InputError(
                f"TFDS {name} has features {', '.join(features)}: expected image and label"
            )
        self.class_names = readable_names(features["label"].names)
        # Pillow decodes the files, so that every source gives the same pixels and the same errors.
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            self._source = _tfds_builder(name, data_dir).as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f"TFDS {name} in {info.data_dir} is stored as {info.file_format.value}, expected "
                "array_record (random access): pip install apache-beam, then tfds convert_format "
                f"--dataset_version_dir={info.data_dir} --out_file_format=array_record"
            ) from error
        except ValueError as error:
            known = tuple(info.splits)
            raise InputError(
                f"TFDS {name} has no split {split!r}: expected one of {', '.join(known)}"
                f"{suggest(split, known)}"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        example = self._source[index]
        label = int(example["label"])
        if label < 0:
            raise InputError(f"{self.name(index)} has no label: expected a labelled split")
        return bytes(example["image"]), label

    def name(self, index: int) -> str:
        return f"{self._name} {self._split}[{index}]"

    def describe(self) -> dict[str, Any]:
        info = self._source.dataset_info
        return {
            "kind": "tfds",
            "count": len(self),
            "name": str(info.full_name),
            "split": self._split,
        }


def _tfds_builder(name: str, data_dir: str) -> Any:
    """The builder of a prepared TFDS set; raises `InputError` with the command that prepares it."""
    import tensorflow_datasets as tfds

    where = f", data_dir={data_dir!r}" if data_dir else ""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
        known = tuple(tfds.list_builders(with_community_datasets=False))
        raise InputError(
            f"TFDS has no data set {name!r}: expected one of its names or one prepared in "
            f"{data_dir or 'its default data directory'}{suggest(name, known)}"
        ) from error
    except (ValueError, AssertionError) as error:
        raise InputError(f"TFDS {name!r}: {str(error).splitlines()[0]}") from error
    if not builder.info.splits:
        raise InputError(
            f"TFDS {name} is not in {builder.data_dir}: expected a prepared data set "
            '(python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\")"
        )
    return builder


def open_images(images: str, data_dir: str = "") -> Images:
    """Opens what `config.data.images` names.

    Args:
        images: a folder (see `ImageFolder`) or "tfds:NAME@SPLIT", e.g. "tfds:imagenet2012" or
            "tfds:imagenet2012@validation"; the split is "train" if not given.
        data_dir: TFDS' data directory.

    Returns:
        The images; raises `InputError` as `ImageFolder` and `TfdsImages` do.
    """
    if images.startswith("tfds:"):
        name, _, split = images.removeprefix("tfds:").partition("@")
        return TfdsImages(name, split or "train", data_dir)
    if not images:
        raise InputError(
            "config.data.images is empty: expected a folder of class/name.jpg, or tfds:imagenet2012"
        )
    return ImageFolder(images)


def readable_names(names: Any) -> tuple[str, ...]:
    """Class names for people: ImageNet's 1,000 WordNet ids become words, others stay.

    ImageNet's labels are its ids in alphabetical order, everywhere.
    """
    names = tuple(names)
    ids = len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet_names() if ids else names


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 classes in label order, in the words that TFDS carries for SI-Score."""
    from tensorflow_datasets.datasets.siscore import labels

    return tuple(labels.IMAGENET_LABELS_LIST)


# From an encoded file to pixels.


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded image and what had to be done to it.

    Attributes:
        pixels: (size, size, 3) uint8.
        converted: the mode it had, where that was not RGB ("L", "CMYK", …; with `ON_WHITE` where
            it was transparent), else "".
        enlarged: its short side was below `size`.
    """

    pixels: np.ndarray
    converted: str
    enlarged: bool


def decode(data: bytes, size: int, turned: bool = True) -> Picture:
    """Decodes a file to RGB and crops it; raises `UnreadableImage`.

    Args:
        data: the file.
        size: side of the result.
        turned: whether EXIF's orientation counts.
    """
    try:
        image = pictures.opened(io.BytesIO(data))
        converted = "" if image.mode == "RGB" else image.mode
        rgb = to_rgb(image)
        if is_transparent(image):
            converted = f"{image.mode}{ON_WHITE}"
        if turned:
            rgb = _upright(rgb, image)
    except UnreadableImage:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UnreadableImage(str(error) or type(error).__name__) from error
    if max(rgb.size) > MAX_ASPECT * min(rgb.size):
        raise UnreadableImage(f"{rgb.width}×{rgb.height}, a side over {MAX_ASPECT} times the other")
    pixels = center_crop(rgb, size)
    return Picture(pixels, converted, min(rgb.size) < size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns any Pillow mode into 8-bit RGB, what is transparent on white; raises `UnreadableImage`
    where the range is unknown.

    Integers of 12 or 16 bits keep their upper 8. Floating point means [0, 1], or else [0, 255];
    other floating point and 32-bit integers, which may mean anything, are refused.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_levels(image))
    if image.has_transparency_data:
        return pictures.on_white(image)
    return image.convert("RGB")  # decodes, so a truncated file fails here


def is_transparent(image: Image.Image) -> bool:
    """Whether anything shines through a picture; that it could is not enough."""
    return image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255


# EXIF's orientation (tag 274): how a picture must be turned or mirrored to stand upright.
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Turns `rgb`, a conversion of the opened `image`, as EXIF says; damaged EXIF says nothing."""
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever a damaged block raises
        return 1


def _grey_levels(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 of a greyscale picture with more than 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        white = 1 if high <= 1 + _OVERSHOOT else 255
        fits = low >= -_OVERSHOOT * white and high <= (1 + _OVERSHOOT) * white
        if fits and (white == 1 or high >= _DARK):
            return np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
        raise UnreadableImage(
            f"floating-point values from {low:g} to {high:g}, expected [0, 1] or [0, 255]"
        )
    # Pillow calls 16 bits of PGM and (in some versions) of PNG 32, but scales them to 16.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnreadableImage(
            f"integers of 32 bits, from {values.min()} to {values.max()}: expected 8 or 16 bits"
        )
    bits = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0] if image.format == "TIFF" else 16
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop (Dhariwal & Nichol 2021, guided-diffusion `center_crop_arr`).

    Halves with a box filter while the short side is at least twice `size`, scales the short side to
    `size` with a bicubic filter (up as well as down), and cuts out the middle.

    Args:
        image: RGB, of any size.
        size: side of the result.

    Returns:
        (size, size, 3) uint8.
    """
    while min(image.size) >= 2 * size:
        halved = tuple(side // 2 for side in image.size)
        image = image.resize(halved, resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = tuple(round(side * scale) for side in image.size)
    image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


# Training on pixels.


class PixelSource:
    """Decoded images as examples: "x" (size, size, 3) uint8 and "label".

    Training must not stop at a damaged file, so the next readable image takes its place, which is
    logged with the file's name.
    """

    def __init__(self, images: Images, size: int):
        self._images = images
        self._size = size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            try:
                data, label = self._images[i]
                picture = decode(data, self._size, self._images.turned)
            except (OSError, UnreadableImage) as error:
                log.warning("%s: %s; the next image is used instead", self._images.name(i), error)
                continue
            return {"x": picture.pixels, "label": np.int32(label)}
        raise InputError("not one of the images can be decoded")


def survey(images: Images, size: int, most: int = 1000) -> str:
    """What is irregular among images, from their headers alone: the same kinds as in `decode`.

    Args:
        images: of which at most `most`, evenly spread, are looked at.
        size: side of the pictures that they become.

    Returns:
        Counts with the first name of each kind, or nothing if all are regular.
    """
    looked = np.unique(np.linspace(0, len(images) - 1, min(len(images), most)).astype(int))
    found: dict[str, list[str]] = {}
    for i in map(int, looked):
        try:
            image = Image.open(io.BytesIO(images[i][0]))
            if max(image.size) > MAX_ASPECT * min(image.size):
                continue
            kinds = {
                f"converted from {image.mode}": image.mode != "RGB",
                "put on white": is_transparent(image),
                "enlarged": min(image.size) < size,
                "turned as EXIF says": images.turned and _orientation(image) in _TURNS,
            }
        except Exception:  # the message comes where it is to be used
            continue
        for kind in filter(kinds.get, kinds):
            found.setdefault(kind, []).append(images.name(i))
    words = (
        f"{len(names)} {kind} ({names[0]}{', …' * (len(names) > 1)})"
        for kind, names in found.items()
    )
    return f"of {len(looked):,} images looked at: {', '.join(words)}" if found else ""


def open_pixels(images: Images, image_size: int, num_validation: int = 0) -> DataSource:
    """Opens images as a data set of pixels.

    Args:
        images: a folder's or TFDS'.
        image_size: side after ADM's centre crop.
        num_validation: number of images to hold out.

    Returns:
        A `DataSource` of shape (image_size, image_size, 3), whose uint8 "x" `model_input` maps to
        [−1, 1]; shift 0, scale 1. Raises `InputError`.
    """
    if said := survey(images, image_size):
        log.info(said)
    train, validation = hold_out(PixelSource(images, image_size), num_validation)
    return DataSource(
        train=train,
        validation=validation,
        shape=(image_size, image_size, 3),
        num_classes=len(images.class_names),
        class_names=images.class_names,
        shift=np.zeros(1, np.float32),
        scale=np.ones(1, np.float32),
        autoencoder=None,
    )


def open_folder(path: str, image_size: int, num_validation: int = 0) -> DataSource:
    """Opens a folder of `class/name.jpg` for training on pixels; see `open_pixels`."""
    return open_pixels(ImageFolder(path), image_size, num_validation)


def open_tfds(
    name: str, image_size: int, num_validation: int = 0, split: str = "train", data_dir: str = ""
) -> DataSource:
    """Opens a split of a TFDS set for training on pixels; see `TfdsImages` and `open_pixels`."""
    return open_pixels(TfdsImages(name, split, data_dir), image_size, num_validation)
