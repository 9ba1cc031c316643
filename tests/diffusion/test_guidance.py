import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.diffusion import guidance as g
from ig_jax.diffusion import interpolant
from ig_jax.errors import InputError
from ig_jax.models.network import Heads


@pytest.fixture(scope="module")
def branches():
    a, b, c, d = jax.random.normal(jax.random.key(0), (4, 3, 2, 2, 1))
    return Heads(a, (b,)), Heads(c, (d,))


def test_formula(branches):
    conditional, unconditional = branches
    w, s = 1.7, 1.3
    dw = [p.auxiliary[0] + w * (p.final - p.auxiliary[0]) for p in (conditional, unconditional)]
    np.testing.assert_allclose(g.guide(conditional, None, w, s), dw[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        g.guide(conditional, unconditional, w, s),
        dw[1] + s * (dw[0] - dw[1]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_scale_one_is_exactly_no_guidance(branches):
    conditional, unconditional = branches
    np.testing.assert_array_equal(g.guide(conditional, None, 1.0, 1.0), conditional.final)
    # CFG scale 1 is exactly the conditional branch, also when the other one is computed.
    np.testing.assert_array_equal(
        g.guide(conditional, unconditional, 1.5, 1.0), g.guide(conditional, None, 1.5, 1.0)
    )


def test_scale_zero_is_the_auxiliary_head(branches):
    conditional, _ = branches
    np.testing.assert_allclose(
        g.guide(conditional, None, 0.0, 1.0), conditional.auxiliary[0], rtol=1e-5, atol=1e-6
    )


def test_headless_network_is_not_internally_guided(branches):
    conditional, _ = branches
    np.testing.assert_array_equal(
        g.guide(conditional.replace(auxiliary=None), None, 3.0, 1.0), conditional.final
    )


def test_plan_intervals_are_inclusive():
    times = np.linspace(1, 0, 11)[:-1, None]
    plan = g.plan(g.Guidance(1.5, (0.3, 0.7), 2.0, (0.2, 0.6)), times)
    inside = lambda low, high: (times > low - 0.05) & (times < high + 0.05)  # noqa: E731
    np.testing.assert_array_equal(plan.ig_scale, np.where(inside(0.3, 0.7), 1.5, 1))
    np.testing.assert_array_equal(plan.cfg_scale, np.where(inside(0.2, 0.6), 2, 1))
    np.testing.assert_array_equal(plan.cfg_on, inside(0.2, 0.6))


def test_unconditional_branch_is_off_at_scale_one():
    assert not np.any(g.plan(g.Guidance(cfg_scale=1.0), np.ones((4, 1))).cfg_on)


@pytest.mark.parametrize("interval", [(0.7, 0.3), (-0.1, 1.0), (0.0, 1.2), (0.5,)])
def test_bad_intervals(interval):
    with pytest.raises(InputError, match="ig_interval is .*expected .low, high."):
        g.Guidance(ig_interval=interval)


def test_autoguidance_replaces_the_auxiliary_head():
    def strong(x, t, y):
        return Heads(x, (x * 100,))

    def weak(x, t, y):
        return Heads(x * 0.5)

    field = g.GuidedVelocity(
        strong, jnp.zeros(2, jnp.int32), 10, interpolant.get("linear"), "velocity", weak
    )
    x = jnp.ones((2, 1, 1, 1))
    out = field(x, jnp.full(2, 0.5), 2.0, 1.0, False)
    np.testing.assert_allclose(out.velocity, 0.5 + 2 * (1 - 0.5))


def pair(outputs):
    final, auxiliary = outputs
    return Heads(final, (auxiliary,))


@pytest.mark.parametrize("path", list(interpolant.INTERPOLANTS))
def test_guiding_any_prediction_guides_the_velocity(path):
    """IG and CFG are affine, so they commute with converting predictions to velocity."""
    path = interpolant.get(path)
    t = jnp.array([0.3005, 0.6005])
    x_t, *heads = jax.random.normal(jax.random.key(3), (5, 2, 2, 2, 1))
    for prediction in ("noise", "data"):
        convert = lambda h, kind=prediction: interpolant.velocity_from(path, kind, h, x_t, t)  # noqa: E731
        raw = g.guide(pair(heads[:2]), pair(heads[2:]), 1.6, 1.4)
        velocities = [convert(h) for h in heads]
        guided = g.guide(pair(velocities[:2]), pair(velocities[2:]), 1.6, 1.4)
        np.testing.assert_allclose(convert(raw), guided, rtol=2e-3, atol=2e-3)
