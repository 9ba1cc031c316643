"""Drawing samples in batches over the mesh: sample i of a run depends on (seed, i) and its label
alone, whatever the batch size, the number of devices or the process that draws it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.diffusion import interpolant, sampler
from ig_jax.diffusion.guidance import Guidance, GuidedVelocity
from ig_jax.errors import InputError
from ig_jax.evaluation import protocol
from ig_jax.experiment import Experiment, ToImages, make_to_images
from ig_jax.models.functional import Params, merge
from ig_jax.parallel import sharding
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.streams import numpy_stream
from ig_jax.training.checkpoint import Checkpoints


def choose_labels(
    kind: str, indices: np.ndarray, num_classes: int, seed: int, classes: tuple[int, ...] = ()
) -> np.ndarray:
    """Labels of the samples with these indices; label i depends on (seed, i) alone.

    Args:
        kind: "random", "balanced" (0, 1, … in turn), or "given" (`classes` in turn).
        indices: (N,) sample indices.
        num_classes: number of classes; 0 (an unconditional model) gives label 0, its ∅.
        seed: of random labels.
        classes: labels for "given", each below `num_classes`.

    Returns:
        (N,) int32. Raises `InputError` for a label out of range.
    """
    if num_classes == 0:
        return np.zeros(len(indices), np.int32)
    if kind == "given":
        for label in classes:
            if not 0 <= label < num_classes:
                raise InputError(f"label {label} is out of range: expected 0…{num_classes - 1}")
        return np.asarray(classes, np.int32)[indices % len(classes)]
    if kind == "balanced":
        return (indices % num_classes).astype(np.int32)
    labels = numpy_stream(seed, "labels").integers(num_classes, size=int(indices.max()) + 1)
    return labels[indices].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Drawer:
    """A compiled sampler for one network on one mesh.

    Attributes:
        graphdef: of the network.
        path, prediction: what it was trained on.
        null_label: the label ∅.
        shape: (H, W, C) of a sample.
        batch_size: samples drawn at once over all devices.
        mesh: the devices.
        arguments: keyword arguments of `diffusion.sampler.sample`.
        weak: graph definition and parameters of Autoguidance's network, or None.
    """

    graphdef: nnx.GraphDef
    path: interpolant.Interpolant
    prediction: str
    null_label: int
    shape: tuple[int, int, int]
    batch_size: int
    mesh: Mesh
    arguments: dict[str, Any]
    weak: tuple[nnx.GraphDef, Params] | None = None

    @functools.cached_property
    def _draw(self) -> Callable[..., jax.Array]:
        def draw(
            params: Params,
            weak_params: Params | None,
            scales: tuple[jax.Array, jax.Array],
            seed: jax.Array,
            indices: jax.Array,
            labels: jax.Array,
            guidance: Guidance,
        ) -> jax.Array:
            ig_scale, cfg_scale = scales
            # A CFG scale of exactly 1 stays a Python number, since it removes the ∅ branch.
            cfg_scale = 1.0 if guidance.cfg_scale == 1 else cfg_scale
            guidance = guidance.replace(ig_scale=ig_scale, cfg_scale=cfg_scale)
            weak = None if self.weak is None else merge(self.weak[0], weak_params)
            field = GuidedVelocity(
                merge(self.graphdef, params),
                labels,
                self.null_label,
                self.path,
                self.prediction,
                weak,
            )
            keys = sampler.sample_keys(seed, indices)
            return sampler.sample(field, keys, self.shape, guidance, **self.arguments)[0]

        def draw_all(*arguments: Any, guidance: Guidance) -> jax.Array:
            # Weights are gathered once a batch, not at each of its hundreds of evaluations.
            rows = functools.partial(draw, guidance=guidance)
            return sharding.by_rows(self.mesh, rows, whole=4)(*arguments)

        return jax.jit(
            draw_all,
            static_argnames="guidance",
            out_shardings=sharding.batch_sharding(self.mesh),
        )

    def batches(
        self,
        params: Params,
        guidance: Guidance,
        seed: int,
        indices: np.ndarray,
        labels: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Draws samples batch by batch; each process gets its own rows of every batch.

        Args:
            params: the network's parameters, placed on the mesh.
            guidance: scales and intervals; new scales do not recompile.
            seed: of the samples.
            indices, labels: (N,) sample indices and their labels.

        Yields:
            (positions, samples): which of the N samples these are, (n,), and (n, H, W, C) float32
            in model space. The next batch is computed while the caller works on this one.
        """
        place = functools.partial(
            jax.make_array_from_process_local_data, sharding.batch_sharding(self.mesh)
        )
        share = self.batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        scales, static = _split_scales(guidance)
        pending = None
        for start in range(0, len(indices), self.batch_size):
            positions = np.arange(start, start + self.batch_size)
            # The last batch is filled up with copies of its first sample, so that one program and
            # one batch size serve all of them.
            safe = np.where(positions < len(indices), positions, start)[rows]
            drawn = self._draw(
                params,
                None if self.weak is None else self.weak[1],
                scales,
                np.uint32(seed),
                place(indices[safe].astype(np.int32)),
                place(labels[safe].astype(np.int32)),
                guidance=static,
            )
            if pending is not None:
                yield _local(*pending, len(indices))
            pending = positions[rows], sharding.settle(drawn)
        if pending is not None:
            yield _local(*pending, len(indices))

    def draw(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        """As `batches`, but all of this process's samples at once, in order: (n, H, W, C)."""
        return np.concatenate([x for _, x in self.batches(*arguments, **keywords)])

    def lower(self, params: Params, guidance: Guidance) -> jax.stages.Lowered:
        """The program that draws one batch, from parameters' shapes alone."""
        scales, static = _split_scales(guidance)
        rows = jax.ShapeDtypeStruct(
            (self.batch_size,), np.int32, sharding=sharding.batch_sharding(self.mesh)
        )
        weak = None if self.weak is None else self.weak[1]
        return self._draw.lower(params, weak, scales, np.uint32(0), rows, rows, guidance=static)


def _split_scales(guidance: Guidance) -> tuple[tuple[np.float32, np.float32], Guidance]:
    """Scales to pass as arrays, so that new ones are no new program, and the static rest."""
    scales = (np.float32(guidance.ig_scale), np.float32(guidance.cfg_scale))
    return scales, guidance.replace(ig_scale=1.0, cfg_scale=1.0 if scales[1] == 1 else 0.0)


def _local(positions: np.ndarray, drawn: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's rows of a batch on the host, without the filling."""
    shards = sorted(drawn.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    x = np.concatenate([jax.device_get(shard.data) for shard in shards])
    kept = positions < count
    return positions[kept], x[kept]


def make_drawer(experiment: Experiment) -> Drawer:
    """The compiled sampler that a config describes, with its weak network if it names one."""
    config = experiment.config
    return Drawer(
        graphdef=experiment.graphdef,
        path=experiment.path,
        prediction=config.loss.prediction,
        null_label=experiment.spec.null_label,
        shape=experiment.sample_shape,
        batch_size=config.sampler.batch_size,
        mesh=experiment.mesh,
        arguments=config_lib.sampler_arguments(config),
        weak=_open_weak(experiment),
    )


def _open_weak(experiment: Experiment) -> tuple[nnx.GraphDef, Params] | None:
    """Loads the network that `config.guidance.weak` names, for Autoguidance."""
    workdir = experiment.config.guidance.weak
    if not workdir:
        return None
    weak = experiment.of_workdir(workdir)
    saved = weak.config
    for field, found, expected in (
        ("the data shape", weak.sample_shape, experiment.sample_shape),
        ("num_classes", weak.spec.num_classes, experiment.spec.num_classes),
        ("loss.path", saved.loss.path, experiment.config.loss.path),
        ("loss.prediction", saved.loss.prediction, experiment.config.loss.prediction),
    ):
        if found != expected:
            raise InputError(
                f"config.guidance.weak is {workdir!r}, where {field} is {found}: "
                f"expected {expected}"
            )
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.weights(weak.abstract_params())
    checkpoints.close()
    return weak.graphdef, params


def labels_for(config: ConfigDict, indices: np.ndarray, class_names: tuple[str, ...]) -> np.ndarray:
    """The labels that `config.sampler.labels` asks for: random, balanced, or classes in turn."""
    wanted, num_classes = config.sampler.labels, config.model.num_classes
    if wanted in config_lib.LABELS:
        return choose_labels(wanted, indices, num_classes, config.seed)
    from ig_jax.data import latents

    classes = latents.resolve_classes(wanted, class_names)
    return choose_labels("given", indices, num_classes, config.seed, classes)


def folder_name(record: dict[str, Any]) -> str:
    """A folder name for a sampling record: readable, and different for different records."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]
    return (
        f"step{record['checkpoint_step']}_ig{record['ig_scale']:g}_cfg{record['cfg_scale']:g}"
        f"_{record['sampler']}{record['num_steps'] or ''}_seed{record['seed']}_{digest}"
    )


class PictureFolder:
    """A folder of numbered PNGs that a stopped sampling run can go on filling.

    Every picture is written whole or not at all, so that whatever is there counts.

    Args:
        directory: local or `gs://`; of one sampling record only (see `folder_name`).
    """

    def __init__(self, directory: epath.PathLike):
        self.directory = resolve(directory)

    def path(self, index: int) -> epath.Path:
        """Where picture `index` is."""
        return self.directory / f"{index:06d}.png"

    def done(self) -> set[int]:
        """Indices of the pictures that are there."""
        if not self.directory.exists():
            return set()
        files, _ = pictures.list_folder(self.directory)
        numbered = (re.fullmatch(r"(\d{6}|[1-9]\d{6,})\.png", name) for name in files)
        return {int(found[1]) for found in numbered if found}

    def write(self, index: int, image: np.ndarray) -> None:
        """Writes one (H, W, C) uint8 picture, whole or not at all."""
        partial = self.directory / f"{index:06d}.partial"
        pictures.save_image(partial, pictures.from_array(image))
        partial.replace(self.path(index))

    def read(self, index: int) -> np.ndarray:
        """Reads one (H, W, C) uint8 picture."""
        return pictures.read_image(self.path(index))


def write_npz(path: epath.PathLike, images: Iterator[np.ndarray], count: int, shape: Any) -> None:
    """Writes `arr_0`, uint8 (count, *shape), picture by picture: 50,000 need no memory.

    The file appears under its name only when it is complete.
    """
    path = resolve(path)
    partial = path.parent / (path.name + ".partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    with (
        partial.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for image in images:
            member.write(np.ascontiguousarray(image).tobytes())
    partial.replace(path)


def draw_into(
    folder: PictureFolder,
    drawer: Drawer,
    params: Params,
    guidance: Guidance,
    seed: int,
    labels: np.ndarray,
    to_images: ToImages,
) -> int:
    """Fills a folder with the samples that are not there yet; returns how many were drawn.

    Only whole batches are skipped, and all processes skip the same ones. Raises `NotFiniteError`
    for samples that are no numbers.
    """
    count = len(labels)
    todo = np.ones(count, bool)
    todo[[i for i in folder.done() if i < count]] = False
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        todo = np.asarray(multihost_utils.broadcast_one_to_all(todo))
    missing = np.flatnonzero(todo)
    where = f" at {protocol.describe_guidance(protocol.guidance_record(guidance))}"
    with (
        console.progress_bar(count, "sampling", count - len(missing)) as advance,
        concurrent.futures.ThreadPoolExecutor(4) as writers,
    ):
        for positions, x in drawer.batches(params, guidance, seed, missing, labels[missing]):
            indices = missing[positions]
            images = to_images(x, indices, where)
            list(writers.map(folder.write, indices.tolist(), images))
            advance(len(positions) * jax.process_count())
    return len(missing)


def run(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    """`--mode=sample`: draws `config.sampler.num_samples` pictures into `workdir/samples/…`.

    A folder named after what fixes the pictures gets numbered PNGs in `images`, `samples.npz`
    (`arr_0`, uint8 (N, H, W, C), as evaluators expect), `labels.txt`, `protocol.json` and a grid
    of the first 100, `samples.png`. Started again after a stop it draws only what is missing.
    `which` checkpoint is "last", "best" or a step. Raises `InputError` if there is none.
    """
    experiment = Experiment.from_config(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step(which)
    source = experiment.open_facts(workdir, step)
    indices = np.arange(config.sampler.num_samples)
    labels = labels_for(config, indices, source.class_names)
    to_images = make_to_images(experiment, source)
    params = checkpoints.weights(experiment.abstract_params(), step, config.sampler.ema)
    checkpoints.close()
    drawer = make_drawer(experiment)
    guidance = config_lib.guidance(config)
    record = protocol.sampling_record(
        config,
        guidance,
        step=step,
        weights=protocol.weights_hash(params),
        ema=config.sampler.ema,
        weak=None if drawer.weak is None else protocol.weights_hash(drawer.weak[1]),
    )
    directory = resolve(workdir) / "samples" / folder_name(record)
    folder = PictureFolder(directory / "images")
    if is_primary():
        folder.directory.mkdir(parents=True, exist_ok=True)
    _meet("samples folder")
    drawn = draw_into(folder, drawer, params, guidance, config.seed, labels, to_images)
    _meet("samples drawn")
    if is_primary():
        first = np.stack([folder.read(i) for i in indices[:100]])
        images = (folder.read(i) for i in indices)
        write_npz(directory / "samples.npz", images, len(indices), first.shape[1:])
        names = [source.class_names[i] if config.model.num_classes else "" for i in labels]
        lines = (
            f"{i:06d} {label} {name}"
            for i, (label, name) in enumerate(zip(labels, names, strict=True))
        )
        (directory / "labels.txt").write_text("\n".join(lines) + "\n")
        protocol.save_sampling(directory / "protocol.json", record, len(indices))
        pictures.save_image(directory / "samples.png", pictures.labelled_grid(first, names[:100]))
    return (
        f"{len(indices)} samples of step {step} ({drawn} drawn now): "
        f"{directory}/samples.png, samples.npz and images/"
    )


def _meet(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
