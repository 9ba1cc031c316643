"""The training loop: restore, step, report, validate, sample, save. Started again in the same
workdir it continues by itself, bit for bit as if it had never stopped (on one CPU)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.data import pipeline
from ig_jax.data.source import DataSource
from ig_jax.diffusion import interpolant
from ig_jax.diffusion import loss as loss_lib
from ig_jax.errors import InputError, NotFiniteError, Stopped
from ig_jax.experiment import Experiment, make_to_images
from ig_jax.models import families
from ig_jax.models.functional import Params, split
from ig_jax.models.network import Network
from ig_jax.models.trunk import TrunkSpec, add_heads
from ig_jax.parallel import sharding
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.record import Weights
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import choose_labels
from ig_jax.sampling.run import make_engine
from ig_jax.storage.checkpoints import Checkpoints, Score
from ig_jax.streams import numpy_stream, stream
from ig_jax.training import metrics as metrics_lib
from ig_jax.training import optimizer as optimizer_lib
from ig_jax.training import state as state_lib

log = logging.getLogger("ig_jax")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled parts of training on one mesh.

    Attributes:
        init: `init(key) -> TrainState`.
        step: `step(state, batch, key) -> (state, StepMetrics)`; donates the state.
        validate: see `make_validation`.
        accumulate: adds a step's metrics.
        shapes: the state's shapes with shardings.
    """

    init: Callable[[jax.Array], state_lib.TrainState]
    step: Callable[..., tuple[state_lib.TrainState, state_lib.StepMetrics]]
    validate: Callable[..., Any]
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
    )


def make_programs(experiment: Experiment, source: DataSource) -> Programs:
    """Builds (without compiling yet) everything that runs on the devices."""
    config, mesh = experiment.config, experiment.mesh
    options = step_options(config, experiment.spec.null_label, source)
    optimizer_options, layout = config_lib.optimizer_options(config), experiment.layout
    transform = optimizer_lib.make_optimizer(
        optimizer_options, layout, functools.partial(sharding.over_layers, mesh)
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
    validate = make_validation(bind, options)
    return Programs(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, batch, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
        validate=jax.jit(validate, in_shardings=(shardings.params, batch)),
        accumulate=jax.jit(metrics_lib.accumulate, donate_argnums=0),
        shapes=jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        ),
    )


@flax.struct.dataclass
class HeldOut:
    """Some held-out examples and how the loss is taken on them.

    Attributes:
        batch: the examples, a dict of (B, …) arrays.
        index: (B,) int32, which of the held-out examples they are; noise depends on it alone.
        time: (B,) float32 path times.
        weight: (B,) float32, 0 for the filling of the last batch.
    """

    batch: Any
    index: Any
    time: Any
    weight: Any


def make_validation(
    bind: Callable[[Params], Network], options: state_lib.StepOptions
) -> Callable[[Params, HeldOut], tuple[jax.Array, jax.Array]]:
    """Returns the held-out loss: plain targets at fixed times and fixed noise.

    The result of `validate(params, held_out)` is (sum of losses, sum of weights), which add up over
    batches of any size.
    """
    plain = dataclasses.replace(options.loss, guided_target_scale=0.0)

    def example(values: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(stream(0, "validation"), index)
        x = pipeline.model_input(
            values, stream(key, "posterior"), shift=options.shift, scale=options.scale
        )
        return x, jax.random.normal(stream(key, "noise"), x.shape)

    def validate(params: Params, held_out: HeldOut) -> tuple[jax.Array, jax.Array]:
        x, noise = jax.vmap(example)(held_out.batch, held_out.index)
        labels = held_out.batch["label"]
        losses = loss_lib.losses_at(bind(params), x, labels, noise, held_out.time, plain)
        return (losses.total * held_out.weight).sum(), held_out.weight.sum()

    return validate


def validation_times(path: interpolant.Interpolant, count: int) -> np.ndarray:
    """Times for all held-out examples, (count,) float32: one in the middle of each of `count` parts
    of [0, 1], brought onto the times that the path trains at.

    Examples come in their own order, perhaps sorted by class, so the times are shuffled (always in
    the same way).
    """
    order = numpy_stream(0, "validation times").permutation(count)
    return np.asarray(path.training_time(jnp.asarray((order + 0.5) / count, jnp.float32)))


def held_out_batches(
    source: DataSource, path: interpolant.Interpolant, batch_size: int
) -> Iterator[HeldOut]:
    """This process's rows of the global batches of a data set's held-out examples, on the host."""
    count = len(source.validation)
    times = validation_times(path, count)
    share = batch_size // jax.process_count()
    first = jax.process_index() * share
    for start in range(0, count, batch_size):
        indices = start + first + np.arange(share)
        inside = indices < count
        indices = np.where(inside, indices, 0)
        examples = [source.validation[int(i)] for i in indices]
        batch = {
            name: np.stack([example[name] for example in examples])
            for name in examples[0]
            if not name.endswith("_flip")
        }
        yield HeldOut(batch, indices.astype(np.int32), times[indices], inside.astype(np.float32))


def validation_loss(
    programs: Programs, experiment: Experiment, source: DataSource, params: Params
) -> float:
    """The mean loss over all held-out examples; the same for any batch size."""
    place = functools.partial(
        jax.make_array_from_process_local_data, sharding.batch_sharding(experiment.mesh)
    )
    batch_size = experiment.config.train.batch_size
    sums = [
        sharding.settle(programs.validate(params, jax.tree.map(place, held_out)))
        for held_out in held_out_batches(source, experiment.path, batch_size)
    ]
    total, weight = np.sum(jax.device_get(sums), axis=0)
    return float(total / weight)


def open_batches(
    config: ConfigDict, source: DataSource, mesh: Mesh, data_state: dict | None
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
    for field in dataclasses.fields(comparable):
        found, expected = (getattr(s, field.name) for s in (comparable, experiment.spec))
        if found != expected:
            raise InputError(
                f"config.train.init_from is {workdir!r}, whose network has {field.name} {found}: "
                f"this config has {expected}"
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
    checkpoints = Checkpoints(experiment.config.train.init_from, read_only=True)
    params = checkpoints.weights(there.abstract_params())
    checkpoints.close()
    params = add_heads(params, there.spec, experiment.spec, fresh)
    places = sharding.state_sharding(experiment.mesh, params, experiment.layout)
    return jax.device_put(params, places)


class Trainer:
    """One run in one workdir; see `train`."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.config = config
        self.workdir = resolve(workdir)
        config_lib.check_training(config)
        self.experiment = Experiment.from_config(config)
        self.source = self.experiment.open_data()
        # Already here: a missing autoencoder shows now and not when the first pictures are due.
        draws = config.train.sample_every or config.evaluation.at_end
        self.to_images = make_to_images(self.experiment, self.source) if draws else None
        self.programs = make_programs(self.experiment, self.source)
        self.mesh = self.experiment.mesh
        self.key = stream(config.seed, "training")
        self.ema: Params | None = None
        self.step = 0
        self._stop = False
        self._check_workdir()
        open_batches(config, self.source, self.mesh, None)  # that they can be read; starts nothing
        self.evaluation = None
        if config.evaluation.at_end:
            from ig_jax.evaluation import run as evaluation

            # What is needed at the end is looked for at the start.
            evaluation.check(self.experiment, self.source)
        if config.evaluation.every:
            from ig_jax.evaluation import run as evaluation

            self.evaluation = evaluation.TrainingEvaluation(
                self.experiment, self.source, workdir, self.engine
            )

    def _check_workdir(self) -> None:
        """Refuses a workdir whose checkpoints another config made, before anything is written."""
        if not (self.workdir / "checkpoints").exists():
            if self.config.train.init_from:
                initial_network(self.experiment)
            return
        checkpoints = Checkpoints(str(self.workdir), read_only=True)
        if checkpoints.steps():
            lines = config_lib.differences(self.config, checkpoints.config())
            if lines:
                raise InputError(
                    f"{self.workdir} holds checkpoints of another config: {'; '.join(lines)}"
                )
        checkpoints.close()

    def _start(self, checkpoints: Checkpoints) -> tuple[state_lib.TrainState, dict | None]:
        """The state to start from, and the data iterator's state if it was restored."""
        if checkpoints.steps():
            restored = checkpoints.restore(self.programs.shapes)
            return restored.state, restored.data
        state = self.programs.init(stream(self.config.seed, "initialisation"))
        if self.config.train.init_from:
            params = initial_weights(self.experiment, state.params)
            state = state.replace(params=params, ema=jax.tree.map(jnp.array, params))
        return state, None

    def _validation_loss(self, params: Params) -> float:
        return validation_loss(self.programs, self.experiment, self.source, params)

    def _score(self, params: Params, step: int, saving: bool, writer: Any) -> Score | None:
        """Validates and evaluates when due; returns what ranks checkpoints, if it is known."""
        config, score = self.config, None
        if self.source.validation is not None and (
            _is_due(config.train.validate_every, step) or (saving and config.train.validate_every)
        ):
            score = Score("validation_loss", self._validation_loss(params))
            writer.write_scalars(step, {score.name: score.value})
        if self.evaluation is not None:
            score = None
            if _is_due(config.evaluation.every, step):
                scores = self.evaluation(params)
                writer.write_scalars(step, {f"evaluation/{k}": v for k, v in scores.items()})
                if scores:
                    score = Score(self.evaluation.score_name, scores["fid"])
        return score

    @functools.cached_property
    def engine(self) -> Engine:
        """The sampler for pictures during training."""
        return make_engine(self.experiment)

    def _sample_grid(self, params: Params, step: int) -> None:
        indices = np.arange(min(self.config.sampler.num_samples, 64))
        labels = choose_labels("balanced", indices, self.spec_classes, self.config.seed)
        guidance = config_lib.guidance(self.config).build(self.engine.weaker)
        x = self.engine.draw(params, guidance, self.config.seed, indices, labels)
        if is_primary():
            try:
                images = self.to_images(x, where=f" at step {step}")
            except NotFiniteError as error:
                log.warning("no sample grid: %s", error)
                return
            names = [self.source.class_names[i] if self.spec_classes else "" for i in labels]
            (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
            path = self.workdir / "samples" / f"step_{step:07d}.png"
            pictures.save_image(path, pictures.labelled_grid(images, names))

    def sample_scales(self, scales: Sequence[float], columns: int = 10) -> epath.Path:
        """Writes a grid of the same noise and labels at each IG scale, a row each."""
        indices = np.arange(columns)
        labels = choose_labels("balanced", indices, self.spec_classes, self.config.seed)
        rows, titles = [], []
        for scale in scales:
            options = config_lib.guidance(self.config, ig_scale=float(scale))
            at_scale = options.build(self.engine.weaker)
            x = self.engine.draw(self.ema, at_scale, self.config.seed, indices, labels)
            rows.append(x)
            titles += [f"w = {scale:g}"] * columns
        path = self.workdir / "samples" / "scales.png"
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            images = self.to_images(np.concatenate(rows))
            pictures.save_image(path, pictures.labelled_grid(images, titles, columns))
        return path

    @property
    def spec_classes(self) -> int:
        """Number of classes the model knows."""
        return self.experiment.spec.num_classes

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and Ctrl-C ask for a checkpoint and an orderly end."""
        alone = jax.process_count() == 1
        if not alone or threading.current_thread() is not threading.main_thread():
            # With several processes JAX's own handler tells all; see `Checkpoints.preempted`.
            yield
            return

        def stop(*_: Any) -> None:
            self._stop = True

        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, stop) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    def run(self) -> None:
        """Trains to `config.train.num_steps`; `ema` then holds the weights of step `step`."""
        config = self.config
        from clu import metric_writers, parameter_overview, periodic_actions

        self.workdir.mkdir(parents=True, exist_ok=True)
        writer = metric_writers.create_default_writer(
            str(self.workdir), just_logging=not is_primary(), asynchronous=True
        )
        checkpoints = Checkpoints(str(self.workdir), max_to_keep=config.train.max_to_keep)
        state, data_state = self._start(checkpoints)
        first_step = int(state.step)
        if first_step == 0:
            log.info(
                "parameters:\n%s",
                parameter_overview.get_parameter_overview(state.params, include_stats=False),
            )
        else:
            log.info("continuing from step %d", first_step)
        if first_step > config.train.num_steps:
            log.warning("nothing to train: config.train.num_steps is %d", config.train.num_steps)
        # Also of a continued run, whose options may be others.
        writer.write_hparams(_flat(config))
        batches = open_batches(config, self.source, self.mesh, data_state)
        schedule = optimizer_lib.learning_rate_schedule(config_lib.optimizer_options(config))
        hooks: list[Any] = []
        if config.train.profile_at:
            hooks.append(
                periodic_actions.Profile(
                    logdir=str(self.workdir),
                    first_profile=config.train.profile_at,
                    num_profile_steps=5,
                    every_secs=None,
                )
            )
        total = config.train.num_steps
        bar = console.progress_bar(total, "training", first_step)
        with self._stopping_on_signals(), bar as advance:
            state = self._steps(
                state, first_step, batches, checkpoints, writer, hooks, schedule, advance
            )
        checkpoints.close()
        writer.close()
        self.ema, self.step = state.ema, int(state.step)

    def _steps(
        self,
        state: state_lib.TrainState,
        first_step: int,
        batches: pipeline.DevicePrefetch,
        checkpoints: Checkpoints,
        writer: Any,
        hooks: list[Any],
        schedule: optax.Schedule,
        advance: console.Advance,
    ) -> state_lib.TrainState:
        train = self.config.train
        totals, reported = metrics_lib.TrainMetrics.empty(), first_step
        clock = metrics_lib.StepClock()
        for step in range(first_step + 1, train.num_steps + 1):
            state, scalars = sharding.settle(self.programs.step(state, next(batches), self.key))
            totals = self.programs.accumulate(totals, state.step, scalars)
            last = step == train.num_steps
            stopping = self._stop or checkpoints.preempted(step)
            saving = last or stopping or _is_due(train.checkpoint_every, step)
            # An evaluated step is saved too: it may turn out to be the best.
            saving |= self.evaluation is not None and _is_due(self.config.evaluation.every, step)
            drawing = _is_due(train.sample_every, step) or (last and train.sample_every > 0)
            for hook in hooks:
                hook(step)
            if saving or _is_due(train.log_every, step):
                values = self._averages(totals, checkpoints)
                rate = (step - reported) / clock.lap()
                values |= {
                    "learning_rate": float(schedule(step - 1)),
                    "steps_per_second": rate,
                    "images_per_second": rate * train.batch_size,
                }
                writer.write_scalars(step, values)
                advance(step - reported, f"loss {values['loss']:.4f}  {rate:.1f} steps/s")
                totals, reported = metrics_lib.TrainMetrics.empty(), step
            if saving or drawing or _is_due(train.validate_every, step):
                with clock.stopped(state):
                    score = self._score(state.ema, step, saving, writer)
                    if drawing:
                        self._sample_grid(state.ema, step)
                    if saving:
                        facts = self.source.facts()
                        checkpoints.save(state, step, self.config, batches.state, score, facts)
            if stopping and not last:
                checkpoints.close()
                raise Stopped(
                    f"stopped at step {step}, checkpoint saved; the same command continues: "
                    f"{self.workdir}"
                )
        return state

    def _averages(
        self, totals: metrics_lib.TrainMetrics, checkpoints: Checkpoints
    ) -> dict[str, float]:
        """Averages since the last report; raises `NotFiniteError` if the loss was not finite."""
        values, bad = metrics_lib.report(totals)
        if bad is None:
            return values
        kept = f"the last good checkpoint in {self.workdir} is kept"
        if not checkpoints.steps():
            kept = "there is no checkpoint yet"
        checkpoints.close()
        raise NotFiniteError(
            f"the loss is not finite at step {bad}: training stopped, expected a finite number; "
            f"{kept} (lower config.optimizer.learning_rate, or look at the data)"
        )


def _is_due(every: int, step: int) -> bool:
    """Whether what happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def _flat(config: ConfigDict) -> dict[str, Any]:
    """A config as flat names and plain values, for TensorBoard's hyperparameters."""
    flat = {}
    for section, values in config.items():
        pairs = values.items() if isinstance(values, ConfigDict) else [(None, values)]
        for name, value in pairs:
            if isinstance(value, str | tuple):  # a path need not be UTF-8
                value = pictures.printable(str(value))
            flat[f"{section}.{name}" if name else section] = value
    return flat


def train(config: ConfigDict, workdir: str) -> Trainer:
    """Trains the experiment that a config describes.

    Args:
        config: a complete config.
        workdir: where checkpoints, logs and pictures go; local or `gs://`. A run that was stopped
            there continues.

    Returns:
        The trainer, whose `ema` holds the trained weights on the mesh.

    Raises:
        InputError: a config, data set or workdir that does not fit, before anything is written.
        NotFiniteError: a loss that is no longer finite (the last good checkpoint is kept).
        Stopped: after SIGTERM or SIGINT, once a checkpoint is saved.
    """
    trainer = Trainer(config, workdir)
    trainer.run()
    return trainer


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=train`: trains, and evaluates at the end if the config says so; raises as `train`."""
    trainer = train(config, workdir)
    steps = f"trained {trainer.step} steps"
    if config.evaluation.at_end:
        from ig_jax.evaluation import run as evaluation

        weights = Weights(trainer.ema, trainer.step, True, config.train.ema_decay)
        last_line = evaluation.at_end(
            trainer.experiment, weights, trainer.source, workdir, trainer.engine
        )
        grid = trainer.sample_scales(config.evaluation.ig_scales or (1.0, config.guidance.ig_scale))
        return f"{steps}; {last_line}; the same noise at each: {grid}"
    return f"{steps}; checkpoints, samples and logs are in {workdir}"
