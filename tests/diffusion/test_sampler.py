import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.convert.pytorch import from_pytorch
from ig_jax.diffusion import guidance as g
from ig_jax.diffusion import interpolant, sampler
from ig_jax.diffusion.guidance import Guidance, GuidedVelocity
from ig_jax.errors import InputError
from ig_jax.models.network import Heads
from tests.common import golden, nhwc, relative_error


@functools.cache
def network(name):
    return from_pytorch(golden(name), heads=4, auxiliary_depth=2)


def run(model, labels, z, path, name, steps, guidance, noises=None, shift=1.0):
    field = GuidedVelocity(model, labels, 10, interpolant.get(path), "velocity")
    grid = sampler.time_grid(name, steps, field.path, shift)
    plan = g.plan(guidance, sampler.stage_times(name, grid))
    noise = None
    if noises is not None:
        padded = jnp.concatenate([noises, jnp.zeros_like(noises[:1])])
        noise = lambda i: padded[i]  # noqa: E731
    return jax.jit(lambda z: sampler.integrate(name, field, z, grid, plan, noise)[0])(z)


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


def test_grids_count_as_the_release_does():
    linear, reversed_ = interpolant.get("linear"), interpolant.get("linear_reversed")
    grid = sampler.time_grid("euler_maruyama", 250, linear)
    assert len(grid) == 251 and grid[0] == 1 and grid[-2] == pytest.approx(0.04) and grid[-1] == 0
    assert len(sampler.time_grid("heun", 50, linear)) == 51
    grid = sampler.time_grid("heun2", 125, reversed_, time_shift=0.3)
    assert len(grid) == 125 and grid[0] == 0 and grid[-1] == 1
    middle = np.linspace(0, 1, 125)[40]
    assert grid[40] == pytest.approx(0.3 * middle / (1 - 0.7 * middle))
    grid = sampler.time_grid("ddpm", 250, interpolant.get("vp"))
    assert len(grid) == 251 and grid[0] == 1 and grid[-2] == pytest.approx(1 / 1000)


# A case whose answer is known: data N(m, s²) in every element, where the exact velocity is affine.
MEAN, STD = 0.5, 0.3


def exact(path, prediction="velocity"):
    """The exact conditional expectation of each target, as a network with both heads alike."""

    def network(x, network_t, y):
        t = (network_t + 1) / 1000 if path.name == "vp" else network_t
        a, s = path.alpha(t)[:, None, None, None], path.sigma(t)[:, None, None, None]
        variance = a**2 * STD**2 + s**2
        data = MEAN + a * STD**2 / variance * (x - a * MEAN)
        noise = s / variance * (x - a * MEAN)
        da, ds = path.alpha_rate(t), path.sigma_rate(t)
        velocity = da[:, None, None, None] * data + ds[:, None, None, None] * noise
        out = {"velocity": velocity, "noise": noise, "data": data}[prediction]
        return Heads(out, (out,))

    return network


CASES = [
    ("linear", "euler", "velocity", 200, 0.02),
    ("linear", "heun", "velocity", 60, 0.02),
    ("linear_reversed", "heun2", "velocity", 60, 0.02),
    ("cosine", "heun", "velocity", 60, 0.02),
    ("linear", "euler_maruyama", "velocity", 250, 0.03),
    ("linear_reversed", "euler_maruyama", "velocity", 250, 0.03),
    ("linear", "heun", "data", 60, 0.02),
    ("linear", "dopri5", "velocity", 1, 0.02),
    ("linear_reversed", "dopri5", "velocity", 1, 0.02),
    ("vp", "ddpm", "noise", 250, 0.03),
    ("vp", "heun", "noise", 250, 0.03),
    ("vp", "euler_maruyama", "noise", 250, 0.03),
    ("vp", "dopri5", "noise", 1, 0.03),
    ("linear", "ddpm", "velocity", 250, 0.03),
]


@pytest.mark.parametrize("path,name,prediction,steps,tolerance", CASES)
def test_samplers_reach_a_known_gaussian(path, name, prediction, steps, tolerance):
    path = interpolant.get(path)
    labels = jnp.zeros(4096, jnp.int32)
    field = GuidedVelocity(exact(path, prediction), labels, 10, path, prediction)
    keys = sampler.sample_keys(0, jnp.arange(4096))
    x, _ = jax.jit(
        lambda: sampler.sample(field, keys, (1, 1, 2), Guidance(), name=name, num_steps=steps)
    )()
    assert abs(float(x.mean()) - MEAN) < tolerance
    assert abs(float(x.std()) - STD) < tolerance


@pytest.fixture(scope="module")
def sit():
    return network("sit_params_small")


def sample(model, guidance, labels=(0, 1, 2, 3), name="heun", steps=4, seed=0, **keywords):
    labels = jnp.asarray(labels, jnp.int32)
    field = GuidedVelocity(model, labels, 10, interpolant.get("linear"), "velocity")
    keys = sampler.sample_keys(seed, jnp.arange(len(labels)))
    draw = lambda: sampler.sample(  # noqa: E731
        field, keys, (8, 8, 4), guidance, name=name, num_steps=steps, **keywords
    )
    return jax.jit(draw)()


@pytest.mark.parametrize("name", ["heun", "euler_maruyama", "dopri5"])
def test_scale_one_and_empty_intervals_are_no_guidance(sit, name):
    plain, _ = sample(sit, Guidance(), name=name)

    def headless(x, t, y):
        return sit(x, t, y).replace(auxiliary=None)

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


@pytest.mark.parametrize("name", ["heun", "euler_maruyama", "dopri5"])
def test_a_sample_does_not_change_with_its_batch(sit, name):
    guidance = Guidance(1.8, (0.2, 1.0), 1.5, (0.0, 0.6))
    whole, _ = sample(sit, guidance, name=name)
    alone, _ = sample(sit, guidance, labels=(0,), name=name)
    np.testing.assert_allclose(alone[0], whole[0], atol=1e-4)
    other, _ = sample(sit, guidance, labels=(0,), name=name, seed=1)
    assert relative_error(other, alone) > 0.1


def test_trajectory_ends_at_the_sample(sit):
    guidance = Guidance(1.5, (0.0, 1.0), 1.5, (0.3, 0.6))
    x, visited = sample(sit, guidance, trajectory=True)
    assert visited.shape == (4, 4, 8, 8, 4)
    np.testing.assert_array_equal(visited[-1], x)
    with pytest.raises(InputError, match="trajectory"):
        sample(sit, guidance, name="dopri5", trajectory=True)


def test_heun_is_second_order():
    path = interpolant.get("linear")
    field = GuidedVelocity(exact(path), jnp.zeros(4, jnp.int32), 10, path, "velocity")
    z = jnp.linspace(-1, 1, 4).reshape(4, 1, 1, 1)
    # The flow of a Gaussian has a closed form: standard scores are kept.
    target = MEAN + STD * z

    def error(name, steps):
        grid = sampler.time_grid(name, steps, path)
        plan = g.plan(Guidance(), sampler.stage_times(name, grid))
        return float(jnp.abs(sampler.integrate(name, field, z, grid, plan)[0] - target).max())

    assert error("euler", 8) / error("euler", 16) == pytest.approx(2, rel=0.3)
    assert error("heun2", 8) / error("heun2", 16) > 3
    assert error("heun2", 16) < error("euler", 16) / 3


def test_bad_names_and_steps():
    with pytest.raises(InputError, match="unknown sampler 'huen'.*euler.*did you mean heun"):
        sampler.check_name("huen")
    with pytest.raises(InputError, match="num_steps is 1"):
        sampler.time_grid("heun2", 1, interpolant.get("linear_reversed"))
