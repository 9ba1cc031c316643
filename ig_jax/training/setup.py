"""What a run is made of, checked before anything is written: data, programs, initial weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax.data import pipeline
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models import families, network
from ig_jax.models.functional import Params, split
from ig_jax.models.trunk import TrunkSpec, add_heads
from ig_jax.parallel import sharding
from ig_jax.paths import resolve
from ig_jax.storage.checkpoints import FOLDER, Checkpoints, resumed_config
from ig_jax.streams import stream
from ig_jax.training import logs
from ig_jax.training import metrics as metrics_lib
from ig_jax.training import optimizer as optimizer_lib
from ig_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled parts of training on one mesh.

    Attributes:
        init: `init(key) -> TrainState`.
        step: `step(state, batch, key) -> (state, StepMetrics)`; donates the state.
        accumulate: adds a step's metrics.
        shapes: the state's shapes with shardings.
    """

    init: Callable[[jax.Array], state_lib.TrainState]
    step: Callable[..., tuple[state_lib.TrainState, state_lib.StepMetrics]]
    accumulate: Callable[..., metrics_lib.TrainMetrics]
    shapes: state_lib.TrainState


def step_options(config: ConfigDict, null_label: int, source: DataSource) -> state_lib.StepOptions:
    """What the training step takes from a config and a data set."""
    return state_lib.StepOptions(
        loss=config_lib.loss_options(config),
        null_label=null_label,
        ema_decay=config.train.ema_decay,
        accumulate=config.train.accumulate,
        shift=source.shift,
        scale=source.scale,
        skip_not_finite=config.train.not_finite == "skip",
    )


def make_programs(experiment: Experiment, source: DataSource) -> Programs:
    """Builds (without compiling yet) everything that runs on the devices."""
    config, mesh = experiment.config, experiment.mesh
    options = step_options(config, experiment.spec.null_label, source)
    optimizer_options, layout = config_lib.optimizer_options(config), experiment.layout
    transform = optimizer_lib.make_optimizer(
        optimizer_options, layout, functools.partial(sharding.share_layers, mesh)
    )
    norm = functools.partial(optimizer_lib.gradient_norm, optimizer_options, layout)

    def init(key: jax.Array) -> state_lib.TrainState:
        model = families.make(
            experiment.spec, **config_lib.model_options(config), rngs=nnx.Rngs(params=key)
        )
        return state_lib.create(split(model)[1], transform)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_sharding(mesh, shapes, layout)
    batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    bind = functools.partial(sharding.network, mesh, experiment.graphdef)
    step = state_lib.make_train_step(bind, transform, options, norm)
    return Programs(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, batch, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
        accumulate=jax.jit(metrics_lib.accumulate, donate_argnums=0),
        shapes=jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        ),
    )


def compile_ahead(experiment: Experiment) -> Programs:
    """As `make_programs`, and what the first steps would wait for is compiled: for another thread.

    JAX finds what any thread of the process has compiled for the same types.
    """
    source = experiment.open_data()
    programs, key = make_programs(experiment, source), jax.random.key(0)
    with contextlib.closing(open_batches(experiment.config, source, experiment.mesh)) as batches:
        batch = next(batches)
    for lowered in (
        programs.init.lower(key),
        programs.step.lower(programs.shapes, batch, key),
    ):
        lowered.compile()
    return programs


def open_batches(
    config: ConfigDict, source: DataSource, mesh: Mesh, data_state: dict | None = None
) -> pipeline.DevicePrefetch:
    """Training batches on the mesh, from the start or from a restored iterator state."""
    iterator = pipeline.make_iterator(
        source.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.data.num_workers,
        flip=config.data.flip,
    )
    if data_state:  # empty in workdirs that were converted from PyTorch
        iterator.set_state(data_state)
    return pipeline.DevicePrefetch(iterator, sharding.batch_sharding(mesh))


def blame(config: ConfigDict, source: DataSource, step: int) -> str:
    """Names the first example of a step's batch that is not finite; empty if all are."""
    return pipeline.first_not_finite(
        source.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        step=step,
    )


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run in a workdir, checked against what is there and ready to start.

    Attributes:
        experiment: the config and its parts.
        source: its data set.
        programs: what runs on the devices.
        workdir: where checkpoints, logs and pictures go.
        changes: lines on how the config differs from that of the checkpoints there, if it may.
    """

    experiment: Experiment
    source: DataSource
    programs: Programs
    workdir: epath.Path
    changes: tuple[str, ...] = ()

    @classmethod
    def from_config(
        cls, config: ConfigDict, workdir: epath.PathLike, programs: Programs | None = None
    ) -> Setup:
        """Checks everything that can be checked before anything is written; raises `InputError`.

        Programs, if given, are those of a run that differs in its seed and folders alone.
        """
        config_lib.check_training(config)
        logs.check(config)
        experiment = Experiment.from_config(config)
        source = experiment.open_data()
        workdir = resolve(workdir)
        changes = _check_workdir(experiment, workdir)
        open_batches(config, source, experiment.mesh).close()  # that they can be read
        programs = programs or make_programs(experiment, source)
        return cls(experiment, source, programs, workdir, changes)

    @property
    def config(self) -> ConfigDict:
        """The config that describes it."""
        return self.experiment.config

    def initial_state(self, checkpoints: Checkpoints) -> tuple[state_lib.TrainState, dict | None]:
        """The state to start from, and the data iterator's state if it was restored."""
        if restored := checkpoints.resume(self.programs.shapes):
            return restored.state, restored.data
        state = self.programs.init(stream(self.config.seed, "initialisation"))
        if self.config.train.init_from:
            params = initial_weights(self.experiment, state.params)
            state = state.replace(params=params, ema=jax.tree.map(jnp.array, params))
        return state, None


def _check_workdir(experiment: Experiment, workdir: epath.Path) -> tuple[str, ...]:
    """Refuses a workdir whose checkpoints another config made; returns the changes allowed."""
    config = experiment.config
    if not (workdir / FOLDER).exists():
        if config.train.init_from:
            initial_network(experiment)
        return ()
    saved = resumed_config(workdir)
    if saved is None:
        return ()
    if lines := config_lib.differences(config, saved):
        raise InputError(f"{workdir} holds checkpoints of another config: {'; '.join(lines)}")
    return tuple(config_lib.allowed_changes(config, saved))


def initial_network(experiment: Experiment) -> Experiment:
    """The experiment of the workdir `config.train.init_from`, to start training from.

    Raises `InputError` if its architecture differs from this one in anything but that it lacks
    auxiliary heads.
    """
    workdir = experiment.config.train.init_from
    there = experiment.of_workdir(workdir)
    comparable, depths = there.spec, experiment.spec.auxiliary_depths
    if isinstance(comparable, TrunkSpec) and set(comparable.auxiliary_depths) <= set(depths):
        comparable = dataclasses.replace(comparable, auxiliary_depths=depths)
    if found := network.difference(comparable, experiment.spec):
        name, theirs, ours = found
        raise InputError(
            f"config.train.init_from is {workdir!r}, whose network has {name} {theirs}: "
            f"this config has {ours}"
        )
    return there


def initial_weights(experiment: Experiment, fresh: Params) -> Params:
    """The EMA weights of the workdir `config.train.init_from`, placed on this run's mesh.

    Auxiliary heads that the network there lacks are this run's fresh ones: that is how internal
    guidance is added to a model that was trained without it.

    Args:
        experiment: of this run.
        fresh: this run's newly initialised parameters.

    Returns:
        Parameters of this run's architecture. Raises `InputError` as `initial_network` does.
    """
    there = initial_network(experiment)
    workdir = experiment.config.train.init_from
    verify = experiment.config.train.verify_checkpoints
    opened = Checkpoints(workdir, read_only=True, verify=verify)
    with contextlib.closing(opened) as checkpoints:
        params = checkpoints.weights(there.abstract_params())
    params = add_heads(params, there.spec, experiment.spec, fresh)
    places = sharding.state_sharding(experiment.mesh, params, experiment.layout)
    return jax.device_put(params, places)
