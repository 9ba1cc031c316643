"""The same small digits run on any mesh, in this process or as one of several: what it learns, what
it draws and what its compiled step exchanges."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.experiment import Experiment
from ig_jax.parallel import sharding
from ig_jax.sampling.run import make_engine
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.training.setup import make_programs, open_batches
from ig_jax.training.state import TrainState
from tests.common import tiny_config

STEPS = 50
# Most of these tests' time is LLVM's.
QUICKLY = {"xla_backend_optimization_level": 0}


def wide_config(**train: Any) -> ConfigDict:
    """A network wide enough that some matrices are gathered layer by layer and others at once."""
    config = tiny_config(**train)
    config.model.update(width=64, depth=6, auxiliary_depth=(2, 4))
    config.guidance.ig_scale = 1.5
    return config


def experiment_on(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """The config's experiment on a mesh of some of the devices."""
    return dataclasses.replace(Experiment.from_config(config), mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Result:
    """Losses (STEPS, 2) of both heads, samples (24, 8, 8, 1), the step's HLO, the last state."""

    losses: np.ndarray
    samples: np.ndarray
    hlo: str
    state: TrainState


def train_and_draw(
    config: ConfigDict, mesh: jax.sharding.Mesh, state: TrainState | None = None
) -> Result:
    """Trains from a state on the host (or a new one), then draws from the EMA weights."""
    experiment = experiment_on(config, mesh)
    source = experiment.open_data()
    programs = make_programs(experiment, source)
    if state is None:
        state = programs.init(jax.random.key(1))
    else:
        state = jax.device_put(state, sharding.state_sharding(mesh, state, experiment.layout))
    batches = open_batches(config, source, mesh)
    batch = next(batches)
    key = jax.jit(lambda: jax.random.key(2), out_shardings=sharding.replicated(mesh))()
    step = programs.step.lower(state, batch, key).compile(QUICKLY)
    losses = []
    for _ in range(STEPS):
        state, metrics = sharding.wait_if_simulated(step(state, batch, key))
        losses.append((metrics.loss_final, metrics.loss_auxiliary))
        batch = next(batches)
    indices = np.arange(config.sampler.batch_size * 3 // 2)  # the second batch is half filled
    engine = make_engine(experiment)
    guidance = GuidanceOptions.of(config.guidance).build()
    samples = engine.draw(state.ema, guidance, 0, indices, (indices % 10).astype(np.int32))
    return Result(np.asarray(jax.device_get(losses)), samples, step.as_text(), state)


def restore(workdir: str, config: ConfigDict, mesh: jax.sharding.Mesh) -> TrainState:
    """The whole state of a workdir's last checkpoint, restored onto a mesh, then as host arrays."""
    experiment = experiment_on(config, mesh)
    shapes = make_programs(experiment, experiment.open_data()).shapes
    checkpoints = Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(shapes).state
    checkpoints.close()
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(state)
    return jax.device_get(whole)


def main(workdir: str, output: str) -> None:
    """Runs as one process of several: trains, draws, restores `workdir`, writes what it found."""
    from ig_jax.parallel import processes

    processes.initialize({}, timeout_s=60)
    config = wide_config()
    mesh = sharding.make_mesh(4, 2)
    result = train_and_draw(config, mesh)
    leaves = jax.tree.leaves(restore(workdir, config, mesh))
    name = f"{output}.{jax.process_index()}.npz"
    arrays = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
    np.savez(name, losses=result.losses, samples=result.samples, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
