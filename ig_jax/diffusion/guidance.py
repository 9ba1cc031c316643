"""Internal guidance and its relatives: what turns the heads of one (or two) forward passes into a
guided prediction (IG paper, §3.2), and the plan of which scales act on which evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import interpolant as interpolants
from ig_jax.errors import InputError
from ig_jax.models.network import Heads, Network

Interval = tuple[float, float]

# Interval bounds are inclusive, also for grid points that arithmetic put an ulp beside them.
_TOLERANCE = 1e-6


@flax.struct.dataclass
class Guidance:
    """Guidance scales and the path-time intervals in which they act; 1 is no guidance.

    Attributes:
        ig_scale: w of internal guidance, `D_i + w·(D_f − D_i)`; may be traced. 0 samples from the
            auxiliary head.
        ig_interval: (low, high), inclusive, within [0, 1]; outside it w = 1.
        cfg_scale: s of classifier-free guidance, `D(∅) + s·(D(c) − D(∅))`; may be traced.
        cfg_interval: (low, high), inclusive; outside it the ∅ branch is not computed at all.
        weak: a separate, worse network used in place of the auxiliary head (Autoguidance, Karras
            et al. 2024), or None.
    """

    ig_scale: jax.Array | float = 1.0
    ig_interval: Interval = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    cfg_scale: jax.Array | float = 1.0
    cfg_interval: Interval = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    weak: Network | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        for name in ("ig_interval", "cfg_interval"):
            check_interval(name, getattr(self, name))


def check_interval(name: str, interval: Interval) -> None:
    """Raises `InputError` unless `interval` is (low, high) with 0 ≤ low ≤ high ≤ 1."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(
            f"{name} is {tuple(interval)}: expected (low, high) with 0 <= low <= high <= 1"
        )


def active(interval: Interval, t: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Whether each time lies in the closed interval."""
    return (t >= interval[0] - _TOLERANCE) & (t <= interval[1] + _TOLERANCE)


def extrapolate(weak: jax.Array, strong: jax.Array, scale: jax.Array | float) -> jax.Array:
    """`weak + scale·(strong − weak)`, written so that scale 1 returns `strong` bit for bit."""
    return strong + (scale - 1) * (strong - weak)


def guide(
    conditional: Heads,
    unconditional: Heads | None,
    ig_scale: jax.Array | float,
    cfg_scale: jax.Array | float,
) -> jax.Array:
    """Turns heads into one guided prediction: IG on each branch first, then CFG.

    Args:
        conditional: prediction for the wanted labels.
        unconditional: prediction for ∅, or None where CFG is off.
        ig_scale, cfg_scale: scalars or (B, 1, 1, 1).

    Returns:
        (B, H, W, C), of the type the network predicts (velocity, noise or data).
    """

    def internal(heads: Heads) -> jax.Array:
        if not heads.auxiliary:
            return heads.final
        return extrapolate(heads.auxiliary[0], heads.final, ig_scale)

    guided = internal(conditional)
    if unconditional is None:
        return guided
    return extrapolate(internal(unconditional), guided, cfg_scale)


@flax.struct.dataclass
class Plan:
    """Scales for each of a sampler's evaluations: N intervals × S stages.

    Attributes:
        ig_scale, cfg_scale: (N, S) float32, 1 where the guidance is off.
        cfg_on: (N, S) host booleans: whether the ∅ branch is computed. Static, so that the sampler
            is compiled without the branch where it is off.
    """

    ig_scale: jax.Array
    cfg_scale: jax.Array
    cfg_on: tuple[tuple[bool, ...], ...] = flax.struct.field(pytree_node=False)


def plan(guidance: Guidance, stage_times: np.ndarray) -> Plan:
    """Decides, before compiling, which guidance acts on which evaluation.

    Args:
        guidance: scales and intervals.
        stage_times: (N, S) times that decide for each interval's evaluations.
    """
    ig_on = active(guidance.ig_interval, stage_times)
    cfg_on = active(guidance.cfg_interval, stage_times)
    if isinstance(guidance.cfg_scale, int | float) and guidance.cfg_scale == 1:
        cfg_on = np.zeros_like(cfg_on)
    return Plan(
        ig_scale=jnp.where(ig_on, jnp.float32(guidance.ig_scale), 1.0),
        cfg_scale=jnp.where(cfg_on, jnp.float32(guidance.cfg_scale), 1.0),
        cfg_on=tuple(tuple(bool(on) for on in row) for row in cfg_on),
    )


@flax.struct.dataclass
class Velocity:
    """A guided velocity (B, H, W, C) and the variance channels, if the network has them."""

    velocity: jax.Array
    variance: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class GuidedVelocity:
    """The velocity field that samplers integrate: a network, its labels and its guidance.

    Attributes:
        network: `network(x, t, y) -> Heads`.
        labels: (B,) int32.
        null_label: the label ∅.
        path, prediction: what the network was trained on (`interpolant`).
        weak: Autoguidance's network or None.
    """

    network: Network
    labels: jax.Array
    null_label: int
    path: interpolants.Interpolant
    prediction: str
    weak: Network | None = None

    def _heads(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> Heads:
        heads = self.network(x, t, labels)
        if self.weak is not None:
            heads = heads.replace(auxiliary=(self.weak(x, t, labels).final,))
        return heads

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        ig_scale: jax.Array | float,
        cfg_scale: jax.Array | float,
        cfg_on: bool,
    ) -> Velocity:
        """Evaluates at x (B, H, W, C) and t (B,); the ∅ branch rides in the same batch if on."""
        network_t = self.path.network_time(t)
        if cfg_on:
            null = jnp.full_like(self.labels, self.null_label)
            both = self._heads(
                jnp.concatenate([x, x]),
                jnp.concatenate([network_t, network_t]),
                jnp.concatenate([self.labels, null]),
            )
            conditional, unconditional = _halves(both)
        else:
            conditional, unconditional = self._heads(x, network_t, self.labels), None
        output = guide(conditional, unconditional, ig_scale, cfg_scale)
        velocity = interpolants.velocity_from(self.path, self.prediction, output, x, t)
        return Velocity(velocity, conditional.variance)


def _halves(both: Heads) -> tuple[Heads, Heads]:
    half = both.final.shape[0] // 2
    return jax.tree.map(lambda a: a[:half], both), jax.tree.map(lambda a: a[half:], both)


VelocityField = Callable[..., Velocity]
