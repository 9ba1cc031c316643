"""Training metrics: accumulated on devices with CLU, watched for losses that
stopped being numbers; and the clock that times the steps."""

# No `from __future__ import annotations`: CLU reads the annotations as types.
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from ig_jax.training.state import StepMetrics

_NEVER = jnp.iinfo(jnp.int32).max


class Bad(NamedTuple):
    """Steps that were not finite: the first, how many, and what was not finite in the first.

    Attributes:
        step: its number.
        count: of such steps.
        what: an index of `WHAT`.
        parameter: as `StepMetrics.bad_parameter` of the first.
    """

    step: int
    count: int
    what: int
    parameter: int


WHAT = ("loss", "gradient", "update")


@flax.struct.dataclass
class BadSteps(clu_metrics.Metric):
    """`Bad` of all steps, as int32."""

    values: jax.Array

    @classmethod
    def empty(cls) -> "BadSteps":
        """No bad step yet."""
        return cls(values=jnp.array([_NEVER, 0, 0, 0], jnp.int32))

    @classmethod
    def from_model_output(cls, step: jax.Array, metrics: StepMetrics, **_: Any) -> "BadSteps":
        loss, gradient = (~jnp.isfinite(x) for x in (metrics.loss, metrics.gradient_norm))
        what = jnp.where(loss, 0, jnp.where(gradient, 1, 2))
        found = jnp.stack([step, jnp.ones_like(step), what, metrics.bad_parameter])
        return cls(values=jnp.where(metrics.healthy, cls.empty().values, found.astype(jnp.int32)))

    def merge(self, other: "BadSteps") -> "BadSteps":
        count = self.values[1] + other.values[1]
        first = jnp.where(self.values[0] <= other.values[0], self.values, other.values)
        return BadSteps(values=first.at[1].set(count))

    def compute(self) -> jax.Array:
        return self.values


@flax.struct.dataclass
class Largest(clu_metrics.Metric):
    """The largest loss of a step."""

    value: jax.Array

    @classmethod
    def empty(cls) -> "Largest":
        return cls(value=jnp.float32(-jnp.inf))

    @classmethod
    def from_model_output(cls, metrics: StepMetrics, **_: Any) -> "Largest":
        return cls(value=jnp.where(metrics.healthy, metrics.loss, -jnp.inf))

    def merge(self, other: "Largest") -> "Largest":
        return Largest(value=jnp.maximum(self.value, other.value))

    def compute(self) -> jax.Array:
        return self.value


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Averages since the last report, over the steps that were finite."""

    loss: clu_metrics.Average.from_output("loss")
    loss_final: clu_metrics.Average.from_output("loss_final")
    loss_auxiliary: clu_metrics.Average.from_output("loss_auxiliary")
    loss_cosine: clu_metrics.Average.from_output("loss_cosine")
    gradient_norm: clu_metrics.Average.from_output("gradient_norm")
    loss_largest: Largest
    bad_steps: BadSteps


def accumulate(total: TrainMetrics, step: jax.Array, new: StepMetrics) -> TrainMetrics:
    """Adds one step's scalars; pure, to be jitted. `step` is the number of the step just taken."""
    values = {field: getattr(new, field)[None] for field in new.__dataclass_fields__}
    mask = new.healthy[None]
    single = TrainMetrics.single_from_model_output(step=step, metrics=new, mask=mask, **values)
    return total.merge(single)


def report(total: TrainMetrics) -> tuple[dict[str, float], Bad | None]:
    """Fetches the averages, and what is known of bad steps if there were any."""
    values = jax.device_get(total.compute())
    bad = Bad(*values.pop("bad_steps").tolist())
    return {name: float(v) for name, v in values.items()}, bad if bad.count else None


class StepClock:
    """Measures the time that training steps take; work beside them stops it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = time.monotonic()

    @contextlib.contextmanager
    def stopped(self, pending: Any) -> Iterator[None]:
        """Inside, time does not count.

        Args:
            pending: what the last step returns. Devices may still be at it, so that is awaited.
        """
        jax.block_until_ready(pending)
        self._count()
        self._since = None
        try:
            yield
        finally:
            self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds that counted since the last lap."""
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        if self._since is not None:
            now = time.monotonic()
            self._seconds, self._since = self._seconds + now - self._since, now
