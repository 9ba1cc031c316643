"""The training loss of internal guidance: all heads of one forward pass regress the same target
(IG paper, §3.1), optionally with LightningDiT's cosine term and the guided target of §5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from ig_jax import checks
from ig_jax.diffusion import interpolant as interpolants
from ig_jax.fields import field
from ig_jax.models.network import Heads, Network


@flax.struct.dataclass
class Losses:
    """Per-example losses, each (B,) float32; `total` is what training minimises.

    Attributes:
        total: `final + λ·auxiliary + cosine_weight·cosine`.
        final: mean squared error of the final head over every element.
        auxiliary: the same of the auxiliary head, before λ: the mean over the heads of a network
            with several, so that λ keeps its meaning; zero for a network without one.
        cosine: mean over positions of 1 − cos(final, target) along channels (zero if unused).
    """

    total: jax.Array
    final: jax.Array
    auxiliary: jax.Array
    cosine: jax.Array


def auxiliary_gap(heads: Heads, at_null: Callable[[], Heads]) -> jax.Array:
    """`D_f − D_i` of the first auxiliary head, the weakest (IG paper, §5)."""
    return heads.final - heads.auxiliary[0]


def null_gap(heads: Heads, at_null: Callable[[], Heads]) -> jax.Array:
    """`D_f(c) − D_f(∅)`: model guidance (Tang et al. 2025, arXiv 2502.12154, eq. 12)."""
    return heads.final - at_null().final


# `row(heads, at_null) -> (B, …)`: the difference strong − weak by which a guided target is moved,
# `target + ω·sg(strong − weak)`; `at_null()` is the same network's pass at the null label ∅.
TARGETS: dict[str, Callable[[Heads, Callable[[], Heads]], jax.Array]] = {
    "auxiliary": auxiliary_gap,
    "null": null_gap,
}
# `row(prediction, target) -> (B, …)`: the error of every element, whose mean a head minimises.
ERRORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "squared": lambda prediction, target: jnp.square(prediction - target),
}


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What the loss is made of; λ weighs the auxiliary heads, ω is the training acceleration."""

    path: str = field(
        "linear", "interpolant between data and noise", choices=interpolants.INTERPOLANTS
    )
    prediction: str = field(
        "velocity", "what the network predicts", choices=interpolants.PREDICTIONS
    )
    times: str = field("uniform", "how training times are drawn", choices=interpolants.TIMES)
    auxiliary_weight: float = field(0.5, "λ, weight of the auxiliary heads", limits=checks.WEIGHT)
    label_dropout: float = field(0.1, "probability of replacing a label by ∅", limits=checks.SHARE)
    cosine_weight: float = field(
        0.0, "weight of the cosine term (1 for LightningDiT)", limits=checks.WEIGHT
    )
    guided_target_scale: float = field(
        0.0, "ω of the training acceleration; 0 for none", limits=checks.WEIGHT
    )
    guided_target: str = field(
        "auxiliary", "what ω pushes away from: the auxiliary head, or ∅", choices=TARGETS
    )
    error: str = field("squared", "the error that every head minimises", choices=ERRORS)
    guided_target_start: int = field(0, "step at which ω starts", limits=checks.COUNT_OR_NONE)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean over positions of `1 − cos` along the channel axis of two (B, H, W, C) arrays, (B,)."""

    def norm(x: jax.Array) -> jax.Array:
        # Bounded below under the root, as PyTorch has it: heads start at zero, where the gradient
        # of a plain norm is not a number.
        return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), 1e-16))

    return _mean(1 - (a * b).sum(-1) / (norm(a) * norm(b)))


def losses_from(
    heads: Heads,
    target: jax.Array,
    options: LossOptions,
    omega: jax.Array | float,
    at_null: Callable[[], Heads] | None = None,
) -> Losses:
    """Compares all heads with the target (B, …).

    Args:
        heads: of one forward pass.
        target: what they should be.
        options: see `LossOptions`.
        omega: ω at this step.
        at_null: gives the heads at the null label, for targets that need them.
    """
    error, final_target = ERRORS[options.error], target
    zero = jnp.zeros(target.shape[0], jnp.float32)
    auxiliary = zero
    if heads.auxiliary:
        errors = [_mean(error(head, target)) for head in heads.auxiliary]
        auxiliary = sum(errors[1:], errors[0]) / len(errors)
    if options.guided_target_scale:
        gap = TARGETS[options.guided_target](heads, at_null)
        final_target = target + omega * jax.lax.stop_gradient(gap)
    final = _mean(error(heads.final, final_target))
    cosine = cosine_distance(heads.final, final_target) if options.cosine_weight else zero
    total = final + options.auxiliary_weight * auxiliary + options.cosine_weight * cosine
    return Losses(total, final, auxiliary, cosine)


def losses_at(
    network: Network,
    x: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    options: LossOptions,
    omega: jax.Array | float | None = None,
    null_label: int | None = None,
) -> Losses:
    """Losses at given noise and times.

    Args:
        network: `network(x_t, t, y) -> Heads`.
        x, noise: (B, H, W, C) data and standard normal noise.
        labels: (B,) int32, null labels included.
        t: (B,) path times in [0, 1].
        options: see `LossOptions`.
        omega: ω at this step; `options.guided_target_scale` if None.
        null_label: the label ∅, for targets that need it.

    Returns:
        Per-example `Losses`.
    """
    path = interpolants.get(options.path)
    x_t, network_t = interpolants.interpolate(path, x, noise, t), path.network_time(t)
    heads = network(x_t, network_t, labels)
    target = interpolants.target(path, options.prediction, x, noise, t)
    omega = options.guided_target_scale if omega is None else omega

    def at_null() -> Heads:
        return network(x_t, network_t, jnp.full_like(labels, null_label))

    return losses_from(heads, target, options, omega, at_null)


def drop_labels(labels: jax.Array, key: jax.Array, rate: float, null_label: int) -> jax.Array:
    """Replaces each of (B,) labels by the null label with probability `rate`."""
    return jnp.where(jax.random.uniform(key, labels.shape) < rate, null_label, labels)


def losses(
    network: Network,
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    options: LossOptions,
    null_label: int,
    omega: jax.Array | float | None = None,
) -> Losses:
    """Losses at random times and noise, with label dropout; everything drawn from `key`."""
    time_key, noise_key, label_key = jax.random.split(key, 3)
    t = interpolants.draw_times(interpolants.get(options.path), options.times, time_key, x.shape[0])
    noise = jax.random.normal(noise_key, x.shape, jnp.float32)
    labels = drop_labels(labels, label_key, options.label_dropout, null_label)
    return losses_at(network, x, labels, noise, t, options, omega, null_label)
