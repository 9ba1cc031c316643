"""What processes tell each other, with threads in the place of processes."""

import threading
from concurrent import futures

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ig_jax.parallel import hosts


@pytest.fixture
def together(monkeypatch):
    """Runs a function as each of two processes at once: `together(f)` gives [f(0), f(1)]."""
    barrier, handed = threading.Barrier(2, timeout=60), [None, None]
    own = threading.local()

    def allgather(array):
        handed[own.index] = array
        barrier.wait()
        stacked = np.stack(handed)
        barrier.wait()
        return stacked

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)

    def run(function):
        def as_process(index):
            own.index = index
            return function(index)

        with futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_process, range(2)))

    return run


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8, bool])
def test_gathered_bit_for_bit(together, dtype):
    """JAX alone would round 64-bit numbers to 32 bits."""
    rows = np.asarray([[1 + 2**-40, 0, 3], [5, 7, 2**-50]]).astype(dtype)
    for found in together(lambda i: hosts.gather(rows[i])):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, rows)
    assert together(lambda i: hosts.gather(np.asarray(i)).tolist()) == [[0, 1]] * 2


def test_flags(together):
    assert together(lambda i: hosts.anywhere(i == 1)) == [True, True]
    assert together(lambda i: hosts.anywhere(False)) == [False, False]
    assert together(lambda i: hosts.primary_says(i == 0)) == [True, True]
    assert together(lambda i: hosts.primary_says(i == 1)) == [False, False]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 1)])
def test_rows_in_order(together, shape):
    """Ten rows in batches of four over two processes, the last batch not filled."""
    rows = np.arange(10 * int(np.prod(shape))).reshape(10, *shape).astype(np.float32)
    places = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7])
    for found in together(lambda i: hosts.in_order(rows[places[i]], places[i], 10)):
        np.testing.assert_array_equal(found, rows)


def test_a_process_without_rows_need_not_know_their_shape(together):
    rows = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    mine = [(np.zeros(0, np.uint8), []), (rows, [2, 0, 1])]
    for found in together(lambda i: hosts.in_order(*mine[i], 3)):
        np.testing.assert_array_equal(found, rows[[1, 2, 0]])


def test_alone():
    rows = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(hosts.gather(rows), rows[None])
    np.testing.assert_array_equal(hosts.in_order(rows, [2, 1, 0], 3), rows[::-1])
    assert hosts.anywhere(True) and not hosts.primary_says(False)
    hosts.wait_for_all("anywhere")
