"""What the processes of a run tell each other: arrays, flags, and that they have come this far.

With one process all of it is free. Every process must make each of these calls.
"""

from __future__ import annotations

import jax
import numpy as np


def gather(array: np.ndarray) -> np.ndarray:
    """Stacks every process's array (…), all of one shape and type, into (P, …), bit for bit."""
    array = np.asarray(array, order="C")
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    # As bytes: JAX would round 64-bit numbers to 32 bits.
    words = array.reshape(-1).view(np.uint8)
    stacked = np.ascontiguousarray(multihost_utils.process_allgather(words))
    return stacked.view(array.dtype).reshape(jax.process_count(), *array.shape)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(gather(np.asarray(flag)).any())


def primary_says(flag: bool) -> bool:
    """The primary process's flag, on all of them: what it saw on disk decides for all."""
    return bool(gather(np.asarray(flag))[0])


def wait_for_all(name: str) -> None:
    """Waits until every process has come here, to a place of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def in_order(rows: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """Collects all processes' rows (n, …) into one (count, …) array by their `places` (n,).

    A process may have no rows, and then need not know their shape: it may give (0,).
    """
    width = int(gather(np.asarray(rows.ndim)).max())
    shapes = gather(np.asarray([*rows.shape, *[0] * (width - rows.ndim)], np.int64))
    share, *row = shapes.max(0)
    padded = np.zeros((share, *row), rows.dtype)
    if len(rows):
        padded[: len(rows)] = rows
    filled = np.full(share, -1, np.int64)
    filled[: len(rows)] = places
    filled, stacked = gather(filled), gather(padded)
    ordered = np.zeros((count, *row), rows.dtype)
    ordered[filled[filled >= 0]] = stacked[filled >= 0]
    return ordered
