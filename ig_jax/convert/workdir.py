"""Models into workdirs and out of them, so that converted weights are sampled from, evaluated and
trained on like those of our own runs, and our own runs are saved for PyTorch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import recipes
from ig_jax.data.sets import DATA_SETS
from ig_jax.errors import InputError
from ig_jax.models import families, functional, network
from ig_jax.models.autoencoder import AUTOENCODERS
from ig_jax.models.dit import DiT, DiTSpec
from ig_jax.paths import check_workdir, resolve
from ig_jax.storage.checkpoints import Checkpoints, saved_config
from ig_jax.training import optimizer as optimizer_lib
from ig_jax.training import state as state_lib

# What config.model calls otherwise than `DiTSpec`.
_RENAMED = {"adaln_shift": "shift"}
_SIZE = ("depth", "width", "heads")


class _Zeros(np.ndarray):
    """Zeros that are never written take no memory, until something copies them as Orbax would."""

    def __deepcopy__(self, memo: dict) -> _Zeros:
        return self


def config_for(spec: DiTSpec, data: str = "latents") -> ConfigDict:
    """Returns the published recipe of a network's family, with `config.model` describing `spec`.

    Args:
        spec: the architecture.
        data: `config.data.name`.

    Raises:
        InputError: if no config describes the architecture, or for an unknown data set.
    """
    published = {(s.depth, s.width, s.heads): name for name, s in recipes.SIZES.items()}
    size = published.get((spec.depth, spec.width, spec.heads))
    config = config_lib.default_config(spec.family, size or "xl")
    config.data.name = data
    for name in config.model:
        field = _RENAMED.get(name, name)
        if hasattr(spec, field) and not (size and field in _SIZE):
            config.model[name] = getattr(spec, field)
    config.model.auxiliary_depth = _one_or_several(spec.auxiliary_depths)
    autoencoder = AUTOENCODERS[config.data.autoencoder].spec
    if spec.channels == autoencoder.latent_channels:
        config.data.image_size = spec.input_size * autoencoder.downsampling
    else:
        config.data.update(autoencoder="", image_size=spec.input_size)
    config_lib.validate(config)
    config_lib.check_choice(config, "data.name", DATA_SETS)
    described = config_lib.model_spec(config)
    for field in dataclasses.fields(spec):
        found, expected = getattr(spec, field.name), getattr(described, field.name)
        if found != expected:
            raise InputError(
                f"no config describes this {spec.family}: it has {field.name} {found!r}, "
                f"expected {expected!r}"
            )
    return config


def _one_or_several(depths: tuple[int, ...]) -> int | tuple[int, ...]:
    """`config.model.auxiliary_depth` of these heads: as users type it for none and for one."""
    return depths if len(depths) > 1 else depths[0] if depths else 0


def check_empty(workdir: str) -> None:
    """Raises `InputError` if a workdir holds checkpoints already, or cannot be written."""
    check_workdir(workdir)
    directory = resolve(workdir) / "checkpoints"
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} holds checkpoints already: expected a new workdir")


def save_workdir(model: DiT, workdir: str, data: str = "latents") -> ConfigDict:
    """Writes a workdir that `--mode=sample`, `evaluate` and `train` start from.

    It is that of a run at step 0 with these weights, for parameters and EMA alike: its config is
    `config_for`'s, its optimiser state is fresh, and its data iterator has no state.

    Args:
        model: from `from_pytorch`, for example.
        workdir: local or `gs://` directory without checkpoints.
        data: `config.data.name`; like any field it can be overridden when the workdir is used.

    Returns:
        The config. Raises `InputError`, as `config_for` and `check_empty`, before it writes.
    """
    check_empty(workdir)
    config = config_for(model.spec, data)
    graphdef, params = functional.split(model)
    layout = network.layout(graphdef, params)
    transform = optimizer_lib.make_optimizer(config_lib.optimizer_options(config), layout)
    shapes = jax.eval_shape(functools.partial(state_lib.create, transform=transform), params)
    # Every rule's state starts at zero.
    fresh = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype).view(_Zeros), shapes.optimizer
    )
    state = state_lib.TrainState(np.int32(0), params, params, fresh)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, 0, config, data={})
    checkpoints.close()
    return config


def load_workdir(workdir: str, which: int | str = "last", ema: bool = True) -> DiT:
    """Loads the network of a workdir, in float32 and on the CPU.

    Args:
        workdir: a directory that `--mode=train` or `save_workdir` wrote.
        which: "last", "best" (as `Checkpoints.step` resolves it), or a step.
        ema: whether to load the EMA weights or the raw ones.

    Returns:
        A model ready to call. Raises `InputError` if there is no such checkpoint.
    """
    config = saved_config(workdir, which)
    checkpoints = Checkpoints(workdir, read_only=True)
    config_lib.validate(config)
    graphdef, shapes = functional.split(families.abstract(config_lib.model_spec(config)))
    place = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    params = checkpoints.weights(shapes, which, ema)
    checkpoints.close()
    return functional.merge(graphdef, params)
