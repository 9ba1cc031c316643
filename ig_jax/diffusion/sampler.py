"""Samplers: a time grid, a stepper and a `lax.scan`. They integrate a velocity and know nothing of
guidance, whose plan they only carry from the grid to each evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import guidance as guidance_lib
from ig_jax.diffusion import interpolant as interpolants
from ig_jax.diffusion.guidance import Guidance, GuidedVelocity, Velocity
from ig_jax.errors import InputError, suggest

# evaluate(x, t, stage) -> Velocity, with t a scalar time of the grid
Evaluate = Callable[[jax.Array, jax.Array, int], Velocity]
# noise(interval index) -> standard normal noise shaped like x
Noise = Callable[[jax.Array], jax.Array]

SDE_LAST_TIME = 0.04


@dataclasses.dataclass(frozen=True)
class Step:
    """One interval of the grid, handed to a stepper.

    Attributes:
        t, next_t: scalar float32 times, from noise to data.
        last: whether this is the last interval (a traced boolean).
        noise: (B, H, W, C) standard normal noise, or None for deterministic samplers.
        path: the interpolant.
    """

    t: jax.Array
    next_t: jax.Array
    last: jax.Array
    noise: jax.Array | None
    path: interpolants.Interpolant


def _euler(evaluate: Evaluate, x: jax.Array, step: Step) -> jax.Array:
    return x + (step.next_t - step.t) * evaluate(x, step.t, 0).velocity


def _trapezoid(evaluate: Evaluate, x: jax.Array, step: Step) -> jax.Array:
    """Heun's second-order step: average of the slopes at both ends."""
    dt = step.next_t - step.t
    first = evaluate(x, step.t, 0).velocity
    second = evaluate(x + dt * first, step.next_t, 1).velocity
    return x + dt * 0.5 * (first + second)


def _euler_maruyama(evaluate: Evaluate, x: jax.Array, step: Step) -> jax.Array:
    """Reverse SDE with diffusion g² = 2t for every path (the release); no noise at the end."""
    dt = step.next_t - step.t
    diffusion = 2 * _noise_time(step.path, step.t)
    velocity = evaluate(x, step.t, 0).velocity
    times = jnp.broadcast_to(step.t, x.shape[:1])
    score = interpolants.score_from_velocity(step.path, velocity, x, times)
    # The score term always pulls towards data, whichever way the path's time runs.
    direction = jnp.sign(dt)
    x = x + dt * velocity + 0.5 * diffusion * score * dt * direction
    spread = jnp.where(step.last, 0.0, jnp.sqrt(diffusion * jnp.abs(dt)))
    return x + spread * step.noise


def _noise_time(path: interpolants.Interpolant, t: Any) -> Any:
    """Time measured from the data end, so that 1 is noise on every path."""
    return 1 - t if path.data_time == 1 else t


def _ancestral(evaluate: Evaluate, x: jax.Array, step: Step) -> jax.Array:
    """Ancestral DDPM step between any two times of the path (Ho et al. 2020; respaced as in
    Nichol & Dhariwal 2021), with learned-range variance where the network predicts it."""
    out = evaluate(x, step.t, 0)
    times = jnp.broadcast_to(step.t, x.shape[:1])
    data, _ = interpolants.data_and_noise_from_velocity(step.path, out.velocity, x, times)
    alpha, sigma2 = step.path.alpha(step.t), step.path.sigma(step.t) ** 2
    next_alpha, next_sigma2 = step.path.alpha(step.next_t), step.path.sigma(step.next_t) ** 2
    ratio = alpha / next_alpha
    # β of the merged step, and the two bounds of the posterior's variance.
    beta = sigma2 - ratio**2 * next_sigma2
    posterior = beta * next_sigma2 / sigma2
    mean = (next_alpha * beta * data + ratio * next_sigma2 * x) / sigma2
    if out.variance is None:
        variance = posterior
    else:
        low = jnp.log(jnp.maximum(posterior, 1e-20))
        fraction = (out.variance + 1) / 2
        variance = jnp.exp(fraction * jnp.log(beta) + (1 - fraction) * low)
    return mean + jnp.where(step.last, 0.0, jnp.sqrt(variance)) * step.noise


def _uniform_grid(steps: int, path: interpolants.Interpolant) -> np.ndarray:
    """`steps` equal intervals from noise to data.

    On the LightningDiT path `steps` counts grid points (so one interval fewer), as in its release.
    """
    points = steps if path.name == "linear_reversed" else steps + 1
    return np.linspace(1 - path.data_time, path.data_time, points)


def _sde_grid(steps: int, path: interpolants.Interpolant) -> np.ndarray:
    """`steps` evaluations: steps − 1 equal intervals from noise to 0.04, then one to the data."""
    grid = np.append(np.linspace(1.0, SDE_LAST_TIME, steps), 0.0)
    return 1 - grid if path.data_time == 1 else grid


def _respaced_grid(steps: int, path: interpolants.Interpolant) -> np.ndarray:
    """`steps` of DDPM's 1000 steps, evenly spaced and with both ends, then clean data (t = 0)."""
    kept = np.round(np.linspace(0, interpolants.VP_STEPS - 1, steps))
    grid = np.append((kept[::-1] + 1) / interpolants.VP_STEPS, 0.0)
    return 1 - grid if path.data_time == 1 else grid


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler: its grid, its step, and which times decide on guidance.

    Attributes:
        step: `step(evaluate, x, Step) -> x`.
        grid: `grid(num_steps, path) -> (N + 1,)` float64 times from noise to data.
        stages: network evaluations in an interval.
        own_time: whether a second evaluation decides on guidance by its own time (heun2) or by the
            interval's start (heun).
        euler_last: whether the last interval is a plain Euler step.
        stochastic: whether steps use noise.
    """

    step: Callable[[Evaluate, jax.Array, Step], jax.Array]
    grid: Callable[[int, interpolants.Interpolant], np.ndarray]
    stages: int = 1
    own_time: bool = False
    euler_last: bool = False
    stochastic: bool = False


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(_euler, _uniform_grid),
    "heun": Sampler(_trapezoid, _uniform_grid, stages=2, euler_last=True),
    "heun2": Sampler(_trapezoid, _uniform_grid, stages=2, own_time=True),
    "euler_maruyama": Sampler(_euler_maruyama, _sde_grid, stochastic=True),
    "ddpm": Sampler(_ancestral, _respaced_grid, stochastic=True),
}
ADAPTIVE = "dopri5"
NAMES = (*SAMPLERS, ADAPTIVE)


def check_name(name: str) -> None:
    """Raises `InputError` naming the known samplers unless `name` is one."""
    if name not in NAMES:
        raise InputError(
            f"unknown sampler {name!r}: expected one of {', '.join(NAMES)}{suggest(name, NAMES)}"
        )


def time_grid(
    name: str, num_steps: int, path: interpolants.Interpolant, time_shift: float = 1.0
) -> np.ndarray:
    """The times a sampler visits, from noise to data.

    Args:
        name: a name of `SAMPLERS`.
        num_steps: intervals (euler, heun, heun2 on SiT and DiT paths), grid points (the same on
            LightningDiT's path) or evaluations (euler_maruyama, ddpm): the authors' own counts.
        path: the interpolant.
        time_shift: s of `t ← s·t/(1 + (s − 1)·t)`; 1 for none.

    Returns:
        (N + 1,) float64. Raises `InputError` for fewer than one interval.
    """
    check_name(name)
    grid = SAMPLERS[name].grid(num_steps, path) if num_steps > 0 else np.zeros(1)
    if len(grid) < 2:
        raise InputError(f"sampler.num_steps is {num_steps}: {name} needs at least one interval")
    shifted = time_shift * grid / (1 + (time_shift - 1) * grid)
    # The ends are fixed points of the shift; rounding must not move them off 0 and 1.
    return np.where((grid == 0) | (grid == 1), grid, shifted)


def stage_times(name: str, grid: np.ndarray) -> np.ndarray:
    """(N, S) times that decide on guidance for every evaluation of a sampler."""
    sampler = SAMPLERS[name]
    ends = grid[1:] if sampler.own_time else grid[:-1]
    return np.stack([grid[:-1], ends][: sampler.stages], axis=1)


def _segments(patterns: list[Any]) -> list[tuple[int, int]]:
    """Splits a list into runs of equal neighbours, as (start, stop) pairs."""
    cuts = [i for i in range(1, len(patterns)) if patterns[i] != patterns[i - 1]]
    return list(zip([0, *cuts], [*cuts, len(patterns)], strict=True))


def integrate(
    name: str,
    field: GuidedVelocity,
    x: jax.Array,
    grid: np.ndarray,
    plan: guidance_lib.Plan,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Integrates from noise to data with a fixed-grid sampler.

    Args:
        name: a name of `SAMPLERS`.
        field: the guided velocity.
        x: (B, H, W, C) float32 noise at grid[0].
        grid: (N + 1,) host times from `time_grid`.
        plan: guidance for every evaluation, `guidance.plan(guidance, stage_times(name, grid))`.
        noise: `noise(i) -> (B, H, W, C)` for the i-th interval; needed by stochastic samplers.
        trajectory: whether to return x after every interval too.

    Returns:
        The samples (B, H, W, C), and the trajectory (N, B, H, W, C) or None.
    """
    sampler = SAMPLERS[name]
    count = len(grid) - 1
    steps = {
        "t": jnp.asarray(grid[:-1], jnp.float32),
        "next_t": jnp.asarray(grid[1:], jnp.float32),
        "index": jnp.arange(count),
        "ig_scale": plan.ig_scale,
        "cfg_scale": plan.cfg_scale,
    }
    euler_last = [sampler.euler_last and i == count - 1 for i in range(count)]
    pieces = []
    for start, stop in _segments(list(zip(plan.cfg_on, euler_last, strict=True))):
        take_step = _euler if euler_last[start] else sampler.step

        def body(
            x: jax.Array,
            step: dict[str, jax.Array],
            take_step: Any = take_step,
            cfg_on: tuple[bool, ...] = plan.cfg_on[start],
        ) -> tuple[jax.Array, jax.Array | None]:
            def evaluate(x: jax.Array, t: jax.Array, stage: int) -> Velocity:
                return field(
                    x,
                    jnp.broadcast_to(t, x.shape[:1]),
                    step["ig_scale"][stage],
                    step["cfg_scale"][stage],
                    cfg_on[stage],
                )

            drawn = noise(step["index"]) if sampler.stochastic and noise is not None else None
            interval = Step(
                step["t"], step["next_t"], step["index"] == count - 1, drawn, field.path
            )
            x = take_step(evaluate, x, interval)
            return x, (x if trajectory else None)

        x, visited = jax.lax.scan(body, x, {k: v[start:stop] for k, v in steps.items()})
        pieces.append(visited)
    return x, (jnp.concatenate(pieces) if trajectory else None)


# Dormand–Prince 5(4): nodes, stage weights, and the embedded error's weights.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate_adaptive(
    field: GuidedVelocity,
    x: jax.Array,
    guidance: Guidance,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
) -> jax.Array:
    """Adaptive Dormand–Prince 5(4) ODE integration (SiT's default ODE solver).

    Every sample has a step size of its own, so that a sample does not depend on its batch. Guidance
    is decided by each evaluation's own time; the ∅ branch is computed only while some sample's
    evaluation lies in CFG's interval.

    Args:
        field: the guided velocity.
        x: (B, H, W, C) float32 noise.
        guidance: scales and intervals.
        rtol, atol: tolerances of the error estimate (root mean square over a sample).
        max_steps: bound on attempted steps; samples not at the data by then are returned as NaN,
            so that an unfinished integration is never taken for a picture.

    Returns:
        (B, H, W, C) samples.
    """
    path = field.path
    sign = 1.0 if path.data_time == 1 else -1.0
    batch = x.shape[0]
    cfg_possible = not (isinstance(guidance.cfg_scale, int | float) and guidance.cfg_scale == 1)
    wide = functools.partial(interpolants.expand, like=x)

    def velocity(x: jax.Array, s: jax.Array) -> jax.Array:
        """Velocity along s, the time since noise."""
        t = s if path.data_time == 1 else 1 - s
        ig = jnp.where(guidance_lib.active(guidance.ig_interval, t), guidance.ig_scale, 1.0)
        on = guidance_lib.active(guidance.cfg_interval, t)
        cfg = jnp.where(on, guidance.cfg_scale, 1.0)
        both, single = (
            lambda on=flag: field(x, t, wide(ig), wide(cfg), on).velocity for flag in (True, False)
        )
        return sign * (jax.lax.cond(on.any(), both, single) if cfg_possible else single())

    def attempt(state: tuple) -> tuple:
        x, s, h, count = state
        h = jnp.minimum(h, 1 - s)
        slopes = []
        for c, row in zip(_C, _A, strict=True):
            shift = sum((a * k for a, k in zip(row, slopes, strict=True) if a), jnp.zeros_like(x))
            y = x + wide(h) * shift
            slopes.append(velocity(y, s + c * h))
        # The seventh stage is evaluated at the fifth-order solution itself, y.
        error = wide(h) * sum(e * k for e, k in zip(_E, slopes, strict=True) if e)
        bound = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(y))
        norm = jnp.sqrt(jnp.square(error / bound).mean(axis=(1, 2, 3)))
        accept = (norm <= 1) & (s < 1)
        x = jnp.where(wide(accept), y, x)
        # Land on 1 exactly: s + (1 − s) may round below it, and the loop would never end.
        s = jnp.where(accept, jnp.where(h >= 1 - s, 1.0, s + h), s)
        h = h * jnp.clip(0.9 * jnp.maximum(norm, 1e-10) ** -0.2, 0.2, 10.0)
        return x, s, h, count + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[1] < 1).any() & (state[3] < max_steps)

    start = (x, jnp.zeros(batch), jnp.full(batch, 0.01), 0)
    x, s, _, _ = jax.lax.while_loop(unfinished, attempt, start)
    return jnp.where(wide(s < 1), jnp.nan, x)


def sample_keys(seed: int | jax.Array, indices: jax.Array) -> jax.Array:
    """One random key for each (B,) sample index: sample i depends on (seed, i) alone."""
    root = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(indices)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B, *shape) standard normal noise, one key a sample."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def step_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """Noise of the i-th interval from each sample's own key (fold 0 is the initial noise)."""

    def noise(index: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index + 1), shape))(keys)

    return noise


def sample(
    field: GuidedVelocity,
    keys: jax.Array,
    shape: tuple[int, int, int],
    guidance: Guidance,
    *,
    name: str = "heun",
    num_steps: int = 50,
    time_shift: float = 1.0,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    trajectory: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws samples: initial noise, grid, guidance plan and integration in one pure function.

    Args:
        field: the guided velocity (its labels fix the batch size B).
        keys: (B,) keys from `sample_keys`.
        shape: (H, W, C) of one sample.
        guidance: scales may be traced, intervals are static.
        name: one of `NAMES`.
        num_steps, time_shift: see `time_grid`; ignored by the adaptive sampler.
        rtol, atol: tolerances of the adaptive sampler.
        trajectory: whether to return every intermediate x too (fixed-grid samplers only).

    Returns:
        (B, H, W, C) float32 samples in model space, and (N, B, H, W, C) or None. Raises
        `InputError` for an unknown sampler, no interval, or a trajectory of the adaptive sampler.
    """
    check_name(name)
    x = initial_noise(keys, shape)
    if name == ADAPTIVE:
        if trajectory:
            raise InputError("trajectory: the adaptive sampler dopri5 has no fixed grid to return")
        return integrate_adaptive(field, x, guidance, rtol=rtol, atol=atol), None
    grid = time_grid(name, num_steps, field.path, time_shift)
    plan = guidance_lib.plan(guidance, stage_times(name, grid))
    return integrate(name, field, x, grid, plan, step_noise(keys, shape), trajectory)
