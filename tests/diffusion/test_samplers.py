import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.convert.pytorch import from_pytorch
from ig_jax.diffusion import interpolant, samplers
from ig_jax.diffusion.field import GuidedVelocity
from ig_jax.diffusion.guidance import Guidance
from ig_jax.errors import InputError
from ig_jax.models.network import Heads
from tests.common import golden, nhwc, relative_error


@functools.cache
def network(name):
    return from_pytorch(golden(name), heads=4, auxiliary_depth=2)


def solve(sampler, field, z, steps, noise=None, shift=1.0, trajectory=False):
    sampler = samplers.make(sampler) if isinstance(sampler, str) else sampler
    grid = samplers.time_grid(sampler, steps, field.path, shift)
    branches = field.guidance.branches(samplers.stage_times(sampler, grid))
    return sampler.solve(field, z, grid, branches, noise, trajectory)


def run(model, labels, z, path, name, steps, guidance, noises=None, shift=1.0):
    field = GuidedVelocity(model, labels, 10, interpolant.get(path), "velocity", guidance)
    noise = None
    if noises is not None:
        padded = jnp.concatenate([noises, jnp.zeros_like(noises[:1])])
        noise = lambda i: padded[i]  # noqa: E731
    return jax.jit(lambda z: solve(name, field, z, steps, noise, shift)[0])(z)


CFG = Guidance(1.0, (0.0, 1.0), 1.7, (0.1, 0.75))
SIT_RUNS = {
    "ode_euler_plain": ("linear", "euler", 6, Guidance()),
    "ode_euler_cfg": ("linear", "euler", 6, CFG),
    "ode_heun_cfg": ("linear", "heun", 6, CFG),
    "sde_plain": ("linear", "euler_maruyama", 7, Guidance()),
    "sde_ig": ("linear", "euler_maruyama", 7, Guidance(1.9, (0.3, 1.0))),
    "sde_ig_cfg": (
        "linear",
        "euler_maruyama",
        7,
        Guidance(1.4, (0.2, 1.0), 1.35, (0.0, 0.7)),
    ),
    "sde_ig_cosine": ("cosine", "euler_maruyama", 7, Guidance(1.9, (0.3, 1.0))),
}


@pytest.mark.parametrize("name", SIT_RUNS)
def test_sit_samplers_equal_the_release(name):
    numbers = golden("sit_samplers_small")
    path, sampler_name, steps, guidance = SIT_RUNS[name]
    noises = jnp.asarray(nhwc(numbers["inputs/noises"]))
    labels = jnp.asarray(numbers["inputs/y"], jnp.int32)
    z = jnp.asarray(nhwc(numbers["inputs/z"]))
    x = run(network("sit_params_small"), labels, z, path, sampler_name, steps, guidance, noises)
    assert relative_error(x, nhwc(numbers[f"outputs/{name}"])) < 1e-4


IG_CFG = Guidance(1.4, (0.0, 1.0), 1.45, (0.19, 1.0))
LIGHTNING_RUNS = {
    "euler_ig": ("euler", Guidance(1.7), 0.3),
    "heun2_ig": ("heun2", Guidance(1.7), 0.3),
    "heun2_ig_cfg": ("heun2", IG_CFG, 0.3),
    "euler_ig_cfg_noshift": ("euler", IG_CFG, 1.0),
    "heun2_cfg": ("heun2", Guidance(1.0, (0.0, 1.0), 1.45, (0.19, 1.0)), 0.3),
}


@pytest.mark.parametrize("variant", ["small", "qknorm_noshift"])
@pytest.mark.parametrize("name", LIGHTNING_RUNS)
def test_lightningdit_samplers_equal_the_release(name, variant):
    numbers = golden(f"lightningdit_samplers_{variant}")
    sampler_name, guidance, shift = LIGHTNING_RUNS[name]
    x = run(
        network(f"lightningdit_params_{variant}"),
        jnp.asarray(numbers["inputs/y"], jnp.int32),
        jnp.asarray(nhwc(numbers["inputs/z"])),
        "linear_reversed",
        sampler_name,
        7,
        guidance,
        shift=shift,
    )
    assert relative_error(x, nhwc(numbers[f"outputs/{name}"])) < 1e-4


def grid_of(name, *arguments, **keywords):
    return samplers.time_grid(samplers.make(name), *arguments, **keywords)


def test_grids_count_as_the_release_does():
    linear, reversed_ = interpolant.get("linear"), interpolant.get("linear_reversed")
    grid = grid_of("euler_maruyama", 250, linear)
    assert len(grid) == 251 and grid[0] == 1 and grid[-2] == pytest.approx(0.04) and grid[-1] == 0
    assert len(grid_of("heun", 50, linear)) == 51
    grid = grid_of("heun2", 125, reversed_, time_shift=0.3)
    assert len(grid) == 125 and grid[0] == 0 and grid[-1] == 1
    middle = np.linspace(0, 1, 125)[40]
    assert grid[40] == pytest.approx(0.3 * middle / (1 - 0.7 * middle))
    grid = grid_of("ddpm", 250, interpolant.get("vp"))
    assert len(grid) == 251 and grid[0] == 1 and grid[-2] == pytest.approx(1 / 1000)


# A case whose answer is known: data N(m, s²) in every element, where the exact velocity is affine.
MEAN, STD = 0.5, 0.3


def exact(path, prediction="velocity"):
    """The exact conditional expectation of each target, as a network with both heads alike."""

    def network(x, network_t, y, upto=None):
        t = (network_t + 1) / 1000 if path.name == "vp" else network_t
        a, s = path.alpha(t)[:, None, None, None], path.sigma(t)[:, None, None, None]
        variance = a**2 * STD**2 + s**2
        data = MEAN + a * STD**2 / variance * (x - a * MEAN)
        noise = s / variance * (x - a * MEAN)
        da, ds = path.alpha_rate(t), path.sigma_rate(t)
        velocity = da[:, None, None, None] * data + ds[:, None, None, None] * noise
        out = {"velocity": velocity, "noise": noise, "data": data}[prediction]
        return Heads(out if upto is None else None, (out,))

    return network


# Every sampler on every path, and (sampler, path) → how far mean and deviation may be off after
# this many steps; one evaluation a step needs more of them.
STEPS = {"euler": 200, "ab2": 60, "reuse": 200, "heun": 60, "heun2": 60, "rk4": 30, "dopri5": 1}
CASES = [
    (path, name, "noise" if path == "vp" else "velocity", 250 if path == "vp" else steps)
    for path in interpolant.INTERPOLANTS
    for name, steps in (dict.fromkeys(samplers.SAMPLERS, 250) | STEPS).items()
]
CASES += [("linear", "heun", "data", 60), ("linear", "heun2", "noise", 60)]


@pytest.mark.parametrize("path,name,prediction,steps", CASES)
def test_every_sampler_reaches_a_known_gaussian_on_every_path(path, name, prediction, steps):
    path = interpolant.get(path)
    field = GuidedVelocity(
        exact(path, prediction), jnp.zeros(4096, jnp.int32), 10, path, prediction
    )
    keys = samplers.sample_keys(0, jnp.arange(4096))
    z, noise = samplers.initial_noise(keys, (1, 1, 2)), samplers.step_noise(keys, (1, 1, 2))
    x, _ = jax.jit(lambda z: solve(name, field, z, steps, noise))(z)
    assert abs(float(x.mean()) - MEAN) < 0.03
    assert abs(float(x.std()) - STD) < (0.03 if samplers.SAMPLERS[name].stochastic else 0.02)


@pytest.mark.parametrize("steps", [50, 125])
@pytest.mark.parametrize("name", ["heun2", "rk4"])
def test_no_sampler_reads_a_velocity_without_a_limit(name, steps):
    """heun2 evaluated the VP path at clean data, where σ′ is infinite: 0.140 at 50 steps."""
    path = interpolant.get("vp")
    field = GuidedVelocity(exact(path, "noise"), jnp.zeros(4096, jnp.int32), 10, path, "noise")
    z = samplers.initial_noise(samplers.sample_keys(0, jnp.arange(4096)), (1, 1, 2))
    x, _ = jax.jit(lambda z: solve(name, field, z, steps))(z)
    assert abs(float(x.std()) - STD) < 0.02


GUIDED = Guidance(1.8, (0.2, 1.0), 1.5, (0.0, 0.6))


@pytest.fixture(scope="module")
def sit():
    return network("sit_params_small")


def sample(model, guidance, labels=(0, 1, 2, 3), name="heun", steps=4, seed=0, **keywords):
    labels = jnp.asarray(labels, jnp.int32)
    field = GuidedVelocity(model, labels, 10, interpolant.get("linear"), "velocity", guidance)
    keys = samplers.sample_keys(seed, jnp.arange(len(labels)))
    z, noise = samplers.initial_noise(keys, (8, 8, 4)), samplers.step_noise(keys, (8, 8, 4))
    return jax.jit(lambda z: solve(name, field, z, steps, noise, **keywords))(z)


# Of fixed grids, of noise, and of steps by error, which compiles longest.
KINDS = ["heun", "euler_maruyama", pytest.param("dopri5", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", KINDS)
def test_scale_one_and_empty_intervals_are_no_guidance(sit, name):
    plain, _ = sample(sit, Guidance(), name=name)

    def headless(x, t, y):
        return sit(x, t, y).replace(auxiliary=())

    # The adaptive loop is another program without the head; rounding may differ there.
    tolerance = 1e-5 if name == "dopri5" else 0
    np.testing.assert_allclose(
        plain, sample(headless, Guidance(), name=name)[0], rtol=0, atol=tolerance
    )
    if name != "dopri5":  # an adaptive sampler visits any time
        between = (0.51, 0.52)
        nowhere = Guidance(3.0, between, 3.0, between)
        np.testing.assert_array_equal(plain, sample(sit, nowhere, name=name)[0])
    guided, _ = sample(sit, Guidance(2.0), name=name)
    assert relative_error(guided, plain) > 1e-3


def test_cfg_scale_one_is_conditional(sit):
    plain, _ = sample(sit, Guidance())
    # A traced scale computes the ∅ branch in a batch twice as large, hence not bit for bit.
    traced, _ = sample(sit, Guidance(cfg_scale=jnp.float32(1.0)))
    np.testing.assert_allclose(traced, plain, atol=2e-5)


def test_unconditional_branch_is_computed_only_inside_its_interval():
    sizes = []

    def spy(x, t, y):
        jax.debug.callback(lambda n=x.shape[0]: sizes.append(n))
        return Heads(x, (x,))

    sample(spy, Guidance(1.5, (0, 1), 2.0, (0.2, 0.6)), name="euler", steps=10)
    jax.effects_barrier()
    assert sorted(sizes) == [4] * 5 + [8] * 5


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_does_not_change_with_its_batch(sit, name):
    whole, _ = sample(sit, GUIDED, name=name)
    alone, _ = sample(sit, GUIDED, labels=(0,), name=name)
    np.testing.assert_allclose(alone[0], whole[0], atol=1e-4)
    other, _ = sample(sit, GUIDED, labels=(0,), name=name, seed=1)
    assert relative_error(other, alone) > 0.1


def test_trajectory_ends_at_the_sample(sit):
    guidance = Guidance(1.5, (0.0, 1.0), 1.5, (0.3, 0.6))
    x, visited = sample(sit, guidance, trajectory=True)
    assert visited.shape == (4, 4, 8, 8, 4)
    np.testing.assert_array_equal(visited[-1], x)
    with pytest.raises(InputError, match="trajectory"):
        sample(sit, guidance, name="dopri5", trajectory=True)


@pytest.mark.parametrize("order", [0, 1])
def test_reuse_adds_the_difference_of_the_last_whole_step(sit, order):
    """Step by step, in plain Python: whole at 0, 3 and 6."""
    path, labels = interpolant.get("linear"), jnp.arange(4, dtype=jnp.int32)
    field = GuidedVelocity(sit, labels, 10, path, "velocity", GUIDED)
    whole = jax.jit(lambda x, t: field(x, jnp.full(4, t)).velocity)
    shallow = jax.jit(lambda x, t: sit(x, jnp.full(4, t), labels).auxiliary[0])
    x = samplers.initial_noise(samplers.sample_keys(0, jnp.arange(4)), (8, 8, 4))
    times, kept = np.linspace(1, 0, 9, dtype=np.float32), []
    for i, t in enumerate(times[:-1]):
        if i % 3 == 0:
            kept.append((t, whole(x, t) - shallow(x, t)))
        then, difference = kept[-1]
        if order and len(kept) > 1:
            before, older = kept[-2]
            difference = difference + (t - then) * (difference - older) / (then - before)
        x = x + (times[i + 1] - t) * (shallow(x, t) + difference)
    found, _ = sample(sit, GUIDED, name=f"reuse(every=3, order={order})", steps=8)
    assert relative_error(found, x) <= 1e-4


def test_reuse_is_euler_where_nothing_is_left_out(sit):
    euler, _ = sample(sit, GUIDED, name="euler", steps=6)
    every, _ = sample(sit, GUIDED, name="reuse(every=1)", steps=6)
    assert relative_error(every, euler) <= 1e-5
    # The auxiliary head's own samples, whose difference from it is none.
    euler, _ = sample(sit, Guidance(0.0), name="euler", steps=6)
    shallow, _ = sample(sit, Guidance(0.0), name="reuse(every=3)", steps=6)
    assert relative_error(shallow, euler) <= 1e-5
    guided, _ = sample(sit, GUIDED, name="reuse(every=3)", steps=6)
    assert relative_error(guided, every) > 1e-3


def test_reuse_makes_the_passes_that_it_is_counted_for(sit):
    made = []

    def spy(x, t, y, upto=None):
        jax.debug.callback(lambda: made.append(upto))
        return Heads(None if upto is not None else 2 * x, (x,))

    sample(spy, Guidance(1.5), name="reuse(every=3)", steps=8)
    jax.effects_barrier()
    assert made == [None, 0, 0, None, 0, 0, None, 0]
    counted = [samplers.Reuse(every=3).whole(i) for i in range(8)]
    assert counted == [upto is None for upto in made]


ORDERS = {"euler": 1, "ab2": 2, "heun2": 2, "rk4": 4}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_convergence(name):
    path = interpolant.get("cosine")
    field = GuidedVelocity(exact(path), jnp.zeros(4, jnp.int32), 10, path, "velocity")
    z = jnp.linspace(-1, 1, 4).reshape(4, 1, 1, 1)
    # The flow of a Gaussian has a closed form: standard scores are kept.
    target = MEAN + STD * z

    def error(steps):
        return float(jnp.abs(solve(name, field, z, steps)[0] - target).max())

    coarse, fine = error(8), error(16)
    assert np.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.7)


@pytest.mark.parametrize("path", ["linear", "linear_reversed"])
def test_adams_bashforth_is_second_order_on_an_uneven_grid(path):
    path = interpolant.get(path)
    field = GuidedVelocity(exact(path), jnp.zeros(4, jnp.int32), 10, path, "velocity")
    z = jnp.linspace(-1, 1, 4).reshape(4, 1, 1, 1)
    errors = {
        name: float(jnp.abs(solve(name, field, z, 65, shift=0.4)[0] - (MEAN + STD * z)).max())
        for name in ("euler", "ab2")
    }
    assert errors["ab2"] < errors["euler"] / 10


def with_variance(path, value):
    network = exact(path, "noise")

    def predicts(x, t, y):
        heads = network(x, t, y)
        return heads.replace(variance=jnp.full_like(heads.final, value))

    return GuidedVelocity(predicts, jnp.zeros(2048, jnp.int32), 10, path, "noise")


def test_ancestral_steps_use_the_predicted_variance():
    """The variance channels lie in [−1, 1] between the posterior's variance and β (in the log)."""
    path = interpolant.get("vp")
    sampler, t, next_t = samplers.make("ddpm"), jnp.float32(0.6), jnp.float32(0.3)
    x = jnp.zeros((2048, 1, 1, 1))
    noise = jax.random.normal(jax.random.key(0), x.shape)
    step = samplers.Step(t, next_t, jnp.bool_(False), noise, path, shallow=None)

    def spread(value):
        field = with_variance(path, value)
        if value is None:
            plain = exact(path, "noise")
            field = GuidedVelocity(plain, field.labels, 10, path, "noise")
        _, out = sampler.step(lambda x, t, _: field(x, jnp.broadcast_to(t, 2048)), (), x, step)
        return float((out - out.mean()).std() / noise.std()) ** 2

    beta = float(
        path.sigma(t) ** 2 - (path.alpha(t) / path.alpha(next_t) * path.sigma(next_t)) ** 2
    )
    posterior = beta * float(path.sigma(next_t) ** 2 / path.sigma(t) ** 2)
    assert spread(None) == pytest.approx(posterior, rel=1e-3)
    assert spread(-1.0) == pytest.approx(posterior, rel=1e-3)
    assert spread(1.0) == pytest.approx(beta, rel=1e-3)
    assert spread(0.0) == pytest.approx((beta * posterior) ** 0.5, rel=1e-3)


def test_ancestral_sampling_with_a_predicted_variance_reaches_the_gaussian():
    path = interpolant.get("vp")
    field = with_variance(path, -1.0)
    keys = samplers.sample_keys(0, jnp.arange(2048))
    z, noise = samplers.initial_noise(keys, (1, 1, 1)), samplers.step_noise(keys, (1, 1, 1))
    x, _ = jax.jit(lambda z: solve("ddpm", field, z, 250, noise))(z)
    assert abs(float(x.std()) - STD) < 0.03


def test_ddpm_grids_start_at_noise_and_have_no_twins():
    vp = interpolant.get("vp")
    np.testing.assert_allclose(grid_of("ddpm", 1, vp), [1, 0])
    for steps in (1, 2, 7, 250, 999, 1000):
        grid = grid_of("ddpm", steps, vp)
        assert grid[0] == 1 and len(grid) == steps + 1 and np.all(np.diff(grid) < 0)
    with pytest.raises(InputError, match="num_steps is 1001: ddpm has at most 1000 steps"):
        grid_of("ddpm", 1001, vp)


def test_bad_names_options_and_steps():
    with pytest.raises(InputError, match="sampler is 'huen'.*euler.*did you mean heun"):
        samplers.make("huen")
    with pytest.raises(InputError, match="heun has no option 'rtol', it has none"):
        samplers.make("heun(rtol=1e-3)")
    with pytest.raises(InputError, match="rtol is nan: expected a finite number"):
        samplers.make("dopri5", rtol=float("nan"))
    assert samplers.make("dopri5(rtol=0.1)", rtol=0.2, atol=0.3) == samplers.DormandPrince(0.1, 0.3)
    with pytest.raises(InputError, match="num_steps is 1: heun2 needs at least one interval"):
        grid_of("heun2", 1, interpolant.get("linear_reversed"))
