"""Random streams by name: every use of a run's seed draws from a stream of its own, so that no two
uses ever share a key, whatever they fold into theirs."""

from __future__ import annotations

import zlib

import jax
import numpy as np


def stream(seed: int | jax.Array, name: str) -> jax.Array:
    """The key of one use of a seed.

    Args:
        seed: a run's seed, () uint32 and perhaps traced, or a key of a stream to divide further.
        name: of the use, such as "training".

    Returns:
        A key, () of JAX's key dtype; fold a step or a sample index into it.
    """
    is_key = isinstance(seed, jax.Array) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key)
    key = seed if is_key else jax.random.key(seed)
    return jax.random.fold_in(key, np.uint32(_number(name)))


def numpy_stream(seed: int, name: str) -> np.random.Generator:
    """A NumPy generator for one use of a seed on the host."""
    return np.random.default_rng([seed, _number(name)])


def _number(name: str) -> int:
    """32 bits that stand for a name, the same in every process and version of Python."""
    return zlib.crc32(name.encode())
