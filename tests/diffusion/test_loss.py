import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.convert.pytorch import from_pytorch
from ig_jax.diffusion import interpolant, loss
from ig_jax.models.network import Heads
from tests.common import golden, nhwc, relative_error

TIMES = jnp.array([0.02, 0.2, 0.5, 0.9])


def test_sit_losses_equal_the_release():
    model = from_pytorch(golden("sit_params_small"), heads=4, auxiliary_depth=2)
    numbers = golden("sit_losses_small")
    x, noise = nhwc(numbers["inputs/x"]), nhwc(numbers["inputs/noise"])
    labels = jnp.asarray(numbers["inputs/y"], jnp.int32)
    for name in ("linear", "cosine"):
        path = interpolant.get(name)
        times = {
            "uniform": jnp.asarray(numbers["inputs/t_uniform"]),
            "lognormal": interpolant.lognormal_times(
                path, jnp.asarray(numbers["inputs/log_sigma"])
            ),
        }
        for kind, t in times.items():
            options = loss.LossOptions(path=name)
            found = loss.losses_at(model, x, labels, noise, t, options)
            for head in ("final", "auxiliary"):
                expected = numbers[f"outputs/{name}_{kind}_{head}"]
                assert relative_error(getattr(found, head), expected) < 1e-5, (name, kind, head)
            np.testing.assert_allclose(found.total, found.final + 0.5 * found.auxiliary, rtol=1e-6)


@pytest.mark.parametrize("variant", ["small", "qknorm_noshift"])
def test_lightningdit_losses_equal_the_release(variant):
    model = from_pytorch(golden(f"lightningdit_params_{variant}"), heads=4, auxiliary_depth=2)
    numbers = golden(f"lightningdit_losses_{variant}")
    x, noise = nhwc(numbers["inputs/x"]), nhwc(numbers["inputs/noise"])
    options = loss.LossOptions(path="linear_reversed", cosine_weight=1.0)
    found = loss.losses_at(
        model, x, jnp.asarray(numbers["inputs/y"], jnp.int32), noise, numbers["inputs/t"], options
    )
    mse = found.final + 0.5 * found.auxiliary
    assert relative_error(mse, numbers["outputs/mse_plus_half_auxiliary"]) < 1e-5
    assert relative_error(found.cosine, numbers["outputs/cosine"]) < 1e-5
    np.testing.assert_allclose(found.total, mse + found.cosine, rtol=1e-6)


@pytest.fixture(scope="module")
def heads():
    final, auxiliary, target = jax.random.normal(jax.random.key(0), (3, 4, 2, 2, 3))
    return Heads(final, (auxiliary,)), target


def test_guided_target_moves_the_final_head_only(heads):
    prediction, target = heads
    options = loss.LossOptions(guided_target_scale=0.7)
    found = loss.losses_from(prediction, target, TIMES, options, 0.7)
    moved = target + 0.7 * (prediction.final - prediction.auxiliary[0])
    np.testing.assert_allclose(
        found.final, jnp.square(prediction.final - moved).mean((1, 2, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.auxiliary, jnp.square(prediction.auxiliary[0] - target).mean((1, 2, 3)), rtol=1e-5
    )

    def final_loss(prediction):
        return loss.losses_from(prediction, target, TIMES, options, 0.7).final.sum()

    gradient = jax.grad(final_loss)(prediction)
    # Stop-gradient: the auxiliary head feels nothing, the final head only its own residual.
    np.testing.assert_array_equal(gradient.auxiliary[0], 0)
    np.testing.assert_allclose(gradient.final, 2 * (prediction.final - moved) / 12, rtol=1e-4)


def test_omega_zero_is_the_plain_target(heads):
    prediction, target = heads
    guided = loss.losses_from(
        prediction, target, TIMES, loss.LossOptions(guided_target_scale=0.7), 0.0
    )
    plain = loss.losses_from(prediction, target, TIMES, loss.LossOptions(), 0.0)
    np.testing.assert_array_equal(guided.total, plain.total)


def test_auxiliary_weight_and_headless_network(heads):
    prediction, target = heads
    found = loss.losses_from(
        prediction, target, TIMES, loss.LossOptions(auxiliary_weight=0.25), 0.0
    )
    np.testing.assert_allclose(found.total, found.final + 0.25 * found.auxiliary, rtol=1e-6)
    alone = loss.losses_from(
        prediction.replace(auxiliary=()), target, TIMES, loss.LossOptions(), 0.0
    )
    np.testing.assert_array_equal(alone.auxiliary, 0)
    np.testing.assert_array_equal(alone.total, alone.final)


def test_several_heads_share_the_weight_and_the_first_is_the_weak_one(heads):
    prediction, target = heads
    other = prediction.auxiliary[0] * 2 + 1
    both = prediction.replace(auxiliary=(*prediction.auxiliary, other))
    options = loss.LossOptions(auxiliary_weight=0.25, guided_target_scale=0.7)
    found = loss.losses_from(both, target, TIMES, options, 0.7)
    first, second = (
        loss.losses_from(prediction.replace(auxiliary=(head,)), target, TIMES, options, 0.7)
        for head in both.auxiliary
    )
    np.testing.assert_allclose(found.auxiliary, (first.auxiliary + second.auxiliary) / 2, rtol=1e-6)
    np.testing.assert_allclose(found.total, found.final + 0.25 * found.auxiliary, rtol=1e-6)
    np.testing.assert_array_equal(found.final, first.final)


def test_label_dropout_rate():
    labels = jnp.arange(20_000) % 10
    dropped = loss.drop_labels(labels, jax.random.key(0), 0.1, 10)
    assert abs(float((dropped == 10).mean()) - 0.1) < 0.01
    np.testing.assert_array_equal(jnp.where(dropped == 10, labels, dropped), labels)


def test_random_losses_depend_on_the_key_alone():
    def network(x, t, y):
        return Heads(x * t[:, None, None, None], (x + y[:, None, None, None],))

    x = jnp.ones((8, 2, 2, 3))
    labels = jnp.arange(8)
    run = lambda key, **changes: loss.losses(  # noqa: E731
        network, x, labels, key, dataclasses.replace(loss.LossOptions(), **changes), 10
    )
    first, again = run(jax.random.key(1)), run(jax.random.key(1))
    np.testing.assert_array_equal(first.total, again.total)
    assert not np.array_equal(first.total, run(jax.random.key(2)).total)
    assert not np.array_equal(first.total, run(jax.random.key(1), times="lognormal").total)


def test_cosine_has_a_gradient_at_zero():
    """The final head starts at zero, and so does its output."""
    target = jax.random.normal(jax.random.key(0), (2, 2, 2, 3))
    gradient = jax.grad(lambda x: loss.cosine_distance(x, target).sum())(jnp.zeros_like(target))
    assert np.isfinite(gradient).all()
    # It points towards the target.
    assert float((gradient * target).sum()) < 0


def test_model_guidance_moves_the_target_away_from_the_null_label():
    """target + ω·sg(D_f(c) − D_f(∅)) (arXiv 2502.12154), the other heads keeping the plain one."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    noise = jax.random.normal(jax.random.key(1), x.shape)
    labels, t = jnp.array([1, 2, 4]), jnp.array([0.2, 0.5, 0.7])

    def network(x, t, y):
        return Heads(x * y[:, None, None, None], (x,))

    options = loss.LossOptions(guided_target="null", guided_target_scale=0.5, label_dropout=0.0)
    found = loss.losses_at(network, x, labels, noise, t, options, null_label=10)
    x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    final = x_t * labels[:, None, None, None]
    target = noise - x + 0.5 * (final - 10 * x_t)
    np.testing.assert_allclose(found.final, jnp.square(final - target).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        found.auxiliary, jnp.square(x_t - (noise - x)).mean((1, 2, 3)), rtol=1e-5
    )


def test_segmented_targets_take_the_null_label_in_the_middle_and_the_head_below(heads):
    """SGG's form (arXiv 2603.20584), in noise times, also where the path's own run backwards."""
    prediction, target = heads
    null = Heads(prediction.final * 2 + 1)
    for path, t in (("linear", TIMES), ("linear_reversed", 1 - TIMES)):
        options = loss.LossOptions(
            path=path, guided_target="segmented(low=0.1, high=0.5)", guided_target_scale=0.5
        )
        found = loss.losses_from(prediction, target, t, options, 0.5, lambda: null)
        gaps = [prediction.final - prediction.auxiliary[0], *[prediction.final - null.final] * 2, 0]
        for i, gap in enumerate(gaps):
            gap = gap[i] if i < 3 else 0.0
            error = jnp.square(prediction.final[i] - target[i] - 0.5 * gap).mean()
            np.testing.assert_allclose(found.final[i], error, rtol=1e-5)


def test_omega_grows_by_a_power_of_the_time_since_its_start():
    """ω·τ^α (arXiv 2603.20584), and at once where no growth is asked for."""
    grown = loss.LossOptions(
        guided_target_scale=0.3,
        guided_target_start=10,
        guided_target_warmup=20,
        guided_target_power=2.0,
    )
    steps = np.array([0, 10, 20, 30, 99])
    found = [float(grown.omega(jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(found, [0, 0, 0.3 * 0.25, 0.3, 0.3], rtol=1e-6)
    at_once = dataclasses.replace(grown, guided_target_warmup=0)
    np.testing.assert_allclose([float(at_once.omega(s)) for s in steps], [0, 0.3, 0.3, 0.3, 0.3])


def test_data_prediction_with_the_loss_measured_as_velocity():
    """RAEv2 (arXiv 2605.18324): both heads' x̂ become (x_t − x̂)/max(t, 0.05), and the data too."""
    x, noise = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 1))

    def network(x, t, y):
        return Heads(x * 0.5 + 1, (x * 0.3,))

    options = loss.LossOptions(prediction="data", weight="velocity", auxiliary_weight=1.0)
    found = loss.losses_at(network, x, jnp.arange(4), noise, TIMES, options)
    t = TIMES[:, None, None, None]
    x_t = (1 - t) * x + t * noise
    heads = network(x_t, None, None)
    for name, head in (("final", heads.final), ("auxiliary", heads.auxiliary[0])):
        velocity, target = ((x_t - v) / jnp.maximum(t, 0.05) for v in (head, x))
        expected = jnp.square(velocity - target).mean((1, 2, 3))
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4)
    np.testing.assert_allclose(found.total, found.final + found.auxiliary, rtol=1e-6)


@pytest.mark.parametrize("path", list(interpolant.INTERPOLANTS))
@pytest.mark.parametrize("prediction", interpolant.PREDICTIONS)
def test_errors_of_any_prediction_count_as_the_velocitys(path, prediction):
    """Away from the clamp, on every path: the weighted error is that of the velocity."""
    x, noise, wrong = jax.random.normal(jax.random.key(0), (3, 2, 2, 2, 1))
    t = jnp.array([0.4005, 0.6005])
    options = loss.LossOptions(path=path, prediction=prediction, weight="velocity(floor=0.001)")
    found = loss.losses_at(lambda *_: Heads(wrong), x, jnp.arange(2), noise, t, options)
    path = interpolant.get(path)
    x_t = interpolant.interpolate(path, x, noise, t)
    velocity = interpolant.velocity_from(path, prediction, wrong, x_t, t)
    target = interpolant.target(path, "velocity", x, noise, t)
    expected = jnp.square(velocity - target).mean((1, 2, 3))
    np.testing.assert_allclose(found.final, expected, rtol=5e-3)
