"""A config turned into working parts: the data set, the network, the decoder, the mesh.

Training, sampling and evaluation all start here, so that a config means the same thing in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax.data import digits
from ig_jax.data.source import DataSource
from ig_jax.diffusion import interpolant
from ig_jax.errors import InputError
from ig_jax.models import dit
from ig_jax.models.functional import Params, split
from ig_jax.training import sharding


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
    spec: dit.DiTSpec
    graphdef: nnx.GraphDef
    shapes: Params
    mesh: Mesh

    @classmethod
    def from_config(cls, config: ConfigDict) -> Experiment:
        """Validates a config against the present devices and builds its parts."""
        config_lib.validate(config)
        config_lib.check_devices(config, jax.device_count())
        spec = config_lib.model_spec(config)
        graphdef, shapes = split(dit.abstract(spec, **config_lib.model_options(config)))
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        return cls(config, spec, graphdef, shapes, mesh)

    @property
    def path(self) -> interpolant.Interpolant:
        """The interpolant that the network is trained on."""
        return interpolant.get(self.config.loss.path)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one model input."""
        return (self.spec.input_size, self.spec.input_size, self.spec.channels)

    def abstract_params(self) -> Params:
        """The parameters' shapes with their shardings, as restoring a checkpoint needs them."""
        shardings = sharding.state_sharding(self.mesh, self.shapes)
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.shapes,
            shardings,
        )

    def open_data(self) -> DataSource:
        """Opens the data set and checks that it fits the model; raises `InputError`."""
        source = open_source(self.config)
        for field, found, expected in (
            ("input_size and channels", self.sample_shape, source.shape),
            ("num_classes", self.spec.num_classes, source.num_classes),
        ):
            unconditional = field == "num_classes" and found == 0
            if found != expected and not unconditional:
                raise InputError(
                    f"config.model.{field} is {found}: "
                    f"the data set {self.config.data.name!r} has {expected}"
                )
        return source


def open_source(config: ConfigDict) -> DataSource:
    """Opens the data set that `config.data` names."""
    data = config.data
    if data.name == "digits":
        return digits.open_digits(data.num_validation, data.flip)
    raise InputError(f"config.data.name is {data.name!r}: not here yet")


def make_to_images(experiment: Experiment, source: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from model space (N, H, W, C) to pictures, (N, H, W, C) uint8."""

    def pixels(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x) * source.scale + source.shift
        return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)

    return pixels
