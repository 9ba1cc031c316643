"""Interpolants between data and noise: `x_t = α(t)·x + σ(t)·ε`, and what follows from them.

Times lie in [0, 1]. A network may predict velocity, noise or data; every conversion between them is
affine at fixed (x_t, t), which is why guidance may be applied to any of them (IG paper, §3).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax import checks, tables
from ig_jax.errors import look_up

Times = TypeVar("Times", jax.Array, np.ndarray)

PREDICTIONS = ("velocity", "noise", "data")

# Noise and data predictions carry no information on one end of the path, where converting them
# divides by zero; the coefficients are taken this far inside instead.
_MARGIN = 1e-3


class Interpolant(Protocol):
    """A path from data to noise. All methods are elementwise on float32 times in [0, 1].

    Attributes:
        name: the name in `INTERPOLANTS`.
        data_time: the end of [0, 1] at which x_t is data (0 for SiT and DiT, 1 for LightningDiT).
        finite_at_data: whether the velocity has a limit there.
    """

    @property
    def name(self) -> str: ...
    @property
    def data_time(self) -> float: ...
    @property
    def finite_at_data(self) -> bool: ...

    def alpha(self, t: jax.Array) -> jax.Array: ...
    def sigma(self, t: jax.Array) -> jax.Array: ...
    def alpha_rate(self, t: jax.Array) -> jax.Array: ...
    def sigma_rate(self, t: jax.Array) -> jax.Array: ...

    def network_time(self, t: jax.Array) -> jax.Array:
        """Converts path time to what the network is fed."""
        ...

    def training_time(self, t: jax.Array) -> jax.Array:
        """Maps a draw from [0, 1] to a time the network is trained at."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """α = 1 − t, σ = t (SiT, rectified flow)."""

    name: str = "linear"
    data_time: float = 0.0
    finite_at_data: bool = True

    def alpha(self, t: jax.Array) -> jax.Array:
        return 1 - t

    def sigma(self, t: jax.Array) -> jax.Array:
        return t

    def alpha_rate(self, t: jax.Array) -> jax.Array:
        return -jnp.ones_like(t)

    def sigma_rate(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def network_time(self, t: jax.Array) -> jax.Array:
        return t

    def training_time(self, t: jax.Array) -> jax.Array:
        return t


@dataclasses.dataclass(frozen=True)
class LinearReversed(Linear):
    """α = t, σ = 1 − t: the linear path with data at t = 1 (LightningDiT)."""

    name: str = "linear_reversed"
    data_time: float = 1.0

    def alpha(self, t: jax.Array) -> jax.Array:
        return t

    def sigma(self, t: jax.Array) -> jax.Array:
        return 1 - t

    def alpha_rate(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def sigma_rate(self, t: jax.Array) -> jax.Array:
        return -jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Cosine(Linear):
    """α = cos(πt/2), σ = sin(πt/2) (SiT's generalised variance-preserving option)."""

    name: str = "cosine"

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.cos(jnp.pi / 2 * t)

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.sin(jnp.pi / 2 * t)

    def alpha_rate(self, t: jax.Array) -> jax.Array:
        return -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * t)

    def sigma_rate(self, t: jax.Array) -> jax.Array:
        return jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t)


VP_STEPS = 1000


def vp_log_alpha_bar() -> np.ndarray:
    """log ᾱ of DDPM's 1000 steps, β linear from 1e-4 to 2e-2 (Ho et al. 2020), float64, (1000,)."""
    return np.cumsum(np.log1p(-np.linspace(1e-4, 2e-2, VP_STEPS)))


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """The discrete DDPM schedule of DiT: step k = 0…999 sits at time t = (k + 1)/1000.

    Between steps log ᾱ is linear in t, so α = √ᾱ and σ = √(1 − ᾱ) are defined on all of [0, 1] and
    ODE and SDE samplers apply; t = 0 is clean data.
    """

    name: str = "vp"
    data_time: float = 0.0
    finite_at_data: bool = False

    def _log_alpha_bar(self, t: jax.Array) -> jax.Array:
        nodes = np.concatenate([[0.0], vp_log_alpha_bar()]).astype(np.float32)
        return jnp.interp(t * VP_STEPS, jnp.arange(VP_STEPS + 1, dtype=jnp.float32), nodes)

    def _log_rate(self, t: jax.Array) -> jax.Array:
        slopes = VP_STEPS * np.diff(np.concatenate([[0.0], vp_log_alpha_bar()]))
        # The step *below* t: times are visited on the way down to the data.
        index = jnp.clip(jnp.ceil(t * VP_STEPS - 1e-3).astype(jnp.int32) - 1, 0, VP_STEPS - 1)
        return jnp.asarray(slopes, jnp.float32)[index]

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))

    def alpha_rate(self, t: jax.Array) -> jax.Array:
        return 0.5 * self._log_rate(t) * self.alpha(t)

    def sigma_rate(self, t: jax.Array) -> jax.Array:
        # σ' = −ᾱ'/(2σ) is infinite at t = 0 only, where no sampler evaluates it (`finite_at_data`)
        # but a batch may.
        sigma = jnp.maximum(self.sigma(t), 1e-4)
        return -0.5 * self._log_rate(t) * jnp.exp(self._log_alpha_bar(t)) / sigma

    def network_time(self, t: jax.Array) -> jax.Array:
        # Published DiTs were trained on the integers 0…999 and nothing else.
        return jnp.clip(jnp.round(t * VP_STEPS) - 1, 0, VP_STEPS - 1)

    def training_time(self, t: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(t * VP_STEPS) + 1, 1, VP_STEPS) / VP_STEPS


INTERPOLANTS: dict[str, Interpolant] = {
    path.name: path for path in (Linear(), Cosine(), LinearReversed(), VariancePreserving())
}


def get(name: str) -> Interpolant:
    """Returns the interpolant called `name`; raises `InputError` naming the known ones."""
    return look_up(INTERPOLANTS, name, "path")


def expand(t: jax.Array, like: jax.Array) -> jax.Array:
    """Gives (B,) times trailing axes so that they broadcast against `like` (B, …)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(path: Interpolant, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """`x_t = α(t)·x + σ(t)·ε` for x, noise (B, H, W, C) and t (B,)."""
    t = expand(t, x)
    return path.alpha(t) * x + path.sigma(t) * noise


def target(
    path: Interpolant, prediction: str, x: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
    """What a network of this prediction type should output: `v = α'x + σ'ε`, ε, or x."""
    if prediction == "noise":
        return noise
    if prediction == "data":
        return x
    t = expand(t, x)
    return path.alpha_rate(t) * x + path.sigma_rate(t) * noise


def velocity_from(
    path: Interpolant, prediction: str, output: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Converts a network output at (x_t, t) to velocity; shapes as in `interpolate`."""
    if prediction == "velocity":
        return output
    rate, gain = _velocity_coefficients(path, prediction, expand(t, x_t))
    return rate * x_t + gain * output


def velocity_gain(path: Interpolant, prediction: str, t: jax.Array) -> jax.Array:
    """How much the velocity at times t moves with a network's output, of the shape of t."""
    if prediction == "velocity":
        return jnp.ones_like(t)
    return _velocity_coefficients(path, prediction, t)[1]


def _velocity_coefficients(
    path: Interpolant, prediction: str, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(a, b) of `v = a·x_t + b·output`, for a prediction of noise or data."""
    t = t if path.name == "vp" else jnp.clip(t, _MARGIN, 1 - _MARGIN)
    if prediction == "noise":
        rate = path.alpha_rate(t) / path.alpha(t)
        return rate, path.sigma_rate(t) - rate * path.sigma(t)
    rate = path.sigma_rate(t) / jnp.maximum(path.sigma(t), 1e-4)
    return rate, path.alpha_rate(t) - rate * path.alpha(t)


def score_from_velocity(
    path: Interpolant, velocity: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """`s = ((α/α')·v − x_t) / (σ² − (α/α')·σ'·σ)` (SiT, eq. 9)."""
    t = expand(t, x_t)
    ratio = path.alpha(t) / path.alpha_rate(t)
    variance = path.sigma(t) ** 2 - ratio * path.sigma_rate(t) * path.sigma(t)
    return (ratio * velocity - x_t) / variance


def data_and_noise_from_velocity(
    path: Interpolant, velocity: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Solves `x_t = αx + σε`, `v = α'x + σ'ε` for the (x̂, ε̂) that a velocity stands for."""
    t = expand(t, x_t)
    alpha, sigma, da, ds = path.alpha(t), path.sigma(t), path.alpha_rate(t), path.sigma_rate(t)
    determinant = alpha * ds - sigma * da
    x = (ds * x_t - sigma * velocity) / determinant
    noise = (alpha * velocity - da * x_t) / determinant
    return x, noise


def shift_times(t: Times, shift: float) -> Times:
    """`s·t/(1 + (s − 1)·t)`: times of [0, 1] moved up where s > 1 (arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Evenly on (0, 1).

    Attributes:
        shift: s of `shift_times`, in the path's own time.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        checks.TIME_SHIFT.check("shift", self.shift)

    def __call__(self, path: Interpolant, key: jax.Array, count: int) -> jax.Array:
        return shift_times(jax.random.uniform(key, (count,)), self.shift)


@dataclasses.dataclass(frozen=True)
class LogNormal(Uniform):
    """Of normal log noise levels (`lognormal_times`): logit-normal times on the linear path.

    RAEv2 trains on shift 8, which is `sqrt(262144/4096)` of its latents (arXiv 2605.18324).
    """

    def __call__(self, path: Interpolant, key: jax.Array, count: int) -> jax.Array:
        times = lognormal_times(path, jax.random.normal(key, (count,)))
        return shift_times(times, self.shift)


# `row(path, key, count) -> (count,)` path times in [0, 1] to train at.
TIMES: dict[str, type] = {"uniform": Uniform, "lognormal": LogNormal}


def draw_times(path: Interpolant, kind: str, key: jax.Array, count: int) -> jax.Array:
    """Draws (count,) training times by a row of `TIMES`, such as "lognormal(shift=8)"."""
    return path.training_time(tables.make(TIMES, kind, "times")(path, key, count))


def lognormal_times(path: Interpolant, normal: jax.Array) -> jax.Array:
    """Times of noise level `u = exp(n)`: `u/(1 + u)` (linear), `(2/π)·atan(u)` (cosine)."""
    u = jnp.exp(normal)
    return 2 / jnp.pi * jnp.arctan(u) if path.name == "cosine" else u / (1 + u)
