"""Feature extractors: what turns images into the vectors that the metrics compare.

One interface and a table of what implements it, Inception and DINOv2 for pictures and a
classifier's hidden layer for sets that come along, so that evaluation is the same code for all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax.convert import dinov2 as convert_dinov2
from ig_jax.convert import inception as convert_inception
from ig_jax.data import photos, toy2d
from ig_jax.errors import InputError
from ig_jax.models import dinov2, functional, inception
from ig_jax.models.dinov2 import DinoV2Spec
from ig_jax.models.pixels import to_uint8
from ig_jax.storage.files import digest


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of N images, float32 on the host.

    Attributes:
        pool: (N, width), for Fréchet distance, precision and recall.
        spatial: (N, width of the spatial map), for sFID; None if the extractor has none.
        probabilities: (N, classes) of Inception's classes, for the Inception Score; or None.
        readings: (N, classes) probabilities of the data set's own classes; or None.
        joint: (N, branches) densities p(x, branch) of a distribution that is known; or None.
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    readings: np.ndarray | None = None
    joint: np.ndarray | None = None


class FeatureExtractor(Protocol):
    """Maps images to features.

    Attributes:
        name: short name, for records and file names.
        gives: which of `Features` it computes.
        width: number of pooled features.
        spatial_width: number of spatial features, or None.
        resize: what it does to pictures of another size, for records.
        fingerprint: hex digest of everything that the features depend on besides the images; equal
            fingerprints may share stored statistics.
    """

    name: str
    gives: tuple[str, ...]
    width: int
    spatial_width: int | None
    resize: str
    fingerprint: str

    def __call__(self, images: np.ndarray) -> Features:
        """Maps (N, H, W, C) uint8 images, or (N, D) float32 vectors, to their features.

        Raises:
            InputError: if dtype or shape are not what the extractor reads.
        """
        ...


# Pictures per call of an extractor, the same for every route, so that they agree to the last bit.
CHUNK = 256


class NetworkExtractor:
    """Base of extractors that run a network on the devices; a subclass names it and is its pass.

    Batches are padded to one size, so the network compiles once per image size, and spread over
    all devices of a mesh that belong to this process: every process extracts its own images.
    """

    name: str
    gives: tuple[str, ...]
    width: int
    spatial_width: int | None
    resize: str

    def __init__(
        self,
        params: functional.Params,
        fingerprint: str,
        *,
        batch_size: int = 64,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Places the parameters on the devices.

        Args:
            params: the network's.
            fingerprint: SHA-256 of the weight file.
            batch_size: images per forward pass, over all devices together; rounded up to a
                multiple of their number.
            mesh: devices to use, all of its axes as data axes; the default device if None.
        """
        devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
        local = jax.sharding.Mesh(np.asarray(devices), ("data",))
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self.fingerprint = fingerprint
        self._sharding = jax.sharding.NamedSharding(local, jax.sharding.PartitionSpec("data"))
        replicated = jax.sharding.NamedSharding(local, jax.sharding.PartitionSpec())
        self._params = jax.device_put(params, replicated)

    def forward(self, params: functional.Params, images: jax.Array) -> tuple[jax.Array, ...]:
        """A compiled pass: (n, H, W, 3) uint8 images to what `gives` names, in its order."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> Features:
        """Maps (N, H, W, 3) uint8 images of any size to their features."""
        _check_images(images, (None, None, 3), self.name)
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            padding = [(0, self.batch_size - len(batch))] + [(0, 0)] * 3
            padded = jax.device_put(np.pad(batch, padding), self._sharding)
            output = jax.device_get(self.forward(self._params, padded))
            parts.append([array[: len(batch)] for array in output])
        arrays = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return Features(**dict(zip(self.gives, arrays, strict=True)))


class InceptionExtractor(NetworkExtractor):
    """Pool-3, sFID map and softmax probabilities of the FID Inception."""

    name = "inception-2015-12-05"
    gives = ("pool", "spatial", "probabilities")
    width = inception.POOL_WIDTH
    spatial_width = inception.SPATIAL_WIDTH
    resize = "TF1 bilinear to 299x299"

    @classmethod
    def from_file(cls, path: os.PathLike | str, **placement: Any) -> InceptionExtractor:
        """Reads `pt_inception-2015-12-05-6726825d.pth`; see `convert.inception.load_inception`.

        `placement` is the batch size and the mesh, as `NetworkExtractor` takes them.
        """
        params, digest = convert_inception.load_inception(path)
        return cls(params, digest, **placement)

    def forward(self, params: functional.Params, images: jax.Array) -> tuple[jax.Array, ...]:
        return _inception_features(params, images)


class DinoV2Extractor(NetworkExtractor):
    """DINOv2's class token, for FD-DINOv2 as EDM2 computes it (there of ViT-L).

    Args:
        spec: the architecture.
        params, fingerprint, placement: as `NetworkExtractor` takes them.
    """

    gives = ("pool",)
    spatial_width = None
    resize = "bicubic with antialias to 224x224"

    def __init__(
        self, spec: DinoV2Spec, params: functional.Params, fingerprint: str, **placement: Any
    ):
        super().__init__(params, fingerprint, **placement)
        self.spec, self.width = spec, spec.width
        published = {384: "vits14", 768: "vitb14", 1024: "vitl14"}
        self.name = f"dinov2-{published.get(spec.width, spec.width)}"

    @classmethod
    def from_file(cls, path: os.PathLike | str, **placement: Any) -> DinoV2Extractor:
        """Reads a weight file; see `convert.dinov2.load_dinov2`."""
        return cls(*convert_dinov2.load_dinov2(path), **placement)

    def forward(self, params: functional.Params, images: jax.Array) -> tuple[jax.Array, ...]:
        return (_dinov2_features(self.spec, params, images),)


class DigitsExtractor:
    """The hidden layer of a classifier trained on scikit-learn's digits and nothing else.

    Images are (N, 8, 8, 1) uint8. The data set's values 0…16 are x = value/8 − 1 in model space and
    `to_uint8(x)` as images; sixteen image levels fall between two neighbouring data values, so the
    rounding is far below what the features resolve.

    Attributes:
        accuracy: share of held-out real digits (a quarter, stratified, never trained on) that the
            classifier reads right.
    """

    name = "digits-mlp"
    gives = ("pool", "readings")
    spatial_width = None
    resize = "none"
    shape: tuple[int, ...] = (8, 8, 1)
    epochs = 80

    def __init__(self, seed: int = 0, width: int = 64):
        """Trains the classifier (under a second); the same seed gives the same weights.

        Args:
            seed: of the split, the initial weights and the batches.
            width: hidden units, which are the features.
        """
        self.width = width
        split = _split(*self.real(), seed)
        (train, train_labels), (held_out, held_out_labels) = split
        trained = _train_classifier(train, train_labels, seed, width, self.epochs)
        self._weights, self._biases = trained
        self.accuracy = float(np.mean(self.classify(held_out) == held_out_labels))
        self.fingerprint = digest(*self._weights, *self._biases)

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        """All real images, (N, *shape) uint8, and their (N,) int32 labels."""
        return digits_images()

    def __call__(self, images: np.ndarray) -> Features:
        """Maps (N, *shape) uint8 images to hidden activations and class probabilities."""
        _check_images(images, self.shape, self.name)
        flat = images.reshape(len(images), -1) / 255
        hidden = np.maximum(flat @ self._weights[0] + self._biases[0], 0)
        logits = hidden @ self._weights[1] + self._biases[1]
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        return Features(hidden.astype(np.float32), readings=probabilities.astype(np.float32))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Reads (N, *shape) uint8 images as labels, (N,) int32."""
        return self(images).readings.argmax(1).astype(np.int32)


class PhotosExtractor(DigitsExtractor):
    """The same of the crops of photographs, (N, 32, 32, 3) uint8."""

    name = "photos-mlp"
    shape = (32, 32, 3)
    epochs = 8

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        return photos.load()


class TreeExtractor:
    """Points of the plane as they are, and what the true distribution of the toy says of them."""

    name = "toy2d"
    gives = ("pool", "readings", "joint")
    width = 2
    spatial_width = None
    resize = "none"

    def __init__(self):
        self._tree = toy2d.tree()
        self.fingerprint = digest(self._tree.weights, self._tree.means, self._tree.covariances)

    def __call__(self, images: np.ndarray) -> Features:
        """Maps (N, 2) float32 points to themselves, their classes and densities."""
        if images.ndim != 2 or images.shape[1] != self.width:
            raise InputError(f"points: shape {images.shape}, expected (N, 2) for {self.name}")
        joint = self._tree.joint(images)
        readings = self._tree.by_class(joint)
        return Features(images, readings=np.float32(readings), joint=np.float32(joint))


def _open_inception(evaluation: ConfigDict, mesh: jax.sharding.Mesh) -> InceptionExtractor:
    if not evaluation.inception_path:
        raise InputError(
            "config.evaluation.inception_path is empty: expected the Inception weights, "
            f"downloaded from {convert_inception.URL}"
        )
    return InceptionExtractor.from_file(evaluation.inception_path, **_placement(mesh))


def _open_dinov2(evaluation: ConfigDict, mesh: jax.sharding.Mesh) -> DinoV2Extractor:
    if not evaluation.dinov2_path:
        raise InputError(
            "config.evaluation.dinov2_path is empty: expected the DINOv2 weights, "
            f"downloaded from {convert_dinov2.URL}"
        )
    return DinoV2Extractor.from_file(evaluation.dinov2_path, **_placement(mesh))


def _placement(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    # A batch larger than a chunk would be filled up for nothing.
    return {"batch_size": min(64 * len(mesh.local_devices), CHUNK), "mesh": mesh}


@functools.cache
def _classifier(kind: type[DigitsExtractor]) -> DigitsExtractor:
    return kind()


# Name in `config.evaluation.features` → `open(config.evaluation, mesh)`.
EXTRACTORS: dict[str, Callable[[ConfigDict, jax.sharding.Mesh], FeatureExtractor]] = {
    "digits": lambda evaluation, mesh: _classifier(DigitsExtractor),
    "photos": lambda evaluation, mesh: _classifier(PhotosExtractor),
    "toy2d": lambda evaluation, mesh: TreeExtractor(),
    "dinov2": _open_dinov2,
    "inception": _open_inception,
}


def check_name(config: ConfigDict) -> str:
    """The row of `EXTRACTORS` that a config means; "auto" goes by the data set.

    Raises:
        InputError: an unknown name.
    """
    name = config.evaluation.features
    if name == "auto":
        own = ("digits", "photos", "toy2d")
        return config.data.name if config.data.name in own else "inception"
    config_lib.check_choice(config, "evaluation.features", ("auto", *EXTRACTORS))
    return name


def open_extractor(config: ConfigDict, mesh: jax.sharding.Mesh) -> FeatureExtractor:
    """The extractor that `config.evaluation.features` names, on the devices of a mesh.

    Raises:
        InputError: an unknown name, or weights that are missing or damaged.
    """
    return EXTRACTORS[check_name(config)](config.evaluation, mesh)


def digits_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns all 1,797 real digits as (N, 8, 8, 1) uint8 images, and their (N,) int32 labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = to_uint8(digits.images[..., None].astype(np.float32) / 8 - 1).checked()
    return images, digits.target.astype(np.int32)


@jax.jit
def _inception_features(
    params: functional.Params, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    model = functional.merge(_graph_definition(), params)
    output = model(images)
    # Row-major (height, width, channel), the order of ADM's reference `mu_s` and `sigma_s`.
    spatial = output.spatial.reshape(len(images), -1)
    return output.pool3, spatial, jax.nn.softmax(output.logits)


@functools.cache
def _graph_definition() -> nnx.GraphDef:
    return convert_inception.abstract_inception()[0]


@functools.partial(jax.jit, static_argnums=0)
def _dinov2_features(spec: DinoV2Spec, params: functional.Params, images: jax.Array) -> jax.Array:
    return functional.merge(dinov2.abstract(spec)[0], params)(images)


def _check_images(images: np.ndarray, shape: tuple[int | None, ...], name: str) -> None:
    """Raises InputError unless images are uint8 (N ≥ 1, *shape), None standing for any size."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = getattr(images, "dtype", type(images).__name__)
        raise InputError(
            f"images: dtype {found}, expected uint8 with values 0…255 for {name} "
            "(models.pixels.to_uint8 converts from [-1, 1])"
        )
    sizes = images.shape[1:]
    fits = len(sizes) == len(shape) and len(images) > 0
    if not fits or any(w not in (None, size) for w, size in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"images: shape {images.shape}, expected (N, {wanted}) for {name}")


LabelledImages = tuple[np.ndarray, np.ndarray]


def _split(
    images: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Returns training and held-out (images, labels): a seeded, stratified quarter is held out."""
    from sklearn.model_selection import train_test_split

    train, held_out, train_labels, held_out_labels = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return (train, train_labels), (held_out, held_out_labels)


def _train_classifier(
    images: np.ndarray, labels: np.ndarray, seed: int, width: int, epochs: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns weights and biases (float64) of a two-layer ReLU classifier."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier(
        (width,),
        alpha=0.03,
        batch_size=64,
        learning_rate_init=3e-3,
        max_iter=epochs,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # The number of epochs is chosen, not a limit to be warned of.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # scikit-learn turns Ctrl-C into a warning and returns what is half trained.
        warnings.filterwarnings("error", "Training interrupted", UserWarning)
        try:
            classifier.fit(images.reshape(len(images), -1) / 255, labels)
        except UserWarning as interrupted:
            raise KeyboardInterrupt from interrupted
    return classifier.coefs_, classifier.intercepts_
