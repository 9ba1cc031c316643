"""From a data source to batches on devices: one resumable Grain pipeline for training, one in-order
pass for evaluation, prefetch to devices, and the pure function that turns a batch into model input.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from ig_jax.data.source import ArraySource, Example, RandomAccess, where
from ig_jax.errors import InputError
from ig_jax.streams import numpy_stream

Batch = dict[str, np.ndarray]

# Where workers leave batches for this process to pick up (Linux).
SHARED_MEMORY = "/dev/shm"
# Batches there at a time, counted: of each worker, and held by this process.
_SHARED_BATCHES = (6, 4)


def _choose_twin(example: Example, rng: np.random.Generator, flip: bool) -> Example:
    """Picks the stored mirrored twin half the time, or mirrors pixels if `flip`."""
    chosen = {k: v for k, v in example.items() if not k.endswith("_flip")}
    has_twin = len(chosen) < len(example)
    if (has_twin or flip) and rng.integers(2):
        for name in chosen:
            if name != "label":
                # Contiguous, or the batch might not be, which Grain's workers do not share.
                chosen[name] = (
                    example[f"{name}_flip"]
                    if has_twin
                    else np.ascontiguousarray(chosen[name][:, ::-1])
                )
    return chosen


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's examples, (count,)."""
    return numpy_stream(seed, f"order of epoch {epoch}").permutation(count)


@dataclasses.dataclass(frozen=True)
class _WholeBatches:
    """Shuffled batches of examples in memory; item k is one process's share of global batch k.

    A batch is one array operation, where Grain calls Python for each example, which takes longer
    than to train a small network on it.

    Attributes:
        source: the examples.
        seed: of the order; every epoch has its own.
        batch_size: of the global batch.
        rows: first and last (exclusive) of its examples that are this process's.
    """

    source: ArraySource
    seed: int
    batch_size: int
    rows: tuple[int, int]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        count = len(self.source)
        epochs, places = np.divmod(index * self.batch_size + np.arange(*self.rows), count)
        orders = [
            _epoch_order(self.seed, int(epoch), count)[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return self.source[np.concatenate(orders)]


def _follow_parent(worker: int, workers: int) -> None:
    """Makes this worker process end when the one that started it does, and not before.

    Grain stops its workers when it is closed, and never when it is killed. Signals to a whole group
    (Ctrl-C at a terminal, SIGTERM from Slurm) are the parent's to answer: it still needs batches.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _signals_are_for_parents() -> Iterator[None]:
    """Processes and threads started by this thread meanwhile get no SIGINT and no SIGTERM.

    A worker imports for seconds before `_follow_parent` runs in it. The other threads here go on
    taking its signals, so that their handlers are called.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Starting this helper of multiprocessing would unblock both signals.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class BatchIterator:
    """Endless batches of one process; its state is the number of batches handed out.

    Grain's own iterator states depend on the number of worker processes. This one moves the whole
    Grain pipeline to a step instead, so a run may be resumed with other workers or processes.

    Args:
        batches: item k is this process's share of global batch k.
        num_workers: worker processes; 0 reads in threads of this one.
    """

    def __init__(self, batches: grain.MapDataset, num_workers: int):
        self._batches = batches
        self._num_workers = num_workers
        self._step = 0
        self._stream: grain.DatasetIterator | None = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._start()
            # The first batch is what makes Grain start its workers.
            with _signals_are_for_parents() if self._num_workers else contextlib.nullcontext():
                batch = next(self._stream)
        else:
            batch = next(self._stream)
        self._step += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        stream = self._batches[self._step :].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # in a notebook or a library; Grain reads flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=2
                ),
                worker_init_fn=_follow_parent,
            )
        return iter(stream)

    def get_state(self) -> dict[str, int]:
        """`{"step": batches handed out}`, the same on every process."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after `state["step"]` batches."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops threads and worker processes; reading on starts them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def make_iterator(
    source: RandomAccess,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    flip: bool = False,
) -> BatchIterator:
    """Endless shuffled batches whose content depends on (seed, step) alone.

    Every epoch has an order of its own. Process p of P reads the p-th contiguous slice of each
    global batch and nothing else, so the global batch is the same for any P. `get_state()` is
    small, JSON and the same on all processes; `set_state()` resumes at the exact example.

    Args:
        source: examples.
        batch_size: global batch size, a multiple of `process_count`.
        seed: of the order and of every per-example choice.
        process_index, process_count: which share to read.
        num_workers: worker processes; 0 reads in threads of this one.
        flip: mirror pixels half the time. Stored twins are always used half the time.

    Returns:
        An iterator of dicts of (batch_size / process_count, …) arrays.

    Raises:
        InputError: an empty source, a batch that does not divide among the processes, or too
            little shared memory for the workers, which would be killed without a word.
    """
    if len(source) == 0:
        raise InputError("the data set is empty: expected at least one example")
    if batch_size % process_count:
        raise InputError(
            f"config.train.batch_size is {batch_size}: expected a multiple of the number of "
            f"processes, {process_count}"
        )
    share = batch_size // process_count
    if num_workers:
        _check_shared_memory(source[0], share, num_workers)
    if isinstance(source, ArraySource) and not flip:
        rows = (process_index * share, (process_index + 1) * share)
        batches = _WholeBatches(source, seed, batch_size, rows)
        return BatchIterator(grain.MapDataset.source(batches), num_workers)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if flip or any(name.endswith("_flip") for name in source[0]):  # else a third slower in vain
        dataset = dataset.random_map(functools.partial(_choose_twin, flip=flip))
    # Per-process batches first, then every P-th of them: concatenated over the processes they are
    # the batches of one process.
    shares = dataset.batch(share)
    return BatchIterator(shares[process_index::process_count], num_workers)


@dataclasses.dataclass(frozen=True)
class _Indices:
    """A source whose examples are their own indices."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return {"x": index}


def first_not_finite(
    source: RandomAccess, *, batch_size: int, seed: int, flip: bool, step: int
) -> str:
    """Looks for an example with a value that is not finite in the batch of a training step.

    Args:
        source: of the training.
        batch_size, seed, flip: as `make_iterator` has them.
        step: the first is 1.

    Returns:
        Which example it is, and of which file; empty if all are finite.
    """
    count = len(source)
    in_memory = isinstance(source, ArraySource) and not flip  # which have an order of their own
    numbers = ArraySource(*[np.arange(count)] * 2) if in_memory else _Indices(count)
    order = make_iterator(numbers, batch_size=batch_size, seed=seed)
    order.set_state({"step": step - 1})
    with contextlib.closing(order):
        indices = next(order)["x"].tolist()
    for index in indices:
        for name, value in source[index].items():
            if not np.isfinite(value).all():
                return f"{name} of {where(source, index)} is not finite in the data"
    return ""


def _check_shared_memory(example: Example, share: int, num_workers: int) -> None:
    if not os.path.isdir(SHARED_MEMORY):
        return
    kept = [v for name, v in example.items() if not name.endswith("_flip")]
    each, here = _SHARED_BATCHES
    need = (num_workers * each + here) * share * sum(np.asarray(v).nbytes for v in kept)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < need:
        raise InputError(
            f"config.data.num_workers is {num_workers}: their batches need about "
            f"{need / 2**20:,.0f} MiB of shared memory, {SHARED_MEMORY} has {free / 2**20:,.0f} "
            "MiB free: expected fewer workers (0: threads of this process), or a larger "
            f"{SHARED_MEMORY} (docker run --shm-size=…)"
        )


def epoch_batches(
    source: RandomAccess, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """One pass in order; process p reads every P-th batch; the last one may be smaller."""
    dataset = grain.MapDataset.source(source).batch(batch_size, drop_remainder=False)
    yield from dataset[process_index::process_count].to_iter_dataset()


class DevicePrefetch:
    """Keeps the next batches on devices, and the iterator state of the batch handed out last.

    Args:
        iterator: of this process's share of each batch.
        sharding: of the global batch.
        depth: batches to hold ahead.
    """

    def __init__(self, iterator: BatchIterator, sharding: NamedSharding, depth: int = 2):
        self._iterator = iterator
        self._sharding = sharding
        self._depth = depth
        self._queue: collections.deque[tuple[Any, dict]] = collections.deque()
        self.state: dict[str, Any] = iterator.get_state()

    def __iter__(self) -> DevicePrefetch:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._queue) <= self._depth:
            batch = next(self._iterator)
            put = functools.partial(jax.make_array_from_process_local_data, self._sharding)
            self._queue.append((jax.tree.map(put, batch), self._iterator.get_state()))
        batch, self.state = self._queue.popleft()
        return batch

    def close(self) -> None:
        """Stops the iterator's threads and worker processes, and lets go of the batches ahead."""
        self._queue.clear()
        self._iterator.close()


def model_input(
    batch: dict[str, jax.Array], key: jax.Array, *, shift: np.ndarray, scale: np.ndarray
) -> jax.Array:
    """Turns a data batch into what the model is trained on; pure, runs inside the jitted step.

    Args:
        batch: "mean" and "std" (sampled as `mean + std·ε`), or "x" (uint8 pixels become
            `x/127.5 − 1`); (B, H, W, C).
        key: of the posterior sample.
        shift, scale: per-channel normalisation, `(latent − shift)/scale`.

    Returns:
        (B, H, W, C) float32.
    """
    if "mean" in batch:
        noise = jax.random.normal(key, batch["mean"].shape, jnp.float32)
        x = batch["mean"] + batch["std"] * noise
    elif batch["x"].dtype == jnp.uint8:
        x = batch["x"].astype(jnp.float32) / 127.5 - 1
    else:
        x = batch["x"].astype(jnp.float32)
    return (x - jnp.asarray(shift)) / jnp.asarray(scale)
