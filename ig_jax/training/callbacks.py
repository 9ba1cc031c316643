"""What happens beside the steps of training: the one protocol for all of it, the report of metrics
and the profile. Validation, sample grids and evaluation are callbacks in files of their own."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import os
import statistics
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console
from ig_jax.errors import NotFiniteError
from ig_jax.models.functional import Params
from ig_jax.storage.checkpoints import Checkpoints, Score
from ig_jax.training.logs import Writer
from ig_jax.training.metrics import WHAT, Bad, StepClock, TrainMetrics, report
from ig_jax.training.optimizer import learning_rate_schedule
from ig_jax.training.state import StepMetrics, TrainState

log = logging.getLogger("ig_jax")

# A loss this many times the median of the last reports is a spike.
_SPIKE, _RECENT = 3.0, 21
# A run whose updates are skipped, all of them, stops after this many.
_SKIPPED_AT_MOST = 10


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step that was just taken.

    Attributes:
        step: its number; the first is 1.
        state: the training state after it. The next step overwrites it: keep nothing of it.
        metrics: its scalars, on the devices and perhaps still being computed.
        writer: takes numbers and pictures.
    """

    step: int
    state: TrainState
    metrics: StepMetrics
    writer: Writer


class Callback:
    """Something that happens beside the steps; what is not overridden does nothing.

    Attributes:
        saves: whether a step at which it is due is saved too, since it may turn out to be the best.
    """

    saves: bool = False

    def on_step(self, moment: Moment) -> None:
        """After every step. Waiting for the devices here would make them wait for the host."""

    def due(self, step: int, saving: bool) -> bool:
        """Whether `on_due` is called after this step, which is saved if `saving`."""
        return False

    def on_due(self, moment: Moment) -> Score | None:
        """Does its work, in time that does not count as training.

        Returns:
            What ranks the checkpoint of this step, if it has one; the last callback to say decides.
        """

    def on_end(self, step: int, ema: Params, writer: Writer) -> str:
        """After the last step, once all is saved and closed; says what it did, if anything.

        Args:
            step: the last one.
            ema: its EMA weights on the mesh.
            writer: takes numbers and pictures.
        """
        return ""

    def close(self) -> None:
        """Releases what it holds, however the run ends."""


def is_due(every: int, step: int) -> bool:
    """Whether what happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


class Report(Callback):
    """Writes averages over the steps since the last report, and their speed.

    Args:
        config: of the run.
        first_step: steps taken before.
        accumulate: adds a step's metrics.
        clock: of the steps.
        checkpoints: of the run.
        advance: of the progress bar.
        blame: what is wrong with the examples of a step, if anything, in words.
    """

    def __init__(
        self,
        config: ConfigDict,
        first_step: int,
        accumulate: Callable[..., TrainMetrics],
        clock: StepClock,
        checkpoints: Checkpoints,
        advance: console.Advance,
        blame: Callable[[int], str],
    ):
        self._train, self._reported = config.train, first_step
        self._accumulate, self._clock = accumulate, clock
        self._checkpoints, self._advance = checkpoints, advance
        self._schedule = learning_rate_schedule(config_lib.optimizer_options(config))
        self._blame, self._skipped = blame, 0
        self._totals = TrainMetrics.empty()
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        # Losses of steps that the devices may still be at.
        self._pending: collections.deque[jax.Array] = collections.deque()

    def on_step(self, moment: Moment) -> None:
        self._totals = self._accumulate(self._totals, moment.state.step, moment.metrics)
        self._pending.append(moment.metrics.loss)
        while self._pending and self._pending[0].is_ready():
            self._pending.popleft()
            self._advance()

    def due(self, step: int, saving: bool) -> bool:
        return saving or is_due(self._train.log_every, step)

    def on_due(self, moment: Moment) -> None:
        """Raises `NotFiniteError` if a step was not finite, unless those are to be skipped."""
        values, bad = report(self._totals)
        steps = moment.step - self._reported
        if bad is not None:
            self._skipped = self._skipped + steps if bad.count == steps else 0
            if self._train.not_finite == "stop" or self._skipped >= _SKIPPED_AT_MOST:
                raise self._diverged(bad, moment)
            log.warning("%s: %d updates skipped", self._describe(bad, moment), bad.count)
        else:
            self._skipped = 0
        if self._train.not_finite == "skip":
            values["skipped_updates"] = bad.count if bad else 0
        self._warn_of_spike(moment.step, values)
        rate = steps / self._clock.lap()
        values["learning_rate"] = float(self._schedule(moment.step - 1))
        speed = {"steps_per_second": rate, "images_per_second": rate * self._train.batch_size}
        named = {f"train/{name}": value for name, value in values.items()}
        named |= {f"speed/{name}": value for name, value in speed.items()}
        moment.writer.write_scalars(moment.step, named)
        names = ("loss_final", "loss_auxiliary", "gradient_norm", "learning_rate")
        details = [f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names]
        self._advance(len(self._pending), f"loss {values['loss']:.4f}", ", ".join(details))
        self._pending.clear()
        self._totals, self._reported = TrainMetrics.empty(), moment.step

    def _warn_of_spike(self, step: int, values: dict[str, float]) -> None:
        """Says so where one step's loss is far above what was usual in the last reports."""
        largest, usual = values["loss_largest"], statistics.median(self._recent or [math.inf])
        if usual > 0 and largest > _SPIKE * usual:
            log.warning(
                "loss spike before step %d: %.4g, the median of %d reports is %.4g",
                *(step, largest, len(self._recent), usual),
            )
        if math.isfinite(values["loss"]):
            self._recent.append(values["loss"])

    def _describe(self, bad: Bad, moment: Moment) -> str:
        """The first bad step in words: what was not finite, where, and in which examples."""
        where = ""
        if bad.parameter >= 0:
            path, _ = jax.tree_util.tree_leaves_with_path(moment.state.params)[bad.parameter]
            where = f", nor is {jax.tree_util.keystr(path, simple=True, separator='.')}"
        blame = self._blame(bad.step)
        return f"the {WHAT[bad.what]} is not finite at step {bad.step}{where}" + (
            f" ({blame})" if blame else ""
        )

    def _diverged(self, bad: Bad, moment: Moment) -> NotFiniteError:
        self._checkpoints.wait()
        steps, workdir = self._checkpoints.steps(), self._checkpoints.directory.parent
        remedy = "expected a lower config.optimizer.learning_rate"
        resumed = (
            "with a lower --config.optimizer.learning_rate and "
            "--config.train.allow_changes=optimizer"
        )
        if self._blame(bad.step):
            remedy, resumed = "expected data that are finite", "with data that are finite"
        remedy = f"there is no checkpoint yet: {remedy}"
        if steps:
            remedy = (
                f"checkpoint {steps[-1]} in {workdir} is whole, go on from there {resumed}, or "
                "with --config.train.not_finite=skip"
            )
        return NotFiniteError(f"{self._describe(bad, moment)}: training stopped; {remedy}")


class Profile(Callback):
    """Records a few steps for TensorBoard's profiler.

    Args:
        folder: where to.
        first: the recording starts when this step was taken.
        steps: how many it covers.
    """

    def __init__(self, folder: epath.PathLike, first: int, steps: int = 5):
        self._folder, self._first, self._last = folder, first, first + steps
        self._running = False

    def on_step(self, moment: Moment) -> None:
        if moment.step == self._first:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True
        elif moment.step == self._last and self._running:
            jax.block_until_ready(moment.metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
