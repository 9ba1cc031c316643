"""From floats to pixels and back: the releases' rounding rule, and numbers that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.errors import InputError, NotFiniteError
from ig_jax.models import pixels


def test_the_releases_rule():
    x = np.array([-1.5, -1, -1 + 1.4 / 127.5, 0.0, 1, 2], np.float32)[:, None]
    expected = [0, 0, 1, 128, 255, 255]
    for convert in (pixels.to_uint8, jax.jit(pixels.to_uint8)):
        found = convert(x).checked()
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[:, 0], expected)
    # bfloat16 has too few digits to round in.
    half = jnp.asarray(x, jnp.bfloat16)
    as_float = pixels.to_uint8(half.astype(jnp.float32)).values
    np.testing.assert_array_equal(pixels.to_uint8(half).values, as_float)


def test_round_trip_is_exact():
    every = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(pixels.to_uint8(pixels.from_uint8(every)).checked(), every)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("convert", [pixels.to_uint8, jax.jit(pixels.to_uint8)])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_named(bad, convert):
    x = np.zeros((8, 2, 2, 1), np.float32)
    x[[1, 6], 0, 1] = bad
    found = convert(x)
    assert np.asarray(found.finite).tolist() == [i not in (1, 6) for i in range(8)]
    with pytest.raises(NotFiniteError, match=r"^2 of 8 pictures are not finite \(1, 6\): expected"):
        found.checked()
    with pytest.raises(NotFiniteError, match=r"pictures at IG 9 are not finite \(11, 16\)"):
        found.checked(10 + np.arange(8), " at IG 9")
    with pytest.raises(NotFiniteError, match=r"8 of 8 .*\(0, 1, 2, 3, 4, …\)"):
        convert(np.full_like(x, bad)).checked()


def test_pixels_are_not_rounded_twice():
    with pytest.raises(InputError, match="pictures are uint8: expected floats"):
        pixels.to_uint8(np.zeros((1, 2, 2, 1), np.uint8))
