"""The autoencoder's own behaviour: sizes, precision, batching and sharding (golden numbers are in
tests/convert/test_autoencoder.py, where the weights come from)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ig_jax.errors import InputError, NotFiniteError
from ig_jax.models import autoencoder as ae
from ig_jax.models import functional
from ig_jax.models.pixels import to_uint8
from tests.common import relative_error

SPEC = ae.AutoencoderSpec(
    width=8,
    multipliers=(1, 2),
    blocks_per_level=1,
    latent_channels=3,
    attention_levels=(1,),
    groups=4,
)


@pytest.fixture(scope="module")
def model() -> ae.Autoencoder:
    graphdef, shapes = functional.split(ae.abstract(SPEC))
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(leaf.shape[:-1])
        normal = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(normal / math.sqrt(fan_in) if leaf.ndim > 1 else 0.5 + 0.1 * normal)

    return functional.merge(graphdef, jax.tree.map(draw, shapes))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (11, 8, 12, 3)).astype(np.float32)


def mesh(data: int, fsdp: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"))


@pytest.fixture(scope="module")
def encoded(model: ae.Autoencoder, images: np.ndarray) -> ae.Moments:
    """The moments of all images from one device."""
    return ae.make_encoder(model, mesh(1, 1), batch_size=11)(images)


@pytest.fixture(scope="module")
def decoded(model: ae.Autoencoder, encoded: ae.Moments) -> np.ndarray:
    return ae.make_decoder(model, mesh(1, 1), batch_size=11)(encoded.mean)


def test_shapes_and_types(encoded: ae.Moments, decoded: np.ndarray) -> None:
    assert encoded.mean.shape == encoded.std.shape == (11, 4, 6, 3)
    assert decoded.shape == (11, 8, 12, 3)
    assert {encoded.mean.dtype, encoded.std.dtype, decoded.dtype} == {np.dtype("float32")}
    assert np.all(encoded.std > 0)


@pytest.mark.parametrize("batch_size", [16, 3])
def test_eight_devices_equal_one(
    model: ae.Autoencoder,
    images: np.ndarray,
    encoded: ae.Moments,
    decoded: np.ndarray,
    batch_size: int,
) -> None:
    # Eleven examples: a padded batch of 16, or (3 rounded up to the devices) a full batch of 8 and
    # a ragged one of 3.
    eight = mesh(4, 2)
    moments = ae.make_encoder(model, eight, batch_size=batch_size)(images)
    pictures = ae.make_decoder(model, eight, batch_size=batch_size)(encoded.mean)
    assert relative_error(moments.mean, encoded.mean) < 1e-6
    assert relative_error(moments.std, encoded.std) < 1e-6
    assert relative_error(pictures, decoded) < 1e-6


def test_batch_is_split_over_every_device(model: ae.Autoencoder, images: np.ndarray) -> None:
    shards = []

    class Probe(ae.Autoencoder):
        def encode(self, x: jax.Array) -> ae.Moments:
            jax.debug.inspect_array_sharding(x, callback=shards.append)
            return super().encode(x)

    graphdef, _ = functional.split(nnx.eval_shape(lambda: Probe(SPEC, rngs=nnx.Rngs(0))))
    _, params = functional.split(model)
    ae.make_encoder(functional.merge(graphdef, params), mesh(4, 2), batch_size=16)(images)
    assert shards[0].shard_shape((16, 8, 12, 3)) == (2, 8, 12, 3)


def test_uint8_in_and_out(model: ae.Autoencoder, images: np.ndarray, encoded, decoded) -> None:
    pixels = to_uint8(images).checked()
    encode = ae.make_encoder(model, mesh(1, 1), batch_size=11)
    from_pixels, from_floats = encode(pixels), encode(pixels / np.float32(127.5) - 1)
    assert relative_error(from_pixels.mean, from_floats.mean) < 1e-5
    decode = ae.make_decoder(model, mesh(1, 1), batch_size=11, uint8=True)
    pictures = decode(encoded.mean).checked()
    assert pictures.dtype == np.uint8
    expected = np.clip(127.5 * decoded + 128, 0, 255)
    assert np.max(np.abs(pictures - (expected - 0.5))) <= 0.5 + 1e-3
    broken = np.array(encoded.mean)
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(NotFiniteError, match=rf"1 of {len(broken)} pictures .*\(3\)"):
        decode(broken).checked()


def test_bfloat16_is_close(model: ae.Autoencoder, images: np.ndarray, encoded, decoded) -> None:
    _, params = functional.split(model)
    graphdef, _ = functional.split(ae.abstract(SPEC, jnp.bfloat16))
    half = functional.merge(graphdef, params)
    moments = ae.make_encoder(half, mesh(1, 1), batch_size=11)(images)
    pictures = ae.make_decoder(half, mesh(1, 1), batch_size=11)(encoded.mean)
    assert moments.mean.dtype == pictures.dtype == np.float32
    # bfloat16 has 8 bits: close to, and different from, float32.
    assert 1e-4 < relative_error(moments.mean, encoded.mean) < 3e-2
    assert 1e-4 < relative_error(pictures, decoded) < 3e-2


def test_log_variance_is_clipped(model: ae.Autoencoder) -> None:
    graphdef, params = functional.split(model)
    channels = SPEC.latent_channels
    bias = jnp.concatenate([jnp.zeros(channels), jnp.array([-1e3, 1e3, 0.0])])
    quant = {"kernel": jnp.zeros_like(params["quant"]["kernel"]), "bias": bias}
    clipped = functional.merge(graphdef, params | {"quant": quant})
    std = clipped.encode(jnp.zeros((1, 2, 2, 3))).std
    np.testing.assert_allclose(std[0, 0, 0], np.exp([-15.0, 10.0, 0.0]), rtol=1e-5)


def test_abstract_holds_shapes_only(model: ae.Autoencoder) -> None:
    graphdef, shapes = functional.split(ae.abstract(SPEC))
    expected_graphdef, params = functional.split(model)
    assert graphdef == expected_graphdef
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", list(ae.AUTOENCODERS))
def test_published_sizes(name: str) -> None:
    published = ae.AUTOENCODERS[name]
    model = ae.abstract(published.spec)
    latent = (1, 32, 32, 4) if name.startswith("sd") else (1, 16, 16, 32)

    def round_trip(model: ae.Autoencoder, images: jax.Array) -> tuple[ae.Moments, jax.Array]:
        moments = model.encode(images)
        return moments, model.decode(moments.mean)

    graphdef, params = functional.split(model)
    moments, images = jax.eval_shape(
        lambda params, images: round_trip(functional.merge(graphdef, params), images),
        params,
        jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),
    )
    assert moments.mean.shape == latent
    assert images.shape == (1, 256, 256, 3)
    assert published.spec.downsampling == 256 // latent[1]
    if name.startswith("sd"):
        assert (
            sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
        )  # as diffusers reports for SD's autoencoder
        assert (0.18215 - published.shift) / published.scale == pytest.approx(0.18215**2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multipliers": ()}, "multipliers: found none"),
        ({"groups": 3}, "8 channels does not split into 3 groups"),
        ({"attention_levels": (2,)}, "attention_levels: found 2, expected 0 to 1"),
    ],
)
def test_bad_spec(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SPEC, **change)


def test_bad_dtype() -> None:
    with pytest.raises(InputError, match="found float16, expected float32 or bfloat16"):
        ae.abstract(SPEC, jnp.float16)


@pytest.mark.parametrize("shape", [(2, 8, 9, 3), (2, 8, 8, 4), (8, 8, 3)])
def test_bad_images(model: ae.Autoencoder, shape: tuple[int, ...]) -> None:
    encode = ae.make_encoder(model, mesh(1, 1))
    with pytest.raises(InputError, match=r"expected \(batch, height, width, 3\).*multiples of 2"):
        encode(np.zeros(shape, np.float32))


def test_bad_latents(model: ae.Autoencoder) -> None:
    decode = ae.make_decoder(model, mesh(1, 1))
    with pytest.raises(InputError, match=r"found shape \(1, 4, 4, 8\).*width, 3\)"):
        decode(np.zeros((1, 4, 4, 8), np.float32))
