"""Training metrics: accumulated on devices with CLU, written by CLU's writers, watched for losses
that stopped being numbers; and the clock that times the steps."""

# No `from __future__ import annotations`: CLU reads the annotations as types.
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from ig_jax.training.state import StepMetrics

_NEVER = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class FirstBadStep(clu_metrics.Metric):
    """The first step whose loss or gradient norm was not finite."""

    step: jax.Array

    @classmethod
    def empty(cls) -> "FirstBadStep":
        """No bad step yet."""
        return cls(step=jnp.int32(_NEVER))

    @classmethod
    def from_model_output(cls, step: jax.Array, healthy: jax.Array, **_: Any) -> "FirstBadStep":
        return cls(step=jnp.where(healthy, _NEVER, step).astype(jnp.int32))

    def merge(self, other: "FirstBadStep") -> "FirstBadStep":
        return FirstBadStep(step=jnp.minimum(self.step, other.step))

    def compute(self) -> jax.Array:
        return self.step


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Averages since the last report."""

    loss: clu_metrics.Average.from_output("loss")
    loss_final: clu_metrics.Average.from_output("loss_final")
    loss_auxiliary: clu_metrics.Average.from_output("loss_auxiliary")
    loss_cosine: clu_metrics.Average.from_output("loss_cosine")
    gradient_norm: clu_metrics.Average.from_output("gradient_norm")
    first_bad_step: FirstBadStep


def accumulate(total: TrainMetrics, step: jax.Array, new: StepMetrics) -> TrainMetrics:
    """Adds one step's scalars; pure, to be jitted. `step` is the number of the step just taken."""
    values = {field: getattr(new, field) for field in new.__dataclass_fields__}
    healthy = jnp.isfinite(new.loss) & jnp.isfinite(new.gradient_norm)
    return total.merge(TrainMetrics.single_from_model_output(step=step, healthy=healthy, **values))


def report(total: TrainMetrics) -> tuple[dict[str, float], int | None]:
    """Fetches the averages, and the first bad step or None."""
    values = {name: float(v) for name, v in jax.device_get(total.compute()).items()}
    bad = int(values.pop("first_bad_step"))
    return values, None if bad == _NEVER else bad


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
