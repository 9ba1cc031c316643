"""Encodes images to latents once, ahead of training: shards that survive kills and full disks.

Image i belongs to shard i // examples_per_shard and shard s to process s mod P, whatever happens,
so the files are the same for any number of processes and interruptions (see `shards` for them).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np

from ig_jax import console, pictures
from ig_jax.data import shards
from ig_jax.data.images import ON_WHITE, Images, Picture, UnreadableImage, decode
from ig_jax.errors import InputError, full_disk
from ig_jax.storage.lock import FILE as LOCK
from ig_jax.storage.lock import hold

Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_LOOK_AHEAD_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One image on its way to the encoder: a picture, or the reason there is none."""

    name: str
    label: int
    picture: Picture | None
    problem: str = ""


def prepare(
    images: Images,
    path: str,
    encode: Encode,
    *,
    autoencoder: str,
    fingerprint: str,
    image_size: int,
    twins: bool = False,
    batch_size: int = 64,
    examples_per_shard: int = 4096,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
) -> str:
    """Encodes every image and writes the posterior's mean and standard deviation.

    Started again after a kill it does only what is missing; the result is the same, byte for byte.
    Images that cannot be decoded are skipped and listed in the index, as are converted (not RGB)
    and enlarged ones.

    Args:
        images: what to encode.
        path: directory to write, shared by all processes; new, or of the same preparation.
        encode: of (B, image_size, image_size, 3) float32 in [−1, 1], 1 ≤ B ≤ batch_size, to mean
            and standard deviation, (B, h, w, C).
        autoencoder: its name, and `fingerprint` of its weights, for the index.
        image_size: side of the pictures after ADM's centre crop.
        twins: encode mirrored pictures as well (the VA-VAE recipe).
        batch_size: pictures a call of `encode`.
        examples_per_shard: images of a shard, the piece that is redone after a kill.
        process_index, process_count: which shards to make: every P-th.
        num_threads: that decode; the number of CPU cores if 0.

    Returns:
        A line that says what was done.

    Raises:
        InputError: `path` holds something else, another run prepares or trains there, or the disk
            is full (finished shards are kept).
    """
    path = shards.require_local(path)
    plan = {
        "format": shards.FORMAT,
        "images": images.describe(),
        "image_size": image_size,
        "autoencoder": autoencoder,
        "fingerprint": fingerprint,
        "twins": twins,
        "examples_per_shard": examples_per_shard,
        "class_names": list(images.class_names),
    }
    _check_plan(path, plan)
    total = shards.num_shards(plan)
    mine = range(process_index, total, process_count)
    pending = [shard for shard in mine if _finished(path, shard, total) is None]
    ranges = {
        s: range(s * examples_per_shard, min((s + 1) * examples_per_shard, len(images)))
        for s in mine
    }
    all_images = sum(map(len, ranges.values()))
    done = all_images - sum(len(ranges[shard]) for shard in pending)
    with _full_disk_explained(path, total), contextlib.ExitStack() as stack:
        os.makedirs(path, exist_ok=True)
        stack.enter_context(hold(path))
        shards.write_json(os.path.join(path, shards.PLAN), plan, f".partial{process_index}")
        stream = _decoded(
            images,
            itertools.chain.from_iterable(ranges[shard] for shard in pending),
            image_size,
            num_threads or os.cpu_count() or 1,
            _LOOK_AHEAD_BATCHES * batch_size,
        )
        with contextlib.closing(stream), console.progress_bar(all_images, "encoding", done) as bar:
            for shard in pending:
                part = _counted(itertools.islice(stream, len(ranges[shard])), bar)
                _write_shard(path, shard, total, part, encode, twins, batch_size)
        with console.stage("checking the shards"):
            return _finish(path, plan, process_index)


def _check_plan(path: str, plan: Mapping[str, Any]) -> None:
    """Refuses a directory of another preparation, before anything is written."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        raise InputError(f"config.data.path is {path!r}: found a file, expected a directory")
    # In this order: what another process of this run has just written is preceded by its plan.
    found = itertools.chain(*pictures.list_folder(path))
    others = [name for name in found if ".partial" not in name and name != LOCK]
    old = shards.read_plan(path)
    if old is None:
        if others:
            raise InputError(
                f"{path}: found {', '.join(others[:3])}, expected an empty directory or one that "
                "--mode=prepare began"
            )
        return
    for name, value in plan.items():
        if old.get(name) != value:
            found, expected = (str(v)[:120] for v in (old.get(name), value))
            raise InputError(
                f"{path}: holds latents of another preparation, {name} is {found}, expected "
                f"{expected}: choose another config.data.path"
            )


def _finished(path: str, shard: int, total: int) -> shards.Marker | None:
    """The marker of a shard that is complete and as long as it was."""
    try:
        values = shards.read_json(os.path.join(path, shards.marker_name(shard, total)))
    except InputError:
        return None
    if values is None or shards.damaged_shards(path, [values]):
        return None
    return shards.Marker(**values)


def _decoded(
    images: Images, indices: Iterable[int], size: int, num_threads: int, ahead: int
) -> Iterator[Decoded]:
    """Reads and decodes images in order, in threads, a bounded number of them ahead."""

    def read(index: int) -> Decoded:
        name = images.name(index)
        try:
            data, label = images[index]
        except OSError as error:
            return Decoded(name, -1, None, error.strerror or str(error))
        try:
            return Decoded(name, label, decode(data, size, images.turned))
        except UnreadableImage as error:
            return Decoded(name, label, None, str(error))

    window: collections.deque[futures.Future[Decoded]] = collections.deque()
    with futures.ThreadPoolExecutor(num_threads) as pool:
        try:
            for index in indices:
                window.append(pool.submit(read, index))
                if len(window) > ahead:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _counted(items: Iterable[Decoded], advance: console.Advance) -> Iterator[Decoded]:
    for item in items:
        yield item
        advance(1, f"skipped {item.name}" if item.picture is None else "")


def _write_shard(
    path: str,
    shard: int,
    total: int,
    items: Iterator[Decoded],
    encode: Encode,
    twins: bool,
    batch_size: int,
) -> None:
    """Encodes the images of one shard and writes it."""
    notes: dict[str, list[Any]] = {"skipped": [], "converted": [], "enlarged": []}
    with shards.ShardWriter(path, shard, total) as writer:
        for batch in _batches(items, batch_size, notes["skipped"]):
            for item in batch:
                if item.picture.converted:
                    notes["converted"].append([item.name, item.picture.converted])
                if item.picture.enlarged:
                    notes["enlarged"].append(item.name)
            pixels = np.stack([item.picture.pixels for item in batch])
            writer.add([item.label for item in batch], _encode(encode, pixels, twins))
        writer.finish(**notes)


def _batches(
    items: Iterable[Decoded], batch_size: int, skipped: list[list[str]]
) -> Iterator[list[Decoded]]:
    """Groups readable images; the others are appended to `skipped`."""
    batch: list[Decoded] = []
    for item in items:
        if item.picture is None:
            skipped.append([item.name, item.problem])
            continue
        batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(encode: Encode, pixels: np.ndarray, twins: bool) -> list[np.ndarray]:
    """Mean and std of (B, H, W, 3) uint8 pixels, then of the mirrored ones if `twins`."""
    x = pixels.astype(np.float32) / 127.5 - 1
    moments = [*encode(x), *(encode(x[:, :, ::-1]) if twins else ())]
    arrays = [np.asarray(array, np.float32) for array in moments]
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError(
            "the autoencoder's output is not finite: check its weights, or encode in float32"
        )
    return arrays


def _finish(path: str, plan: Mapping[str, Any], process_index: int) -> str:
    """Writes the index if all shards of all processes are there; says what was done."""
    total = shards.num_shards(plan)
    markers = [_finished(path, shard, total) for shard in range(total)]
    complete = [marker for marker in markers if marker is not None]
    if len(complete) < total:
        return (
            f"{len(complete)} of {total} shards in {path}: the last process to finish writes "
            f"{shards.INDEX}"
        )
    if not any(marker.examples for marker in complete):
        name, problem = complete[0].skipped[0]
        raise InputError(
            f"not one of the {plan['images']['count']} images can be read, the first is "
            f"{name}: {problem}"
        )
    index = shards.make_index(plan, complete)
    shards.write_json(os.path.join(path, shards.INDEX), index, f".partial{process_index}")
    transparent = sum(mode.endswith(ON_WHITE) for _, mode in index["converted"])
    white = f", {transparent} of them transparent and put on white" if transparent else ""
    irregular = ", ".join(
        f"{len(index[kind])} {kind}{more}"
        for kind, more in (("skipped", ""), ("converted", white), ("enlarged", ""))
        if index[kind]
    )
    return (
        f"{index['num_examples']} images of {len(index['class_names'])} classes as latents of "
        f"shape {tuple(index['shape'])} in {total} shards: {path}"
        + (f" ({irregular}: listed in {shards.INDEX})" if irregular else "")
    )


@contextlib.contextmanager
def _full_disk_explained(path: str, total: int) -> Iterator[None]:
    """Turns "no space left" into one line that says what is kept and what is needed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (reason := full_disk(error)) is None:
            raise
        sizes = [
            marker.bytes for shard in range(total) if (marker := _finished(path, shard, total))
        ]
        needed = max(sizes, default=0) * (total - len(sizes))
        raise InputError(
            f"{path}: {reason}, {shutil.disk_usage(path).free / 1e9:.1f} GB free; "
            f"{len(sizes)} of {total} finished shards are kept"
            + (f", the others need about {needed / 1e9:.1f} GB" if needed else "")
            + ": make room and run the same command again"
        ) from error
