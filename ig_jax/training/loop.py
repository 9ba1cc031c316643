"""The training loop: restore, step, call back, save. Started again in the same workdir it continues
by itself, bit for bit as if it had never stopped (on one CPU)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from ig_jax import console, stops
from ig_jax.errors import Stopped
from ig_jax.models.functional import Params
from ig_jax.parallel.processes import is_primary
from ig_jax.parallel.sharding import wait_if_simulated
from ig_jax.storage.checkpoints import Checkpoints
from ig_jax.storage.files import write_atomically
from ig_jax.storage.lock import hold
from ig_jax.streams import stream
from ig_jax.training import setup as setup_lib
from ig_jax.training.callbacks import Callback, Moment, Report, is_due
from ig_jax.training.logs import Logs, import_ahead, open_logs
from ig_jax.training.metrics import StepClock
from ig_jax.training.setup import Programs, Setup, open_batches
from ig_jax.training.state import TrainState

log = logging.getLogger("ig_jax")

_CONTINUES = "the same command continues: "

# What resumed runs changed with `config.train.allow_changes`, and from which step on.
CHANGES = "changes.json"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a finished run leaves.

    Attributes:
        step: the last one.
        ema: its EMA weights on the mesh.
        said: what callbacks say of what they did at the end.
        programs: what ran.
    """

    step: int
    ema: Params
    said: tuple[str, ...]
    programs: Programs


def train(setup: Setup, callbacks: Sequence[Callback] = ()) -> Trained:
    """Trains to `config.train.num_steps`, from where a run in the same workdir was stopped.

    Args:
        setup: the run.
        callbacks: what happens beside the steps, in this order, after metrics are reported.

    Raises:
        NotFiniteError: a step was not finite (it is not saved; the last checkpoint is whole).
        Stopped: after SIGTERM or SIGINT, once a checkpoint is saved.
    """
    several = jax.process_count() > 1
    with contextlib.ExitStack() as kept:
        with stops.request(forward=several) as stop, contextlib.ExitStack() as stack:
            state, logs = _run(setup, callbacks, stack, kept, stop)
        step, ema = int(state.step), state.ema
        if stop.asked:
            raise Stopped(
                f"stopped after the last step, {step}; the same command does what is left"
            )
        del state  # the rest of it is not needed any more, and large
        said = [callback.on_end(step, ema, logs) for callback in callbacks]
    return Trained(step, ema, tuple(filter(None, said)), setup.programs)


def _run(
    setup: Setup,
    callbacks: Sequence[Callback],
    stack: contextlib.ExitStack,
    kept: contextlib.ExitStack,
    stop: stops.Request,
) -> tuple[TrainState, Logs]:
    """Opens what the steps need and takes them; what must be closed is left to `stack`, and what
    the end still needs to `kept`."""
    config = setup.config
    for callback in callbacks:
        stack.callback(callback.close)
    setup.workdir.mkdir(parents=True, exist_ok=True)
    lock = kept.enter_context(hold(setup.workdir))
    checkpoints = Checkpoints(
        setup.workdir,
        max_to_keep=config.train.max_to_keep,
        verify=config.train.verify_checkpoints,
    )
    stack.callback(checkpoints.close)
    import_ahead()
    state, data_state = setup.initial_state(checkpoints)
    first_step = int(state.step)
    _announce(state.params, first_step, config.train.num_steps)
    if setup.changes:
        _record_changes(setup, first_step)
    logs = open_logs(config, setup.workdir, first_step)
    kept.callback(logs.close)
    batches = open_batches(config, setup.source, setup.experiment.mesh, data_state)
    stack.callback(batches.close)
    bar = console.progress_bar(config.train.num_steps, "training", first_step)
    advance = stack.enter_context(bar)
    clock, add = StepClock(), setup.programs.accumulate
    # First of all, so that a state that is not finite is never saved.
    blame = functools.partial(setup_lib.blame, config, setup.source)
    report = Report(config, first_step, add, clock, checkpoints, advance, blame)
    callbacks = (report, *callbacks)
    steps = range(first_step + 1, config.train.num_steps + 1)
    for moment in _steps(setup, state, batches, steps, logs):
        stop.defer()  # now that there is something to save
        state, step = moment.state, moment.step
        for callback in callbacks:
            callback.on_step(moment)
        stopping = stop.asked or checkpoints.preempted(step)
        saving = stopping or _saves(config, callbacks, step)
        due = [callback for callback in callbacks if callback.due(step, saving)]
        if due or saving:
            with clock.stopped(state):
                scores = []
                with contextlib.suppress(Stopped):  # of what takes long, and is saved afterwards
                    scores = [callback.on_due(moment) for callback in due]
                if saving:
                    lock.check()
                    score = next(filter(None, reversed(scores)), None)
                    facts = setup.source.facts()
                    checkpoints.save(state, step, config, batches.state, score, facts)
        stopping = stopping or (saving and stop.asked)
        if stopping and step < config.train.num_steps:
            checkpoints.wait()
            raise Stopped(f"stopped at step {step}, checkpoint saved; {_CONTINUES}{setup.workdir}")
    return state, logs


def _steps(
    setup: Setup,
    state: TrainState,
    batches: Iterator[dict[str, jax.Array]],
    steps: Sequence[int],
    logs: Logs,
) -> Iterator[Moment]:
    """Takes the steps, one each time it is asked for the next."""
    key = stream(setup.config.seed, "training")
    for step in steps:
        state, metrics = wait_if_simulated(setup.programs.step(state, next(batches), key))
        yield Moment(step, state, metrics, logs)


def _saves(config: ConfigDict, callbacks: Sequence[Callback], step: int) -> bool:
    """Whether a checkpoint is due after this step."""
    if step == config.train.num_steps or is_due(config.train.checkpoint_every, step):
        return True
    return any(callback.saves and callback.due(step, False) for callback in callbacks)


def _announce(params: Params, first_step: int, num_steps: int) -> None:
    """Logs what the run starts from."""
    from clu import parameter_overview

    if first_step == 0:
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        log.info("parameters:\n%s", table)
    else:
        log.info("continuing from step %d", first_step)
    if first_step > num_steps:
        log.warning("nothing to train: config.train.num_steps is %d", num_steps)


def _record_changes(setup: Setup, step: int) -> None:
    """Says, and keeps in the workdir, what a run continues differently from here on."""
    log.info("from step %d on: %s", step, "; ".join(setup.changes))
    if not is_primary():
        return
    path = setup.workdir / CHANGES
    before = json.loads(path.read_text()) if path.exists() else []
    with write_atomically(path) as partial:
        entry = {"step": step, "changes": list(setup.changes)}
        partial.write_text(json.dumps([*before, entry], indent=1) + "\n")
