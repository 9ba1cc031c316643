"""How fast latents are read: `python -m ig_jax.plan.reading` makes a set in each layout, shuffles
through it as training does, and prints latents per second and the peak memory of the reader.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from ig_jax import console
from ig_jax.data import pipeline, shards
from ig_jax.data.latents import open_latents
from ig_jax.errors import InputError
from ig_jax.paths import check_writable, resolve

SHAPE = (32, 32, 4)
_NUM_CLASSES = 1000

# label, mean (H, W, C), std (H, W, C)
Latents = Iterator[tuple[int, np.ndarray, np.ndarray]]


def random_latents(count: int, shape: tuple[int, int, int] = SHAPE) -> Latents:
    """Yields latents that differ from one another, cheaply."""
    noise = np.random.default_rng(0).standard_normal((64, *shape), np.float32)
    for i in range(count):
        mean = noise[i % 64].copy()
        mean[0, 0, 0] = i
        yield i % _NUM_CLASSES, mean, np.abs(noise[(i + 1) % 64])


def write_shards(path: str, latents: Latents, count: int, per_shard: int = 4096) -> None:
    """Writes our layout."""
    plan = {
        "format": shards.FORMAT,
        "images": {"kind": "random", "count": count},
        "image_size": 256,
        "autoencoder": "sd-vae-ft-ema",
        "fingerprint": "",
        "twins": False,
        "examples_per_shard": per_shard,
        "class_names": [str(i) for i in range(_NUM_CLASSES)],
    }
    shards.write_json(os.path.join(path, shards.PLAN), plan)
    total = shards.num_shards(plan)
    markers = []
    for shard in range(total):
        with shards.ShardWriter(path, shard, total) as writer:
            for _ in range(shard * per_shard, min((shard + 1) * per_shard, count)):
                label, mean, std = next(latents)
                writer.add([label], [mean[None], std[None]])
            writer.finish(skipped=[], converted=[], enlarged=[])
        marker = shards.read_json(os.path.join(path, shards.marker_name(shard, total)))
        markers.append(shards.Marker(**marker))
    shards.write_json(os.path.join(path, shards.INDEX), shards.make_index(plan, markers))


def write_npy(path: str, latents: Latents, count: int) -> None:
    """Writes the layout of SiT, REPA and EDM2."""
    labels = []
    for i in range(count):
        label, mean, std = next(latents)
        name = f"{i // 1000:05d}/img-latents-{i:08d}.npy"
        os.makedirs(os.path.join(path, os.path.dirname(name)), exist_ok=True)
        moments = np.concatenate([np.moveaxis(mean, -1, 0), np.moveaxis(std, -1, 0)])
        np.save(os.path.join(path, name), moments)
        labels.append([name, label])
    with open(os.path.join(path, "dataset.json"), "w", encoding="utf-8") as file:
        json.dump({"labels": labels}, file)


def write_safetensors(path: str, latents: Latents, count: int, per_shard: int = 10_000) -> None:
    """Writes LightningDiT's layout; the mean stands for a sample, its mirror image for the twin."""
    for shard in range(-(-count // per_shard)):
        size = min(per_shard, count - shard * per_shard)
        chosen = [next(latents) for _ in range(size)]
        labels = np.array([label for label, _, _ in chosen], np.int64)
        mean = np.stack([np.moveaxis(mean, -1, 0) for _, mean, _ in chosen])
        tensors = {"latents": mean, "latents_flip": mean[..., ::-1], "labels": labels}
        header, end = {}, 0
        for name, array in tensors.items():
            kind = "I64" if name == "labels" else "F32"
            offsets = [end, end := end + array.nbytes]
            header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(path, f"latents_rank00_shard{shard:03d}.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in tensors.values():
                file.write(np.ascontiguousarray(array).tobytes())
    ones = np.ones((1, SHAPE[-1], 1, 1), np.float32)
    np.savez(os.path.join(path, "latents_stats.npz"), mean=0 * ones, std=ones)


LAYOUTS: dict[str, Callable[[str, Latents, int], None]] = {
    "ig_jax ArrayRecord (mean, std)": write_shards,
    "SiT/REPA/EDM2 .npy (mean, std)": write_npy,
    "LightningDiT safetensors (x, twin)": write_safetensors,
}


def measure(
    path: str, num_batches: int, batch_size: int, num_workers: int, queue: multiprocessing.Queue
) -> None:
    """Reads shuffled batches and puts (latents per second, peak memory in bytes) into `queue`."""
    source = open_latents(path)
    batches = pipeline.make_iterator(
        source.train, batch_size=batch_size, seed=0, num_workers=num_workers
    )
    for _ in range(10):
        next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    queue.put((num_batches * batch_size / seconds, peak_memory(num_workers)))


def peak_memory(num_workers: int) -> float:
    """Largest resident memory in bytes of this process, plus that of its ended workers."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with (
        contextlib.suppress(FileNotFoundError),
        open("/proc/self/status", encoding="utf-8") as file,
    ):
        # getrusage counts what the parent had when it started this process.
        fields = dict(line.split(":", 1) for line in file)
        peak = int(fields["VmHWM"].split()[0]) * 1024
    if num_workers:
        peak += num_workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return peak


def run(
    num_examples: int, num_batches: int, batch_size: int, num_workers: int, directory: str | None
) -> dict[str, tuple[float, float]]:
    """Writes, reads and deletes each layout; returns latents per second and peak bytes of each."""
    context = multiprocessing.get_context("spawn")  # a reader whose memory is its own
    results = {}
    for name, write in LAYOUTS.items():
        path = tempfile.mkdtemp(prefix="latents-", dir=directory)
        try:
            write(
                path,
                console.progress(random_latents(num_examples), name, num_examples),
                num_examples,
            )
            queue = context.Queue()
            arguments = (path, num_batches, batch_size, num_workers, queue)
            process = context.Process(target=measure, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{name}: the reader ended with exit code {process.exitcode}")
            results[name] = queue.get()
        finally:
            shutil.rmtree(path)
    return results


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_examples", type=int, default=100_000, help="33 KB on disk each")
    parser.add_argument("--num_batches", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=0, help="0: threads of one process")
    parser.add_argument("--directory", help="where to write the sets, one at a time")
    flags = parser.parse_args()
    if flags.directory:
        check_writable(flags.directory, "--directory")
        flags.directory = os.fspath(resolve(flags.directory))
    results = run(**vars(flags))
    console.print_table(
        f"{flags.num_examples:,} latents of {'×'.join(map(str, SHAPE))}, batches of "
        f"{flags.batch_size}, shuffled, {os.cpu_count()} CPU cores",
        ["layout", "latents/s", "peak memory (GiB)"],
        [(name, f"{speed:,.0f}", f"{peak / 2**30:.2f}") for name, (speed, peak) in results.items()],
    )


if __name__ == "__main__":
    console.quiet_libraries()
    console.forgive_output()
    try:
        with console.speaking():
            main()
    except InputError as error:
        sys.exit(f"ig_jax: {error}")
