"""Samplers: a time grid, a step with a carry of its own, and a `lax.scan`.

They integrate a velocity and know nothing of guidance beyond which terms take part in each
evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax import checks, tables
from ig_jax.diffusion import interpolant as interpolants
from ig_jax.diffusion.field import GuidedVelocity, Velocity
from ig_jax.diffusion.interpolant import Interpolant, shift_times
from ig_jax.errors import InputError
from ig_jax.streams import stream

# evaluate(x, t, stage) -> Velocity, with t a scalar time and stage an index of `Sampler.nodes`
Evaluate = Callable[[jax.Array, jax.Array, int], Velocity]
# shallow(x, t) -> the first auxiliary head's velocity, by a forward pass that stops there
Shallow = Callable[[jax.Array, jax.Array], jax.Array]
# noise(interval index) -> standard normal noise shaped like x
Noise = Callable[[jax.Array], jax.Array]
# Anything that a step hands to the next: a pytree.
Carry = Any
# For each interval and stage the terms of guidance that take part (`Guidance.branches`).
Branches = tuple[tuple[tuple[int, ...], ...], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One interval of the grid.

    Attributes:
        t, next_t: scalar float32 times, from noise to data.
        last: whether this is the last interval (a traced boolean).
        noise: (B, …) standard normal noise, or None for deterministic samplers.
        path: the interpolant.
        shallow: evaluates the first auxiliary head alone.
    """

    t: jax.Array
    next_t: jax.Array
    last: jax.Array
    noise: jax.Array | None
    path: Interpolant
    shallow: Shallow

    @property
    def dt(self) -> jax.Array:
        """Length of the interval; negative where time falls towards the data."""
        return self.next_t - self.t


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Base of every sampler, a row of `SAMPLERS`; its dataclass fields are its options.

    A new one defines `step`, and `init` if it remembers anything from step to step.

    Attributes:
        nodes: for each evaluation of a step, where in the interval (0 its start, 1 its end) the
            schedules of guidance are read.
        stochastic: whether steps use noise.
        euler_last: whether the last interval is a plain Euler step.
        fixed_grid: whether the times are known before sampling.
    """

    nodes: ClassVar[tuple[float, ...]] = (0.0,)
    stochastic: ClassVar[bool] = False
    euler_last: ClassVar[bool] = False
    fixed_grid: ClassVar[bool] = True

    def grid(self, num_steps: int, path: Interpolant) -> np.ndarray:
        """(N + 1,) float64 times from noise to data: `num_steps` equal intervals.

        On the LightningDiT path `num_steps` counts grid points (so one interval fewer), as in its
        release.
        """
        points = num_steps if path.name == "linear_reversed" else num_steps + 1
        return np.linspace(1 - path.data_time, path.data_time, points)

    def init(self, x: jax.Array) -> Carry:
        """What the first step is handed, given the noise x (B, …)."""
        return ()

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        """Takes x (B, …) over one interval; returns what to hand on, and the new x."""
        raise NotImplementedError

    def check(self, heads: int, what: str = "sampler") -> None:
        """Raises `InputError` if a network of so many auxiliary heads cannot be sampled so.

        Args:
            heads: number of them.
            what: the field or argument that names the sampler.
        """

    def whole(self, index: int) -> bool:
        """Whether the interval of this index runs the whole network, or up to its first head."""
        return True

    def plain_end(self, path: Interpolant) -> bool:
        """Whether the last interval is a plain Euler step: by choice, or since the velocity has no
        limit at the data of this path, where a step's end would be read."""
        return self.euler_last or (1.0 in self.nodes and not path.finite_at_data)

    def solve(
        self,
        field: GuidedVelocity,
        x: jax.Array,
        grid: np.ndarray,
        branches: Branches,
        noise: Noise | None = None,
        trajectory: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Integrates from noise to data.

        Args:
            field: the guided velocity.
            x: (B, …) float32 noise at grid[0].
            grid: (N + 1,) host times.
            branches: `field.guidance.branches(stage_times(sampler, grid))`.
            noise: of each interval; needed by stochastic samplers.
            trajectory: whether to return x after every interval too.

        Returns:
            The samples (B, …), and the trajectory (N, B, …) or None.
        """
        count = len(grid) - 1
        steps = {
            "t": jnp.asarray(grid[:-1], jnp.float32),
            "next_t": jnp.asarray(grid[1:], jnp.float32),
            "at": jnp.asarray(stage_times(self, grid), jnp.float32),
            "index": jnp.arange(count),
        }
        plain_end = self.plain_end(field.path)
        samplers = [Euler() if plain_end and i == count - 1 else self for i in range(count)]
        carry = self.init(x)
        pieces: list[Any] = []
        for start, stop in _segments(list(zip(branches, samplers, strict=True))):
            body = functools.partial(
                _take_step, samplers[start], field, branches[start], count, noise, trajectory
            )
            (carry, x), visited = jax.lax.scan(
                body, (carry, x), {k: v[start:stop] for k, v in steps.items()}
            )
            pieces.append(visited)
        return x, (jnp.concatenate(pieces) if trajectory else None)


def _take_step(
    sampler: Sampler,
    field: GuidedVelocity,
    branches: tuple[tuple[int, ...], ...],
    count: int,
    noise: Noise | None,
    trajectory: bool,
    state: tuple[Carry, jax.Array],
    step: dict[str, jax.Array],
) -> tuple[tuple[Carry, jax.Array], jax.Array | None]:
    """The body of the scan over a run of intervals with the same branches."""
    carry, x = state

    def evaluate(x: jax.Array, t: jax.Array, stage: int) -> Velocity:
        times = jnp.broadcast_to(t, x.shape[:1])
        return field(x, times, step["at"][stage], branches[stage])

    def shallow(x: jax.Array, t: jax.Array) -> jax.Array:
        return field.shallow(x, jnp.broadcast_to(t, x.shape[:1]))

    drawn = noise(step["index"]) if sampler.stochastic and noise is not None else None
    last = step["index"] == count - 1
    interval = Step(step["t"], step["next_t"], last, drawn, field.path, shallow)
    # Euler at the end of another sampler hands that one's carry on untouched.
    carry, x = sampler.step(evaluate, carry, x, interval)
    return (carry, x), (x if trajectory else None)


def _segments(patterns: list[Any]) -> list[tuple[int, int]]:
    """Splits a list into runs of equal neighbours, as (start, stop) pairs."""
    cuts = [i for i in range(1, len(patterns)) if patterns[i] != patterns[i - 1]]
    return list(zip([0, *cuts], [*cuts, len(patterns)], strict=True))


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation a step."""

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        return carry, x + step.dt * evaluate(x, step.t, 0).velocity


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order step as SiT's release has it: the average of the slopes at both ends,
    guidance decided at the start for both, and plain Euler in the last interval."""

    nodes = (0.0, 0.0)
    euler_last = True

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        first = evaluate(x, step.t, 0).velocity
        second = evaluate(x + step.dt * first, step.next_t, 1).velocity
        return carry, x + step.dt * 0.5 * (first + second)


@dataclasses.dataclass(frozen=True)
class Heun2(Heun):
    """The same as LightningDiT's release has it: guidance decided by each evaluation's own time,
    and no Euler step at the end (but on a path whose velocity has no limit there)."""

    nodes = (0.0, 1.0)
    euler_last = False


@dataclasses.dataclass(frozen=True)
class RungeKutta4(Sampler):
    """The classic fourth-order Runge–Kutta method, four evaluations a step."""

    nodes = (0.0, 0.5, 0.5, 1.0)

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        middle = step.t + 0.5 * step.dt
        a = evaluate(x, step.t, 0).velocity
        b = evaluate(x + 0.5 * step.dt * a, middle, 1).velocity
        c = evaluate(x + 0.5 * step.dt * b, middle, 2).velocity
        d = evaluate(x + step.dt * c, step.next_t, 3).velocity
        return carry, x + step.dt / 6 * (a + 2 * b + 2 * c + d)


@dataclasses.dataclass(frozen=True)
class AdamsBashforth2(Sampler):
    """The two-step Adams–Bashforth method: second order with one evaluation a step, since each step
    remembers the slope before. Uneven grids are allowed for; the first step is Euler's."""

    def init(self, x: jax.Array) -> Carry:
        # A slope from infinitely long ago has no say.
        return jnp.zeros_like(x), jnp.float32(jnp.inf)

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        before, dt_before = carry
        slope = evaluate(x, step.t, 0).velocity
        change = 0.5 * step.dt / dt_before * (slope - before)
        return (slope, step.dt), x + step.dt * (slope + change)


class _Kept(NamedTuple):
    """Of the last whole step: its time, the difference then (B, …), and that one's rate of change;
    and the number of the interval that comes next."""

    t: jax.Array
    difference: jax.Array
    rate: jax.Array
    upcoming: jax.Array


@dataclasses.dataclass(frozen=True)
class Reuse(Sampler):
    """Euler, of whose steps only every `every`-th runs the whole network.

    The others stop at the first auxiliary head and add to its velocity by how much the guided one
    differed in the last whole step, `D_w(x) ≈ D_i(x) + (D_w − D_i)(then)`: the difference that
    internal guidance extrapolates stands for the deep half, which caches of features (TaylorSeer,
    arXiv 2503.06923) keep in its stead.

    Attributes:
        every: 1 is Euler's method.
        order: of the Taylor series that carries the difference on: 0 keeps it, 1 lets it change as
            between the last two whole steps.
    """

    every: int = 2
    order: int = 0

    def __post_init__(self) -> None:
        checks.SAMPLER_STEPS.check("every", self.every)
        checks.Limits(0, 1, whole=True).check("order", self.order)

    def check(self, heads: int, what: str = "sampler") -> None:
        """Raises `InputError` for a network without auxiliary heads."""
        if not heads:
            raise InputError(
                f"{what} is 'reuse': expected a model with an auxiliary head, where most of its "
                "steps stop; this one has none"
            )

    def whole(self, index: int) -> bool:
        return index % self.every == 0

    def init(self, x: jax.Array) -> Carry:
        # No difference infinitely long ago: the first rate is none.
        zeros = jnp.zeros_like(x)
        return _Kept(jnp.float32(jnp.inf), zeros, zeros, jnp.int32(0))

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        def whole(kept: _Kept) -> tuple[_Kept, jax.Array]:
            out = evaluate(x, step.t, 0)
            assert out.auxiliary is not None
            difference = out.velocity - out.auxiliary
            rate = (difference - kept.difference) / (step.t - kept.t)
            return _Kept(step.t, difference, rate, kept.upcoming), out.velocity

        def shallow(kept: _Kept) -> tuple[_Kept, jax.Array]:
            since = (step.t - kept.t) if self.order else 0.0
            difference = kept.difference + since * kept.rate
            return kept, step.shallow(x, step.t) + difference

        kept, velocity = jax.lax.cond(carry.upcoming % self.every == 0, whole, shallow, carry)
        return kept._replace(upcoming=kept.upcoming + 1), x + step.dt * velocity


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Reverse SDE with diffusion g² = 2t for every path, no noise in the last step (SiT's release).

    Attributes:
        last_time: time of the last evaluation, from which one step leads to the data.
    """

    last_time: float = 0.04
    stochastic = True

    def grid(self, num_steps: int, path: Interpolant) -> np.ndarray:
        """`num_steps` evaluations: equal intervals from noise to `last_time`, then the data."""
        grid = np.append(np.linspace(1.0, self.last_time, num_steps), 0.0)
        return 1 - grid if path.data_time == 1 else grid

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        assert step.noise is not None
        dt = step.dt
        # Time measured from the data end, so that 1 is noise on every path.
        diffusion = 2 * (1 - step.t if step.path.data_time == 1 else step.t)
        velocity = evaluate(x, step.t, 0).velocity
        times = jnp.broadcast_to(step.t, x.shape[:1])
        score = interpolants.score_from_velocity(step.path, velocity, x, times)
        # The score term always pulls towards data, whichever way the path's time runs.
        direction = jnp.sign(dt)
        x = x + dt * velocity + 0.5 * diffusion * score * dt * direction
        spread = jnp.where(step.last, 0.0, jnp.sqrt(diffusion * jnp.abs(dt)))
        return carry, x + spread * step.noise


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral DDPM steps between any two times of the path (Ho et al. 2020; respaced as in
    Nichol & Dhariwal 2021), with learned-range variance where the network predicts it."""

    stochastic = True

    def grid(self, num_steps: int, path: Interpolant) -> np.ndarray:
        """`num_steps` of DDPM's 1000 steps, evenly spaced with both ends (one: the first), then
        clean data. Raises `InputError` for more than there are."""
        if num_steps > interpolants.VP_STEPS:
            raise InputError(
                f"num_steps is {num_steps}: ddpm has at most {interpolants.VP_STEPS} steps"
            )
        kept = np.round(np.linspace(interpolants.VP_STEPS - 1, 0, num_steps))
        grid = np.append((kept + 1) / interpolants.VP_STEPS, 0.0)
        return 1 - grid if path.data_time == 1 else grid

    def step(
        self, evaluate: Evaluate, carry: Carry, x: jax.Array, step: Step
    ) -> tuple[Carry, jax.Array]:
        assert step.noise is not None
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
        return carry, mean + jnp.where(step.last, 0.0, jnp.sqrt(variance)) * step.noise


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


class _Attempt(NamedTuple):
    """Where an adaptive integration is: x (B, …), the time since noise and the next step's size,
    both (B,), and the number of attempted steps."""

    x: jax.Array
    since: jax.Array
    size: jax.Array
    attempts: jax.Array


@dataclasses.dataclass(frozen=True)
class DormandPrince(Sampler):
    """Adaptive Dormand–Prince 5(4) ODE integration (SiT's default ODE solver).

    Every sample has a step size of its own, so that a sample does not depend on its batch.
    Schedules of guidance are read at each evaluation's own time.

    Attributes:
        rtol, atol: tolerances of the error estimate (root mean square over a sample).
        max_steps: bound on attempted steps; samples not at the data by then are returned as NaN,
            so that an unfinished integration is never taken for a picture.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    max_steps: int = 1000
    fixed_grid = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            checks.TOLERANCE.check(name, getattr(self, name))

    def grid(self, num_steps: int, path: Interpolant) -> np.ndarray:
        """The two ends; the times between are its own."""
        return np.array([1 - path.data_time, path.data_time])

    def solve(
        self,
        field: GuidedVelocity,
        x: jax.Array,
        grid: np.ndarray,
        branches: Branches,
        noise: Noise | None = None,
        trajectory: bool = False,
    ) -> tuple[jax.Array, None]:
        """As `Sampler.solve`, on no grid; raises `InputError` for a trajectory."""
        if trajectory:
            raise InputError("trajectory: an adaptive sampler has no fixed grid to return")
        attempt = functools.partial(self._attempt, field)

        def unfinished(state: _Attempt) -> jax.Array:
            return (state.since < 1).any() & (state.attempts < self.max_steps)

        count = x.shape[0]
        start = _Attempt(x, jnp.zeros(count), jnp.full(count, 0.01), jnp.int32(0))
        end: _Attempt = jax.lax.while_loop(unfinished, attempt, start)
        return jnp.where(interpolants.expand(end.since, x) < 1, jnp.nan, end.x), None

    def _attempt(self, field: GuidedVelocity, state: _Attempt) -> _Attempt:
        """Tries one step of each sample."""
        x, s, h, count = state
        wide = functools.partial(interpolants.expand, like=x)
        h = jnp.minimum(h, 1 - s)
        slopes: list[jax.Array] = []
        for c, row in zip(_C, _A, strict=True):
            shift = sum((a * k for a, k in zip(row, slopes, strict=True) if a), jnp.zeros_like(x))
            y = x + wide(h) * shift
            since = s + c * h
            reversed_time = field.path.data_time == 1
            slope = field.anywhere(y, since if reversed_time else 1 - since).velocity
            slopes.append(slope if reversed_time else -slope)
        # The seventh stage is evaluated at the fifth-order solution itself, y.
        error = wide(h) * sum(e * k for e, k in zip(_E, slopes, strict=True) if e)
        bound = self.atol + self.rtol * jnp.maximum(jnp.abs(x), jnp.abs(y))
        norm = jnp.sqrt(jnp.square(error / bound).mean(axis=tuple(range(1, x.ndim))))
        accept = (norm <= 1) & (s < 1)
        x = jnp.where(wide(accept), y, x)
        # Land on 1 exactly: s + (1 − s) may round below it, and the loop would never end.
        s = jnp.where(accept, jnp.where(h >= 1 - s, 1.0, s + h), s)
        h = h * jnp.clip(0.9 * jnp.maximum(norm, 1e-10) ** -0.2, 0.2, 10.0)
        return _Attempt(x, s, h, count + 1)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "heun2": Heun2,
    "rk4": RungeKutta4,
    "ab2": AdamsBashforth2,
    "reuse": Reuse,
    "euler_maruyama": EulerMaruyama,
    "ddpm": Ancestral,
    "dopri5": DormandPrince,
}


def make(text: str, what: str = "sampler", **defaults: Any) -> Sampler:
    """The sampler that `name` or `name(option=value, …)` spells; raises `InputError`.

    Args:
        text: a row of `SAMPLERS`, with options.
        what: the field or argument that holds the text.
        **defaults: options for those rows that have them.
    """
    return tables.make(SAMPLERS, text, what, **defaults)


def time_grid(
    sampler: Sampler, num_steps: int, path: Interpolant, time_shift: float = 1.0
) -> np.ndarray:
    """The times a sampler visits, from noise to data.

    Args:
        sampler: a sampler.
        num_steps: intervals (euler, heun, … on SiT and DiT paths), grid points (the same on
            LightningDiT's path) or evaluations (euler_maruyama, ddpm): the authors' own counts.
        path: the interpolant.
        time_shift: s of `t ← s·t/(1 + (s − 1)·t)`; 1 for none.

    Returns:
        (N + 1,) float64. Raises `InputError` for fewer than one interval.
    """
    checks.SAMPLER_STEPS.check("num_steps", num_steps)
    checks.TIME_SHIFT.check("time_shift", time_shift)
    grid = sampler.grid(num_steps, path)
    if len(grid) < 2:
        name = tables.spell(SAMPLERS, sampler)
        raise InputError(f"num_steps is {num_steps}: {name} needs at least one interval")
    shifted = shift_times(grid, time_shift)
    # The ends are fixed points of the shift; rounding must not move them off 0 and 1.
    return np.where((grid == 0) | (grid == 1), grid, shifted)


def stage_times(sampler: Sampler, grid: np.ndarray) -> np.ndarray:
    """(N, S) times at which each evaluation of each interval reads the schedules of guidance."""
    nodes = np.asarray(sampler.nodes)
    start, end = grid[:-1, None], grid[1:, None]
    return np.where(nodes == 1, end, start + nodes * (end - start))


def sample_keys(seed: int | jax.Array, indices: jax.Array) -> jax.Array:
    """One random key for each (B,) sample index: sample i depends on (seed, i) alone."""
    root = stream(seed, "samples")
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(indices)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B, *shape) standard normal noise, one key a sample."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def step_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """Noise of the i-th interval from each sample's own key (fold 0 is the initial noise)."""

    def noise(index: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index + 1), shape))(keys)

    return noise
