"""The loss on held-out examples: at fixed times and fixed noise, the same for any batch size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ig_jax import console
from ig_jax.data.pipeline import model_input
from ig_jax.data.source import DataSource
from ig_jax.diffusion import interpolant
from ig_jax.diffusion import loss as loss_lib
from ig_jax.models.functional import Params
from ig_jax.models.network import Network
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Score
from ig_jax.streams import numpy_stream, stream
from ig_jax.training.callbacks import Callback, Moment, is_due
from ig_jax.training.setup import Setup, step_options
from ig_jax.training.state import StepOptions


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
    bind: Callable[[Params], Network], options: StepOptions
) -> Callable[[Params, HeldOut], tuple[jax.Array, jax.Array]]:
    """Returns the held-out loss: plain targets at fixed times and fixed noise.

    The result of `validate(params, held_out)` is (sum of losses, sum of weights), which add up over
    batches of any size.
    """
    plain = dataclasses.replace(options.loss, guided_target_scale=0.0)

    def example(values: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(stream(0, "validation"), index)
        x = model_input(values, stream(key, "posterior"), shift=options.shift, scale=options.scale)
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


class Validation(Callback):
    """The held-out loss; it ranks checkpoints where no evaluation does.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup):
        self._setup, experiment = setup, setup.experiment
        options = step_options(setup.config, experiment.spec.null_label, setup.source)
        bind = functools.partial(sharding.network, experiment.mesh, experiment.graphdef)
        places = jax.tree.map(lambda leaf: leaf.sharding, setup.programs.shapes.params)
        self._rows = sharding.batch_sharding(experiment.mesh)
        self._validate = jax.jit(
            make_validation(bind, options),
            in_shardings=(places, self._rows),
        )

    def due(self, step: int, saving: bool) -> bool:
        every = self._setup.config.train.validate_every
        there = every > 0 and self._setup.source.validation is not None
        return there and (saving or is_due(every, step))

    def on_due(self, moment: Moment) -> Score | None:
        with console.stage("validating"):
            score = Score("validation_loss", self.loss(moment.state.ema))
        moment.writer.write_scalars(moment.step, {"validation/loss": score.value})
        return None if self._setup.config.evaluation.every else score

    def loss(self, params: Params) -> float:
        """The mean loss over all held-out examples; the same for any batch size."""
        setup = self._setup
        place = functools.partial(jax.make_array_from_process_local_data, self._rows)
        parts = held_out_batches(setup.source, setup.experiment.path, setup.config.train.batch_size)
        sums = [
            sharding.wait_if_simulated(self._validate(params, jax.tree.map(place, held_out)))
            for held_out in parts
        ]
        total, weight = np.sum(jax.device_get(sums), axis=0)
        return float(total / weight)
