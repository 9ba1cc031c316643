"""A config turned into working parts: the data set, the network, the decoder, the mesh.

Training, sampling and evaluation all start here, so that a config means the same thing in each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, record
from ig_jax.data import images, latents, prepare
from ig_jax.data.sets import DATA_SETS
from ig_jax.data.source import DataSource
from ig_jax.diffusion import interpolant
from ig_jax.errors import InputError
from ig_jax.models import autoencoder, families, network
from ig_jax.models.autoencoder import AUTOENCODERS, Autoencoder
from ig_jax.models.functional import Params, split
from ig_jax.models.pixels import Pixels, to_uint8, unchanged
from ig_jax.parallel import sharding
from ig_jax.paths import check_writable
from ig_jax.storage.autoencoders import autoencoder_from_pytorch, fingerprint
from ig_jax.storage.checkpoints import saved_config, saved_source

_ENCODER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a validated config describes, without weights.

    Attributes:
        config: the config.
        spec: the network's architecture.
        graphdef: the network's graph definition; `functional.merge(graphdef, params)` runs it.
        shapes: nested dict of the parameters' shapes.
        mesh: all devices, with axes data and fsdp.
    """

    config: ConfigDict
    spec: network.Spec
    graphdef: nnx.GraphDef
    shapes: Params
    mesh: Mesh

    @classmethod
    def from_config(
        cls, config: ConfigDict, devices: Sequence[jax.Device] | None = None
    ) -> Experiment:
        """Validates a config against the present (or given) devices and builds its parts."""
        config_lib.validate(config)
        config_lib.check_choice(config, "data.name", DATA_SETS)
        config_lib.check_devices(config, len(jax.devices() if devices is None else devices))
        spec = config_lib.model_spec(config)
        graphdef, shapes = split(families.abstract(spec, **config_lib.model_options(config)))
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        return cls(config, spec, graphdef, shapes, mesh)

    def of_workdir(self, workdir: str, which: int | str = "last") -> Experiment:
        """The experiment that made a workdir's checkpoint, on this one's devices.

        Its mesh and batch sizes give way to this one's: they say where it was trained, not what.
        """
        saved = saved_config(workdir, which)
        saved.mesh.update(self.config.mesh)
        saved.sampler.batch_size = self.config.sampler.batch_size
        for name in ("batch_size", "accumulate"):
            saved.train[name] = self.config.train[name]
        return Experiment.from_config(saved, list(self.mesh.devices.flat))

    @property
    def layout(self) -> network.Layout:
        """What the network declares of its parameters."""
        return network.layout(self.graphdef, self.shapes)

    @property
    def path(self) -> interpolant.Interpolant:
        """The interpolant that the network is trained on."""
        return interpolant.get(self.config.loss.path)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one model input, such as (H, W, C)."""
        return self.spec.shape

    @functools.cached_property
    def decode(self) -> Callable[[np.ndarray], Pixels]:
        """From latents to pixels by the autoencoder that the config names, loaded but once."""
        return autoencoder.make_decoder(load_autoencoder(self.config), uint8=True)

    def abstract_params(self) -> Params:
        """The parameters' shapes with their shardings, as restoring a checkpoint needs them."""
        shardings = sharding.state_sharding(self.mesh, self.shapes, self.layout)
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.shapes,
            shardings,
        )

    def open_data(self) -> DataSource:
        """Opens the data set and checks that it fits the model; raises `InputError`."""
        data, classes = self.config.data, self.config.model.num_classes
        with console.stage("opening the data set"):
            source = DATA_SETS[data.name](data, self.sample_shape, classes)
        self._check(source)
        # Of data sets of one size; the others are of the size that they are asked for.
        size = data.image_size if source.autoencoder or len(source.shape) < 3 else source.shape[0]
        if size != data.image_size:
            raise InputError(
                f"config.data.image_size is {data.image_size}: expected {size}, the size of the "
                f"pictures of the data set {data.name!r}"
            )
        return source

    def open_facts(self, workdir: str, step: int | str = "last") -> DataSource:
        """What sampling needs to know of the data, without the data set where that is possible.

        Args:
            workdir: whose checkpoint carries the facts of the data it was trained on. Converted
                checkpoints carry none: then those of the named autoencoder, or of the data set.
            step: of the checkpoint; "last", "best" or a number.
        """
        facts = saved_source(workdir, step)
        source = DataSource.from_facts(facts) if facts else known_facts(self.config, self.spec)
        if source is None:
            return self.open_data()
        self._check(source)
        return source

    def _check(self, source: DataSource) -> None:
        data, side = self.config.data, self.sample_shape[0]
        if data.name in ("folder", "tfds") and source.shape[0] != side:
            raise InputError(
                f"config.data.image_size is {data.image_size}: the network takes {side}×{side} "
                f"(--config.data.image_size={side} crops to that, or "
                f"--config.model.input_size={data.image_size} makes another network)"
            )
        for field, found, expected in (
            ("input_size and channels", self.sample_shape, source.shape),
            ("num_classes", self.spec.num_classes, source.num_classes),
        ):
            unconditional = field == "num_classes" and found == 0
            if found != expected and not unconditional:
                has = f"has {expected}"
                if expected == 0:
                    has = "has no labels, expected 0 (an unconditional model)"
                raise InputError(
                    f"config.model.{field} is {found}: the data set {self.config.data.name!r} {has}"
                )


def known_facts(config: ConfigDict, spec: network.Spec) -> DataSource | None:
    """The facts of latents that need not be there, for checkpoints that were converted.

    SD-VAE's normalisation is one published number. VA-VAE's is per-channel statistics, which
    `config.data.path` names or holds.

    Returns:
        A source without examples, or None if the facts are unknown. Raises `InputError` for
        statistics that are damaged or of other latents.
    """
    data = config.data
    if data.name != "latents":
        return None
    published = AUTOENCODERS.get(data.autoencoder)
    if published is not None and published.shift is not None:
        shift, scale = np.float32([published.shift]), np.float32([published.scale])
    else:
        found = latents.known_statistics(data.path, data.autoencoder, spec.shape[-1])
        if found is None:
            return None
        shift, scale = found
    return DataSource(
        train=None,
        validation=None,
        shape=spec.shape,
        num_classes=spec.num_classes,
        class_names=latents.class_names(spec.num_classes),
        shift=shift,
        scale=scale,
        autoencoder=data.autoencoder,
    )


def load_autoencoder(config: ConfigDict) -> Autoencoder:
    """Loads the autoencoder that `config.data` names; raises `InputError` if it has no weights."""
    data = config.data
    if not data.autoencoder_path:
        published = AUTOENCODERS.get(data.autoencoder)
        where = f" ({published.repository}, {published.file})" if published else ""
        raise InputError(
            f"config.data.autoencoder_path is empty: expected the weights of {data.autoencoder}"
            f"{where} to turn pictures into latents and back (or, in training, "
            "config.train.sample_every=0)"
        )
    preset = data.autoencoder if data.autoencoder in AUTOENCODERS else None
    dtype = config_lib.compute_dtype(config.model.dtype)
    with console.stage("loading the autoencoder"):
        return autoencoder_from_pytorch(data.autoencoder_path, dtype=dtype, preset=preset)


@dataclasses.dataclass(frozen=True)
class ToImages:
    """Turns samples in model space into pictures.

    Attributes:
        shift, scale: () or (C,), what is decoded is `x·scale + shift`.
        autoencoder, autoencoder_hash: name and weights of the decoder; None for a model of pixels.
        decoder_precision: in which it computes, or None.
        to_pixels: the decoder, or the rounding alone.
    """

    shift: np.ndarray
    scale: np.ndarray
    autoencoder: str | None = None
    autoencoder_hash: str | None = None
    decoder_precision: str | None = None
    to_pixels: Callable[[np.ndarray], Pixels] = to_uint8

    def __call__(
        self, x: np.ndarray, indices: np.ndarray | None = None, where: str = ""
    ) -> np.ndarray:
        """Maps (N, H, W, C) floats to (N, H', W', C') uint8; vectors (N, D) stay floats.

        Raises `NotFiniteError` for samples that are not finite, which the line names by their
        `indices` (N,) and `where` they come from, as `models.pixels.Pixels.checked` does.
        """
        return self.to_pixels(np.asarray(x) * self.scale + self.shift).checked(indices, where)

    def record(self) -> dict[str, Any]:
        """All that pictures depend on, in plain values."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "to_pixels")
        return {name: record.plain(getattr(self, name)) for name in fields}


def make_to_images(experiment: Experiment, source: DataSource) -> ToImages:
    """Returns the function from model space to pictures: to pixels, or through the decoder."""
    if source.autoencoder is None:
        is_vector = len(experiment.sample_shape) == 1
        to_pixels = unchanged if is_vector else to_uint8
        return ToImages(source.shift, source.scale, to_pixels=to_pixels)
    data, decode = experiment.config.data, experiment.decode
    return ToImages(
        source.shift,
        source.scale,
        data.autoencoder,
        record.file_hash(data.autoencoder_path),
        config_lib.compute_dtype(experiment.config.model.dtype).name,
        decode,
    )


def run_prepare(config: ConfigDict, workdir: str | None) -> str:
    """`--mode=prepare`: encodes `config.data.images` to latent shards in `config.data.path`.

    Raises `InputError` for an empty path, missing images or autoencoder, or a full disk.
    """
    config_lib.validate(config)
    data = config.data
    if not data.path:
        raise InputError("config.data.path is empty: expected the directory to write latents to")
    check_writable(data.path, "config.data.path")
    pictures = images.open_images(data.images)
    model = load_autoencoder(config)
    published = AUTOENCODERS.get(data.autoencoder)
    # One batch for every piece of work, whatever its size: the encoder compiles once.
    encode = autoencoder.make_encoder(model, batch_size=_ENCODER_BATCH)

    def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = encode(pixels)
        return found.mean, found.std

    return prepare.prepare(
        pictures,
        data.path,
        moments,
        autoencoder=data.autoencoder,
        fingerprint=fingerprint(split(model)[1]),
        image_size=data.image_size,
        twins=published is not None and published.flipped,
        batch_size=_ENCODER_BATCH,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
