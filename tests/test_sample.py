"""The library face: lazy names, and sampling as other people's programs call it."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import ig_jax
from ig_jax.diffusion import interpolant, samplers
from ig_jax.errors import InputError, NotFiniteError
from ig_jax.models import functional
from ig_jax.models.autoencoder import AutoencoderSpec
from ig_jax.models.pixels import to_uint8
from ig_jax.parallel import sharding
from ig_jax.sampling import sample
from ig_jax.sampling.engine import Engine, Settings
from tests.common import relative_error
from tests.release import random_weights, release_shapes

STEPS = dict(sampler="euler", num_steps=3)
SHAPE = dict(width=32, depth=2, heads=2, patch=2, channels=4, tokens=16, classes=10)


def model_with(**changes):
    lightning = changes.get("lightning", False)
    shapes = release_shapes(**SHAPE | changes)
    auxiliary = 1 if changes.get("auxiliary", True) else None
    # The position table is one of the random weights: it is as large as the others.
    return ig_jax.from_pytorch(
        random_weights(shapes),
        heads=2,
        auxiliary_depth=auxiliary,
        family="lightningdit" if lightning else "sit",
    )


@pytest.fixture(scope="module")
def model():
    return model_with()


def draw(model, labels=(1, 2, 3), scale=1.0, **options):
    guidance = ig_jax.Guidance(scale)
    return ig_jax.sample(model, list(labels), guidance=guidance, **STEPS | options)


def test_importing_costs_nothing():
    code = (
        "import sys, ig_jax; assert 'jax' not in sys.modules, 'jax'; "
        "assert set(ig_jax.__all__) <= set(dir(ig_jax)); ig_jax.sample; ig_jax.from_pretrained; "
        "print([m for m in ('orbax', 'grain', 'tensorflow', 'torch', 'huggingface_hub', 'sklearn')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_is_there_for_programs_and_for_type_checkers():
    for name in ig_jax.__all__:
        assert getattr(ig_jax, name).__name__ == name
    assert [name for name in dir(ig_jax) if name != "__version__"] == sorted(ig_jax.__all__)
    with pytest.raises(AttributeError, match="'smaple'"):
        ig_jax.smaple  # noqa: B018
    tree = ast.parse(pathlib.Path(ig_jax.__file__).read_text())
    imports = {
        (node.module.removeprefix("ig_jax."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ig_jax.")
        for alias in node.names
    }
    table = {(module, name) for module, names in ig_jax._MODULES.items() for name in names}
    assert imports == table and {name for _, name in table} == set(ig_jax.__all__)


def test_samples_are_those_of_the_sampling_mode(model):
    graphdef, params = functional.split(model)
    settings = Settings(
        graphdef=graphdef,
        path=interpolant.get("linear"),
        prediction="velocity",
        null_label=10,
        heads=1,
        shape=(8, 8, 4),
        sampler=samplers.make("euler_maruyama"),
        num_steps=4,
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    engine = Engine(settings, batch_size=3, mesh=mesh)
    guidance = ig_jax.Guidance(1.7, cfg_scale=1.5, cfg_interval=(0.0, 0.6))
    labels = np.array([4, 5, 6, 7, 8])
    expected = engine.draw(params, guidance, 3, np.arange(5), labels)
    found = ig_jax.sample(
        model, labels, guidance=guidance, sampler="euler_maruyama", num_steps=4, seed=3
    )
    assert found.dtype == jnp.float32
    assert relative_error(found, expected) < 1e-5


def test_sample_i_depends_on_seed_and_index_alone(model):
    x = draw(model, [1, 2, 3], scale=1.5)
    assert relative_error(draw(model, [2, 3, 4], scale=1.5, first_index=1)[:2], x[1:]) < 1e-5
    assert relative_error(draw(model, [2], scale=1.5, first_index=1), x[1:2]) < 1e-5
    assert relative_error(draw(model, [1, 2, 3], scale=1.5, seed=1), x) > 0.1


def test_guidance_acts_and_does_not_recompile(model):
    draw(model, scale=1.1)
    compiled = sample._draw._cache_size()
    plain, guided, weak = (draw(model, scale=w) for w in (1.0, 2.0, 0.0))
    draw(model, scale=np.float32(1.3), labels=(7, 8, 9), seed=5)
    assert sample._draw._cache_size() == compiled
    assert relative_error(guided, plain) > 1e-2 and relative_error(weak, plain) > 1e-2
    assert relative_error(ig_jax.sample(model, [1, 2, 3], **STEPS), plain) == 0
    off = ig_jax.sample(model, [1, 2, 3], guidance=ig_jax.Guidance(2.0, (0.99, 0.995)), **STEPS)
    assert relative_error(off, plain) < 1e-6


def test_inside_other_peoples_jit(model):
    @jax.jit
    def program(scale, seed, labels, first_index):
        guidance = ig_jax.Guidance(scale, cfg_scale=scale)
        decoder = ig_jax.Decoder(Doubling())
        options = dict(seed=seed, first_index=first_index, decoder=decoder, **STEPS)
        return ig_jax.sample(model, labels, guidance=guidance, **options)

    found = program(1.5, 7, jnp.array([1, 2]), 3)
    guidance = ig_jax.Guidance(1.5, cfg_scale=1.5)
    eager = ig_jax.sample(model, [1, 2], guidance=guidance, seed=7, first_index=3, **STEPS)
    pictures = np.asarray(ig_jax.Decoder(Doubling())(eager), int)
    assert found.dtype == jnp.uint8
    assert np.abs(np.asarray(found, int) - pictures).max() <= 1


def test_scales_can_be_differentiated(model):
    def size(w):
        return jnp.square(draw(model, scale=w)).mean()

    low, high = (float(size(w)) for w in (1.4, 1.6))
    assert float(jax.grad(size)(1.5)) == pytest.approx((high - low) / 0.2, rel=0.05)


def test_trajectory_goes_from_the_noise_to_the_sample(model):
    found = draw(model, trajectory=True)
    assert isinstance(found, ig_jax.Samples)
    assert found.trajectory.shape == (4, 3, 8, 8, 4)
    np.testing.assert_allclose(found.times, [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    np.testing.assert_array_equal(found.trajectory[-1], found.samples)
    assert abs(float(found.trajectory[0].std()) - 1) < 0.1
    assert relative_error(draw(model), found.samples) < 1e-6


def test_autoguidance_takes_another_network(model):
    weak = model_with(depth=1, auxiliary=False)
    guidance = ig_jax.Guidance(2.0, weak=weak)
    headless = model_with(auxiliary=False)
    found = ig_jax.sample(headless, [1, 2, 3], guidance=guidance, **STEPS)
    plain = ig_jax.sample(headless, [1, 2, 3], **STEPS)
    assert relative_error(found, plain) > 1e-2
    function = ig_jax.Guidance(2.0, weak=lambda x, t, y: weak(x, t, y))
    same = ig_jax.sample(headless, [1, 2, 3], guidance=function, **STEPS)
    assert relative_error(same, found) < 1e-5


def test_lightningdit_runs_its_recipe_on_its_own_path():
    light = model_with(lightning=True, patch=1, tokens=16)
    found = ig_jax.sample(light, [1], num_steps=4, trajectory=True)
    # Four grid points, noise at 0, and a time shift of 0.3.
    grid = np.linspace(0, 1, 4)
    np.testing.assert_allclose(found.times, 0.3 * grid / (1 - 0.7 * grid), atol=1e-6)


class Doubling(nnx.Module):
    """Stands in for an autoencoder: pictures twice as large as latents."""

    def __init__(self):
        self.spec = AutoencoderSpec(latent_channels=4)

    def decode(self, latents):
        return jnp.repeat(jnp.repeat(latents[..., :3], 2, axis=1), 2, axis=2)


def test_decoder_undoes_the_normalisation():
    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 4))
    shift, scale = np.arange(4) / 10, np.full(4, 0.5)
    found = ig_jax.Decoder(Doubling(), shift, scale)(x)
    assert found.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(found[:, ::2, ::2], to_uint8((x * scale + shift)[..., :3]).values)
    pixels = ig_jax.Decoder()(jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1))
    assert pixels.ravel().tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(InputError, match=r"latents to decode: found shape \(5, 4, 4, 3\)"):
        ig_jax.Decoder(Doubling())(x[..., :3])
    with pytest.raises(InputError, match=r"pixels to show: found shape \(5, 4, 4, 4\), expected 1"):
        ig_jax.Decoder()(x)


def test_decoder_refuses_what_is_not_finite():
    latents = np.zeros((3, 4, 4, 4), np.float32)
    latents[1, 0, 0, 0] = np.nan
    for decoder, channels in ((ig_jax.Decoder(), 3), (ig_jax.Decoder(Doubling()), 4)):
        x = latents[..., :channels]
        with pytest.raises(NotFiniteError, match=r"1 of 3 pictures are not finite \(1\)"):
            decoder(x)
        # Inside `jit` JAX's own way to raise is to be asked for.
        error, pictures = jax.jit(checkify.checkify(decoder))(x)
        assert pictures.dtype == np.uint8 and "not finite" in error.get()
        assert jax.jit(decoder)(x).dtype == np.uint8


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(labels=[3, 11]), "label 11 is out of range: expected 0…10"),
        (dict(labels=[-1]), "label -1 is out of range"),
        (dict(labels=[0.5]), r"labels are float64 of shape \(1,\): expected \(B,\) integers"),
        (dict(labels=3), r"of shape \(\): expected"),
        (dict(labels=[]), r"of shape \(0,\): expected"),
        (dict(sampler="huen"), "did you mean heun"),
        (dict(num_steps=0), "num_steps is 0: expected 1…100000"),
        (dict(time_shift=0.0), "time_shift is 0.0: expected 0.001…1000"),
        (dict(path="liner"), "did you mean linear"),
        (dict(prediction="score"), "expected one of velocity, noise, data"),
        (dict(seed=-1), "seed is -1: expected 0…4294967295"),
        (dict(seed=jax.random.key(0)), r"seed is an array of key<fry> of shape \(\): .*no key of"),
        (dict(seed=jax.random.PRNGKey(0)), r"seed is an array of uint32 of shape \(2,\): expected"),
        (dict(guidance=1.5), r"guidance is 1.5: expected ig_jax.Guidance\(ig_scale=…\)"),
        (dict(decoder="sd-vae"), "decoder is 'sd-vae': expected ig_jax.Decoder"),
        (dict(sampler="dopri5", trajectory=True), "adaptive sampler has no fixed grid"),
    ],
)
def test_bad_input_gets_one_line(model, options, message):
    options = dict(labels=[1]) | STEPS | options
    with pytest.raises(InputError, match=message) as caught:
        ig_jax.sample(model, options.pop("labels"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", ["sit-xl-2-ig", None, lambda x, t, y: x])
def test_what_is_no_network_gets_one_line(found):
    with pytest.raises(InputError, match="model is .*: expected a network, such as load_workdir"):
        ig_jax.sample(found, [1])


def test_what_a_model_cannot_do_is_refused():
    headless = model_with(auxiliary=False)
    with pytest.raises(InputError, match="needs auxiliary head 0 .*no auxiliary head"):
        draw(headless, scale=1.4)
    with pytest.raises(InputError, match="needs auxiliary head 0"):
        jax.jit(lambda w: draw(headless, scale=w))(1.0)
    assert draw(headless, scale=1.0).shape == (3, 8, 8, 4)
    with pytest.raises(InputError, match="sampler is 'reuse': expected a model with an auxiliary"):
        ig_jax.sample(headless, [1], sampler="reuse")
    unconditional = model_with(classes=0)
    with pytest.raises(InputError, match="null label ∅: this model is unconditional"):
        ig_jax.sample(unconditional, [0], guidance=ig_jax.Guidance(cfg_scale=2.0), **STEPS)
    assert draw(unconditional, [0, 0]).shape == (2, 8, 8, 4)
