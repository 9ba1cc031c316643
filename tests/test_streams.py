import jax
import numpy as np

from ig_jax.streams import numpy_stream, stream

NAMES = ("initialisation", "training", "posterior", "loss", "validation", "sampling")


def numbers(key):
    return jax.random.key_data(key).tolist()


def test_every_name_and_seed_has_a_stream_of_its_own():
    keys = [numbers(stream(seed, name)) for seed in (0, 1, 2**32 - 1) for name in NAMES]
    keys += [numbers(stream(stream(0, "training"), name)) for name in NAMES]
    # What others fold in, such as steps and sample indices, is no name's number.
    keys += [numbers(jax.random.fold_in(jax.random.key(0), i)) for i in range(100)]
    assert len({tuple(key) for key in keys}) == len(keys)
    draws = [numpy_stream(seed, name).integers(10**9) for seed in (0, 1) for name in NAMES]
    assert len(set(draws)) == len(draws)


def test_a_stream_is_the_same_everywhere():
    """In any process, and whether the seed is a number or a traced array."""
    expected = jax.random.fold_in(jax.random.key(7), np.uint32(0xD5128A8F))
    assert numbers(stream(7, "training")) == numbers(expected)
    traced = jax.jit(lambda seed: jax.random.key_data(stream(seed, "training")))
    assert traced(np.uint32(7)).tolist() == numbers(expected)
    assert numpy_stream(7, "labels").integers(10**9) == numpy_stream(7, "labels").integers(10**9)
