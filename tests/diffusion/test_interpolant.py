import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.diffusion import interpolant
from ig_jax.errors import InputError

PATHS = list(interpolant.INTERPOLANTS)
# Away from the ends, where some conversions are singular; on VP, mid-step.
TIMES = jnp.array([0.0505, 0.3005, 0.7005, 0.9005])


@pytest.fixture(scope="module")
def data():
    x, noise = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 3))
    return x, noise


@pytest.mark.parametrize("name", PATHS)
def test_ends_are_data_and_noise(name):
    path = interpolant.get(name)
    ends = jnp.array([path.data_time, 1 - path.data_time])
    np.testing.assert_allclose(path.alpha(ends)[0], 1, atol=1e-6)
    np.testing.assert_allclose(path.sigma(ends), [0, 1], atol=1e-2 if name == "vp" else 1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_rates_are_derivatives(name):
    path = interpolant.get(name)
    h = 1e-4
    for value, rate in ((path.alpha, path.alpha_rate), (path.sigma, path.sigma_rate)):
        difference = (value(TIMES + h) - value(TIMES - h)) / (2 * h)
        np.testing.assert_allclose(rate(TIMES), difference, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", interpolant.PREDICTIONS)
def test_predictions_agree_on_the_velocity(name, prediction, data):
    path = interpolant.get(name)
    x, noise = data
    x_t = interpolant.interpolate(path, x, noise, TIMES)
    output = interpolant.target(path, prediction, x, noise, TIMES)
    velocity = interpolant.velocity_from(path, prediction, output, x_t, TIMES)
    expected = interpolant.target(path, "velocity", x, noise, TIMES)
    np.testing.assert_allclose(velocity, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_stands_for_data_and_noise(name, data):
    path = interpolant.get(name)
    x, noise = data
    x_t = interpolant.interpolate(path, x, noise, TIMES)
    velocity = interpolant.target(path, "velocity", x, noise, TIMES)
    found_x, found_noise = interpolant.data_and_noise_from_velocity(path, velocity, x_t, TIMES)
    np.testing.assert_allclose(found_x, x, atol=2e-3)
    np.testing.assert_allclose(found_noise, noise, atol=2e-3)
    score = interpolant.score_from_velocity(path, velocity, x_t, TIMES)
    expected = -noise / interpolant.expand(path.sigma(TIMES), x)
    np.testing.assert_allclose(score, expected, rtol=5e-3, atol=1e-2)


def test_vp_is_the_ddpm_schedule():
    path = interpolant.get("vp")
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    t = (jnp.arange(1000) + 1) / 1000
    np.testing.assert_allclose(path.alpha(t) ** 2, alpha_bar, rtol=2e-4)
    np.testing.assert_array_equal(path.network_time(t), np.arange(1000))
    draws = interpolant.draw_times(path, "uniform", jax.random.key(0), 4096)
    steps = path.network_time(draws)
    assert steps.min() == 0 and steps.max() == 999
    np.testing.assert_allclose(draws, (steps + 1) / 1000, rtol=1e-6)


def test_lognormal_times():
    n = jnp.array([-1.0, 0.0, 2.0])
    u = np.exp(n)
    np.testing.assert_allclose(
        interpolant.lognormal_times(interpolant.get("linear"), n), u / (1 + u), rtol=1e-6
    )
    np.testing.assert_allclose(
        interpolant.lognormal_times(interpolant.get("cosine"), n),
        2 / np.pi * np.arctan(u),
        rtol=1e-6,
    )


def test_logit_normal_times_with_a_shift():
    """RAEv2: the logistic of a normal, then `s·t/(1 + (s − 1)·t)`; the median lies at s/(1 + s)."""
    path = interpolant.get("linear")
    key = jax.random.key(0)
    plain = interpolant.draw_times(path, "lognormal", key, 4001)
    np.testing.assert_allclose(plain, jax.nn.sigmoid(jax.random.normal(key, (4001,))), rtol=1e-5)
    shifted = interpolant.draw_times(path, "lognormal(shift=8)", key, 4001)
    np.testing.assert_allclose(shifted, 8 * plain / (1 + 7 * plain), rtol=1e-5)
    assert abs(float(jnp.median(shifted)) - 8 / 9) < 0.01
    even = interpolant.draw_times(path, "uniform(shift=0.5)", key, 4001)
    assert abs(float(jnp.median(even)) - 1 / 3) < 0.02
    np.testing.assert_array_equal(
        interpolant.draw_times(path, "uniform", key, 9), jax.random.uniform(key, (9,))
    )
    with pytest.raises(InputError, match="shift is 0: expected 0.001"):
        interpolant.draw_times(path, "lognormal(shift=0)", key, 1)


def test_unknown_path_names_the_known_ones():
    with pytest.raises(InputError, match="unknown path 'liner'.*linear, cosine.*did you mean"):
        interpolant.get("liner")
