"""A tiny digits experiment whose weights are random but not zero, so that guidance matters."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ig_jax.config import default_config, model_options
from ig_jax.experiment import Experiment
from ig_jax.models import dit
from ig_jax.models.functional import Params, split
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.training.state import TrainState

STEP = 7


def tiny_config() -> ConfigDict:
    config = default_config("sit", "s")
    config.model.update(
        width=32,
        depth=2,
        heads=2,
        auxiliary_depth=1,
        input_size=8,
        channels=1,
        patch_size=4,
        num_classes=10,
        dtype="float32",
    )
    config.data.update(name="digits", image_size=8, num_validation=180, autoencoder="")
    config.train.batch_size = 64
    config.sampler.update(name="euler", num_steps=4, batch_size=64)
    config.evaluation.update(num_samples=160, train_samples=96, ig_scales=(0.0, 1.0, 2.0))
    config.sweep.update(
        ig_scales=(0.0, 1.0, 1.5, 2.0),
        ig_intervals=(0.0, 1.0, 0.4, 1.0),
        num_samples=256,
        budget=7 * 256,
        bootstrap=10,
    )
    return config


def tiny_params(experiment: Experiment) -> Params:
    model = dit.DiT(experiment.spec, **model_options(experiment.config), rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.1 * generator.standard_normal(p.shape).astype(np.float32), split(model)[1]
    )
    places = sharding.state_sharding(experiment.mesh, params, experiment.layout)
    return jax.device_put(params, places)


def on_one_device(experiment: Experiment) -> Experiment:
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    return dataclasses.replace(experiment, mesh=mesh)


def save_checkpoint(experiment: Experiment, params: Params, workdir: pathlib.Path) -> None:
    # Raw weights that differ from the EMA, so that taking the wrong ones shows.
    raw = jax.tree.map(lambda p: 0.5 * p, params)
    state = TrainState(jnp.int32(STEP), raw, params, {"count": jnp.int32(STEP)})
    checkpoints = Checkpoints(str(workdir))
    facts = experiment.open_data().facts()
    checkpoints.save(state, STEP, experiment.config, {}, source=facts)
    checkpoints.close()
