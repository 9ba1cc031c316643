"""The training loss of internal guidance: all heads of one forward pass regress the same target
(IG paper, §3.1), optionally with LightningDiT's cosine term and the guided target of §5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from ig_jax import checks, tables
from ig_jax.diffusion import interpolant as interpolants
from ig_jax.diffusion.guidance import check_bounds
from ig_jax.errors import InputError
from ig_jax.fields import field
from ig_jax.models.network import Heads, Network


@flax.struct.dataclass
class Losses:
    """Per-example losses, each (B,) float32; `total` is what training minimises.

    Attributes:
        total: `final + λ·auxiliary + cosine_weight·cosine`.
        final: mean squared error of the final head over every element, weighted.
        auxiliary: the same of the auxiliary head, before λ: the mean over the heads of a network
            with several, so that λ keeps its meaning; zero for a network without one.
        cosine: mean over positions of 1 − cos(final, target) along channels (zero if unused).
    """

    total: jax.Array
    final: jax.Array
    auxiliary: jax.Array
    cosine: jax.Array


class Target(Protocol):
    """A guided training target, `target + ω·sg(strong − weak)`: a row of `TARGETS`.

    A frozen dataclass, its fields being its options. `row(heads, at_null, t)` is the difference
    strong − weak, (B, …).

    Attributes:
        needs: what the network must have: "auxiliary" for a head, "null" for the label ∅. Without
            it, nothing.
    """

    needs: ClassVar[tuple[str, ...]]

    def __call__(self, heads: Heads, at_null: Callable[[], Heads], t: jax.Array) -> jax.Array:
        """The difference, from the heads and from those of the same network's pass at ∅.

        Noise times t (B,) run from 0, data, to 1, noise, on every path.
        """
        ...


@dataclasses.dataclass(frozen=True)
class AuxiliaryTarget:
    """`D_f − D_i`, of the first head, the weakest: IG's ω (IG paper, §5), SGG's branch target
    (arXiv 2603.20584)."""

    needs: ClassVar[tuple[str, ...]] = ("auxiliary",)

    def __call__(self, heads: Heads, at_null: Callable[[], Heads], t: jax.Array) -> jax.Array:
        return heads.strong - heads.auxiliary[0]


@dataclasses.dataclass(frozen=True)
class NullTarget:
    """`D_f(c) − D_f(∅)`: model guidance (Tang et al. 2025, arXiv 2502.12154, eq. 12)."""

    needs: ClassVar[tuple[str, ...]] = ("null",)

    def __call__(self, heads: Heads, at_null: Callable[[], Heads], t: jax.Array) -> jax.Array:
        return heads.strong - at_null().strong


@dataclasses.dataclass(frozen=True)
class SegmentedTarget:
    """`D_f(c) − D_f(∅)` at t in [low, high], `D_f − D_i` below, 0 above: SGG's segmented form
    (arXiv 2603.20584).

    Attributes:
        low, high: noise times between 0, data, and 1, noise.
    """

    low: float = 0.3
    high: float = 0.7
    needs: ClassVar[tuple[str, ...]] = ("auxiliary", "null")

    def __post_init__(self) -> None:
        check_bounds("segmented", (self.low, self.high))

    def __call__(self, heads: Heads, at_null: Callable[[], Heads], t: jax.Array) -> jax.Array:
        t = interpolants.expand(t, heads.strong)
        middle, below = (row(heads, at_null, t) for row in (NullTarget(), AuxiliaryTarget()))
        return jnp.where(t < self.low, below, jnp.where(t <= self.high, middle, 0.0))


TARGETS: dict[str, type] = {
    "auxiliary": AuxiliaryTarget,
    "null": NullTarget,
    "segmented": SegmentedTarget,
}


@dataclasses.dataclass(frozen=True)
class Even:
    """1: every time counts the same."""

    def __call__(
        self, path: interpolants.Interpolant, prediction: str, t: jax.Array
    ) -> jax.Array | float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class AsVelocity:
    """The error of the velocity that a prediction stands for: 1/σ² for data on the linear path.

    RAEv2 predicts data so: `‖x̂ − x‖² / max(t, 0.05)²` (arXiv 2605.18324).

    Attributes:
        floor: bounds it to 1/floor².
    """

    floor: float = 0.05

    def __post_init__(self) -> None:
        checks.POSITIVE.check("floor", self.floor)

    def __call__(self, path: interpolants.Interpolant, prediction: str, t: jax.Array) -> jax.Array:
        gain = jnp.abs(interpolants.velocity_gain(path, prediction, t))
        return jnp.square(jnp.minimum(gain, 1 / self.floor))


# `row(path, prediction, t) -> (B,)`: the weight of squared errors at path times t (B,).
WEIGHTS: dict[str, type] = {"even": Even, "velocity": AsVelocity}
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
    times: str = field(
        "uniform", "how training times are drawn: lognormal(shift=8)", table=interpolants.TIMES
    )
    weight: str = field(
        "even", "weight of a time; velocity: errors count as the velocity's", table=WEIGHTS
    )
    auxiliary_weight: float = field(0.5, "λ, weight of the auxiliary heads", limits=checks.WEIGHT)
    label_dropout: float = field(0.1, "probability of replacing a label by ∅", limits=checks.SHARE)
    cosine_weight: float = field(
        0.0, "weight of the cosine term (1 for LightningDiT)", limits=checks.WEIGHT
    )
    guided_target_scale: float = field(
        0.0, "ω of the training acceleration; 0 for none", limits=checks.WEIGHT
    )
    guided_target: str = field(
        "auxiliary", "what ω pushes away from: the auxiliary head, or ∅", table=TARGETS
    )
    error: str = field("squared", "the error that every head minimises", choices=ERRORS)
    guided_target_start: int = field(0, "step at which ω starts", limits=checks.COUNT_OR_NONE)
    guided_target_warmup: int = field(
        0, "steps over which it grows from 0", limits=checks.COUNT_OR_NONE
    )
    guided_target_power: float = field(
        1.0, "α of that growth, ω·τ^α, where τ rises evenly to 1", limits=checks.POSITIVE
    )

    def omega(self, step: jax.Array) -> jax.Array:
        """ω at a step, (); its growth is SGG's (arXiv 2603.20584)."""
        since = step - self.guided_target_start
        if not self.guided_target_warmup:
            return jnp.where(since >= 0, self.guided_target_scale, 0.0)
        share = jnp.clip(since / self.guided_target_warmup, 0.0, 1.0)
        return self.guided_target_scale * share**self.guided_target_power


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean over positions of `1 − cos` along the channel axis of two (B, H, W, C) arrays, (B,)."""

    def norm(x: jax.Array) -> jax.Array:
        # Bounded below under the root, as PyTorch has it: heads start at zero, where the gradient
        # of a plain norm is not a number.
        return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), 1e-16))

    return _mean(1 - (a * b).sum(-1) / (norm(a) * norm(b)))


def _no_null() -> Heads:
    raise InputError("this guided target needs the null label ∅: none was given")


def losses_from(
    heads: Heads,
    target: jax.Array,
    t: jax.Array,
    options: LossOptions,
    omega: jax.Array | float,
    at_null: Callable[[], Heads] = _no_null,
) -> Losses:
    """Compares all heads with the target (B, …).

    Args:
        heads: of one forward pass.
        target: what they should be.
        t: (B,) path times.
        options: see `LossOptions`.
        omega: ω at this step.
        at_null: gives the heads at the null label; called by targets that need them.
    """
    path, final_target = interpolants.get(options.path), target
    weigh: Callable[..., Any] = tables.make(WEIGHTS, options.weight, "weight")
    weight = interpolants.expand(jnp.asarray(weigh(path, options.prediction, t)), target)

    def error(head: jax.Array, target: jax.Array) -> jax.Array:
        return _mean(weight * ERRORS[options.error](head, target))

    zero = jnp.zeros(target.shape[0], jnp.float32)
    auxiliary = zero
    if heads.auxiliary:
        errors = [error(head, target) for head in heads.auxiliary]
        auxiliary = sum(errors[1:], errors[0]) / len(errors)
    if options.guided_target_scale:
        row: Target = tables.make(TARGETS, options.guided_target, "guided_target")
        gap = row(heads, at_null, jnp.abs(t - path.data_time))
        final_target = target + omega * jax.lax.stop_gradient(gap)
    final = error(heads.strong, final_target)
    cosine = cosine_distance(heads.strong, final_target) if options.cosine_weight else zero
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
        if null_label is None:
            return _no_null()
        return network(x_t, network_t, jnp.full_like(labels, null_label))

    return losses_from(heads, target, t, options, omega, at_null)


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
