"""The training state, one pytree, and the pure functions that make it and move it one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ig_jax.data.pipeline import model_input
from ig_jax.diffusion import loss as loss_lib
from ig_jax.models.functional import Params
from ig_jax.models.network import Network
from ig_jax.streams import stream
from ig_jax.training import optimizer as optimizer_lib


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        step: () int32, optimiser steps taken.
        params: nested dict of float32 arrays.
        ema: their exponential moving average, the weights to sample from.
        optimizer: Optax state.
    """

    step: jax.Array
    params: Params
    ema: Params
    optimizer: optax.OptState


@flax.struct.dataclass
class StepMetrics:
    """Scalars of one step: batch means of each loss, and the gradient norm before the clip.

    `bad_parameter` tells which of the updated parameters, in their tree's order, is the first with
    a value that is not finite; −1 if all are finite.
    """

    loss: jax.Array
    loss_final: jax.Array
    loss_auxiliary: jax.Array
    loss_cosine: jax.Array
    gradient_norm: jax.Array
    bad_parameter: jax.Array

    @property
    def healthy(self) -> jax.Array:
        """Whether all that the step computed is finite: loss, gradient and parameters."""
        finite = jnp.isfinite(self.loss) & jnp.isfinite(self.gradient_norm)
        return finite & (self.bad_parameter < 0)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a training step needs besides arrays.

    Attributes:
        loss: the loss.
        null_label: the label ∅.
        ema_decay: EMA decay per step.
        accumulate: microbatches a batch is split into, to save memory.
        shift, scale: normalisation of latents, per channel.
        skip_not_finite: whether a step that is not `healthy` changes nothing but its number.
    """

    loss: loss_lib.LossOptions
    null_label: int
    ema_decay: float
    accumulate: int
    shift: Any
    scale: Any
    skip_not_finite: bool = False


def create(params: Params, transform: optax.GradientTransformation) -> TrainState:
    """The state at step 0: EMA starts as a copy of the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.array, params),
        optimizer=transform.init(params),
    )


def make_loss(
    bind: Callable[[Params], Network], options: StepOptions
) -> Callable[[Params, Any, jax.Array, jax.Array], loss_lib.Losses]:
    """Returns `losses(params, batch, key, step)`, per example, from raw data batches."""

    def losses(params: Params, batch: Any, key: jax.Array, step: jax.Array) -> loss_lib.Losses:
        x = model_input(batch, stream(key, "posterior"), shift=options.shift, scale=options.scale)
        return loss_lib.losses(
            bind(params),
            x,
            batch["label"],
            stream(key, "loss"),
            options.loss,
            options.null_label,
            options.loss.omega(step),
        )

    return losses


def make_gradient(
    bind: Callable[[Params], Network], options: StepOptions
) -> Callable[[Params, Any, jax.Array, jax.Array], tuple[Params, loss_lib.Losses]]:
    """Returns `gradient(params, batch, key, step)`: of the mean loss over a batch, and mean losses.

    With `options.accumulate` of n, n microbatches are computed one after the other, each with noise
    of its own, and averaged.
    """
    losses = make_loss(bind, options)
    parts = options.accumulate

    def objective(params: Params, batch: Any, key: jax.Array, step: jax.Array) -> tuple:
        means = jax.tree.map(jnp.mean, losses(params, batch, key, step))
        return means.total, means

    def gradient(params: Params, batch: Any, key: jax.Array, step: jax.Array) -> tuple:
        grads, means = jax.grad(objective, has_aux=True)(params, batch, key, step)
        return grads, means

    def accumulated(params: Params, batch: Any, key: jax.Array, step: jax.Array) -> tuple:
        batch = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, parts)

        def add(total: Any, part: tuple) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part, step)), None

        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(
                lambda: gradient(params, jax.tree.map(lambda a: a[0], batch), keys[0], step)
            ),
        )
        total, _ = jax.lax.scan(add, zeros, (batch, keys))
        return jax.tree.map(lambda a: a / parts, total)

    return accumulated if parts > 1 else gradient


def _first_not_finite(params: Params) -> jax.Array:
    # The largest of a leaf is NaN or infinite if any of it is: a single reduction, where asking of
    # each value would be three programs a leaf to compile.
    bad = ~jnp.isfinite(jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(params)]))
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def make_train_step(
    bind: Callable[[Params], Network],
    transform: optax.GradientTransformation,
    options: StepOptions,
    norm: Callable[[Params], jax.Array],
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, StepMetrics]]:
    """Returns the pure step `(state, batch, key) -> (state, metrics)`.

    Args:
        bind: gives the network with these parameters, such as `sharding.network`.
        transform: the optimiser, clipping included.
        options: see `StepOptions`.
        norm: the gradients' norm that is reported.

    Returns:
        A function to jit; `key` is the run's training stream, and a step's randomness depends on
        it and `state.step` alone.
    """
    gradient = make_gradient(bind, options)

    def train_step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(key, state.step)
        grads, means = gradient(state.params, batch, key, state.step)
        updates, optimizer = transform.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(
            loss=means.total,
            loss_final=means.final,
            loss_auxiliary=means.auxiliary,
            loss_cosine=means.cosine,
            gradient_norm=norm(grads),
            bad_parameter=_first_not_finite(params),
        )
        ema = optimizer_lib.ema_update(state.ema, params, options.ema_decay)
        new = TrainState(state.step + 1, params, ema, optimizer)
        if options.skip_not_finite:
            kept = state.replace(step=new.step)
            new = jax.tree.map(lambda a, b: jnp.where(metrics.healthy, a, b), new, kept)
        return new, metrics

    return train_step
