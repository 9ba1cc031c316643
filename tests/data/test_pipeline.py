import contextlib
import functools
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ig_jax.data import pipeline
from ig_jax.data.source import ArraySource, hold_out
from ig_jax.errors import InputError

COUNT = 103


class TwinSource:
    """Posteriors whose twins have the opposite sign; the label is the index."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        mean = np.full((2, 2, 1), index + 1, np.float32)
        return {
            "label": np.int32(index),
            "mean": mean,
            "std": 0 * mean,
            "mean_flip": -mean,
            "std_flip": 0 * mean,
        }


def pixels(count=COUNT):
    rows = np.arange(4, dtype=np.uint8)[None, None, :, None] * np.ones((count, 4, 1, 3), np.uint8)
    return ArraySource(rows, np.arange(count, dtype=np.int32))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.fixture(scope="module")
def whole():
    """Forty batches of one process: three epochs."""
    return take(pipeline.make_iterator(TwinSource(), batch_size=8, seed=3), 40)


def test_each_epoch_has_every_example_once_in_its_own_order(whole):
    labels = np.concatenate([batch["label"] for batch in whole])
    first, second = labels[:COUNT], labels[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert (first != second).mean() > 0.9
    assert abs(np.diff(first)).mean() > COUNT / 6  # a global shuffle, 1/3 expected
    assert whole[0]["label"].dtype == np.int32 and whole[0]["mean"].shape == (8, 2, 2, 1)


def test_another_seed_is_another_order(whole):
    other = next(pipeline.make_iterator(TwinSource(), batch_size=8, seed=4))
    assert (other["label"] != whole[0]["label"]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_contiguous_slices_of_the_same_batches(whole, processes):
    parts = [
        take(
            pipeline.make_iterator(
                TwinSource(), batch_size=8, seed=3, process_index=p, process_count=processes
            ),
            40,
        )
        for p in range(processes)
    ]
    joined = [
        {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
        for shares in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_state_resumes_at_the_exact_example(whole):
    iterator = pipeline.make_iterator(TwinSource(), batch_size=8, seed=3)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = pipeline.make_iterator(TwinSource(), batch_size=8, seed=3)
    fresh.set_state(state)
    assert_same(take(fresh, 20), whole[7:27])
    fresh.set_state({"step": 2})  # also backwards, in a stream that has begun
    assert_same(take(fresh, 3), whole[2:5])


def test_examples_in_memory_are_read_batch_by_batch(monkeypatch):
    """Every epoch in its own order, the same batches for processes and workers and when resumed."""
    make = functools.partial(pipeline.make_iterator, pixels(), batch_size=8, seed=3)
    whole = take(make(), 40)
    labels = np.concatenate([batch["label"] for batch in whole])
    first, second = labels[:COUNT], labels[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert (first != second).mean() > 0.9
    assert (take(make(seed=4), 1)[0]["label"] != whole[0]["label"]).any()
    assert whole[0]["x"].shape == (8, 4, 4, 3) and whole[0]["x"].dtype == np.uint8
    halves = [take(make(process_index=p, process_count=2), 40) for p in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, whole)
    resumed = make(num_workers=2)
    resumed.set_state({"step": 11})
    assert_same(take(resumed, 20), whole[11:31])
    resumed.close()
    # Reading them one by one is what takes the time.
    monkeypatch.setattr(
        ArraySource,
        "__getitem__",
        lambda self, index: pytest.fail("one by one") if np.ndim(index) == 0 else {"x": index},
    )
    assert len(next(make())["x"]) == 8


def test_worker_processes_change_nothing_and_may_differ_after_a_restart(whole):
    iterator = pipeline.make_iterator(TwinSource(), batch_size=8, seed=3, num_workers=2)
    iterator.set_state({"step": 5})
    assert_same(take(iterator, 9), whole[5:14])
    assert iterator.get_state() == {"step": 14}
    iterator.close()


def test_twins_are_used_half_the_time_and_vary_over_epochs(whole):
    mean = np.concatenate([batch["mean"] for batch in whole])[:, 0, 0, 0]
    labels = np.concatenate([batch["label"] for batch in whole])
    np.testing.assert_array_equal(abs(mean), labels + 1)
    assert 0.4 < (mean < 0).mean() < 0.6
    first, second = (mean[i * COUNT : (i + 1) * COUNT] for i in range(2))
    flipped = [
        set(labels[i * COUNT : (i + 1) * COUNT][part < 0]) for i, part in enumerate((first, second))
    ]
    assert len(flipped[0] ^ flipped[1]) > COUNT / 4


def test_mirrored_pixels():
    batch = next(pipeline.make_iterator(pixels(), batch_size=64, seed=0, flip=True))
    mirrored = batch["x"][:, 0, 0, 0] == 3
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(
        batch["x"][mirrored], pixels().x[:1][:, :, ::-1].repeat(mirrored.sum(), 0)
    )
    plain = next(pipeline.make_iterator(pixels(), batch_size=64, seed=0))
    assert (plain["x"][:, 0, 0, 0] == 0).all()


def test_one_pass_in_order_keeps_the_last_batch():
    parts = [list(pipeline.epoch_batches(pixels(10), 4, p, 2)) for p in range(2)]
    assert [batch["label"].tolist() for batch in parts[0]] == [[0, 1, 2, 3], [8, 9]]
    assert [batch["label"].tolist() for batch in parts[1]] == [[4, 5, 6, 7]]


def test_device_prefetch_hands_out_the_state_of_its_batch(whole):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    iterator = pipeline.make_iterator(TwinSource(), batch_size=8, seed=3)
    prefetch = pipeline.DevicePrefetch(iterator, sharding)
    batches = take(prefetch, 5)
    assert_same([jax.device_get(batch) for batch in batches], whole[:5])
    assert batches[0]["mean"].sharding == sharding
    assert iterator.get_state()["step"] > 5
    resumed = pipeline.make_iterator(TwinSource(), batch_size=8, seed=3)
    resumed.set_state(prefetch.state)
    assert_same(take(resumed, 1), whole[5:6])


def test_model_input_samples_the_posterior():
    mean = np.broadcast_to(np.array([1.0, -2.0], np.float32), (64, 16, 16, 2))
    batch = {"mean": mean, "std": np.full_like(mean, 0.5)}
    scale, shift = np.array([2.0, 4.0]), np.array([1.0, 0.0])
    call = jax.jit(lambda key: pipeline.model_input(batch, key, shift=shift, scale=scale))
    x = np.asarray(call(jax.random.key(0)))
    assert x.dtype == np.float32 and x.shape == mean.shape
    np.testing.assert_allclose(x.mean((0, 1, 2)), [0, -0.5], atol=0.01)
    np.testing.assert_allclose(x.std((0, 1, 2)), [0.25, 0.125], rtol=0.02)
    assert not np.array_equal(x, call(jax.random.key(1)))


def test_model_input_of_pixels():
    x = pipeline.model_input(
        {"x": np.array([0, 51, 255], np.uint8)[:, None, None, None]},
        jax.random.key(0),
        shift=np.zeros(1),
        scale=np.ones(1),
    )
    np.testing.assert_allclose(np.ravel(x), [-1, -0.6, 1], rtol=1e-6)


def test_held_out_examples_are_fixed_and_apart():
    train, validation = hold_out(pixels(), 20)
    labels = [[int(part[i]["label"]) for i in range(len(part))] for part in (train, validation)]
    assert [len(part) for part in labels] == [COUNT - 20, 20]
    assert sorted(labels[0] + labels[1]) == list(range(COUNT))
    assert [int(e["label"]) for e in hold_out(pixels(), 20)[1]] == labels[1]
    assert hold_out(pixels(), 0)[1] is None


def test_bad_input():
    with pytest.raises(InputError, match=r"num_validation is 103: expected 0…102"):
        hold_out(pixels(), COUNT)
    with pytest.raises(InputError, match="batch_size is 8: expected a multiple of .*, 3"):
        pipeline.make_iterator(pixels(), batch_size=8, seed=0, process_count=3)
    with pytest.raises(InputError, match="the data set is empty"):
        pipeline.make_iterator(pixels(0), batch_size=8, seed=0)


@pytest.mark.parametrize("spare,workers,fits", [(0, 2, True), (-1, 2, False), (-1, 0, True)])
def test_too_little_shared_memory_is_said_before_workers_start(monkeypatch, spare, workers, fits):
    """Containers have 64 MiB by default; a worker that finds it full is killed by a signal."""
    example = 2 * 4 * 4 + 4  # mean, std and label; of twins one is chosen
    free = (2 * 6 + 4) * 8 * example + spare
    usage = pipeline.shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "SHARED_MEMORY", "/")
    make = functools.partial(pipeline.make_iterator, TwinSource(), batch_size=8, seed=0)
    if fits:
        make(num_workers=workers)
        return
    with pytest.raises(InputError, match="config.data.num_workers is 2: .* MiB free: expected few"):
        make(num_workers=workers)


KILLED = """
import multiprocessing, os, signal, sys, threading, time
import numpy as np
from ig_jax.data import pipeline
from ig_jax.data.source import ArraySource

if __name__ == "__main__":
    source = ArraySource(np.zeros((64, 4, 4, 1), np.uint8), np.arange(64, dtype=np.int32))
    batches = pipeline.make_iterator(source, batch_size=8, seed=0, num_workers=2)
    first = threading.Thread(target=next, args=[batches])
    first.start()
    if sys.argv[1] == "running":
        first.join()
    while len(workers := [child.pid for child in multiprocessing.active_children()]) < 2:
        time.sleep(0.001)
    for pid in workers:  # as Ctrl-C at a terminal does
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    first.join()
    for _ in range(32):
        next(batches)
    print(*workers, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "running"])
def test_workers_end_with_the_process_that_is_killed_and_not_before(tmp_path, when):
    (tmp_path / "killed.py").write_text(KILLED)
    child = subprocess.Popen([sys.executable, tmp_path / "killed.py", when], stdout=subprocess.PIPE)
    try:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(runs, workers))
    finally:
        child.kill()
    deadline = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, workers))


def runs(pid):
    """Whether a process is there, and no zombie that nobody waits for."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False
