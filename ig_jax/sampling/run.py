"""`--mode=sample`: a workdir's samples as pictures, and the engine that a config describes."""

from __future__ import annotations

import concurrent.futures

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.diffusion.guidance import GuidanceOptions, Weaker
from ig_jax.errors import InputError
from ig_jax.evaluation import protocol
from ig_jax.experiment import Experiment, ToImages, make_to_images
from ig_jax.models.functional import Params
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.engine import Engine, Settings
from ig_jax.sampling.folder import PictureFolder, folder_name, write_npz
from ig_jax.sampling.labels import labels_for
from ig_jax.storage.checkpoints import Checkpoints, parse_step


def make_engine(experiment: Experiment) -> Engine:
    """The compiled sampler that a config describes, with its weak network if it names one."""
    config = experiment.config
    settings = Settings(
        graphdef=experiment.graphdef,
        path=experiment.path,
        prediction=config.loss.prediction,
        null_label=experiment.spec.null_label,
        heads=len(experiment.spec.auxiliary_depths),
        shape=experiment.sample_shape,
        sampler=config_lib.sampler(config),
        num_steps=config.sampler.num_steps,
        time_shift=config.sampler.time_shift,
    )
    return Engine(settings, config.sampler.batch_size, experiment.mesh, _open_weaker(experiment))


def _open_weaker(experiment: Experiment) -> Weaker | None:
    """Loads the network that `config.guidance.weak` names, for Autoguidance."""
    workdir = experiment.config.guidance.weak
    if not workdir:
        return None
    step = parse_step(experiment.config.guidance.weak_step, "config.guidance.weak_step")
    weak = experiment.of_workdir(workdir, step)
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
    params = checkpoints.weights(weak.abstract_params(), step)
    checkpoints.close()
    return Weaker(params, weak.graphdef)


def draw_into(
    folder: PictureFolder,
    engine: Engine,
    params: Params,
    options: GuidanceOptions,
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
    where = f" at {protocol.describe_guidance(protocol.guidance_record(options))}"
    guidance = options.build(engine.weaker)
    with (
        console.progress_bar(count, "sampling", count - len(missing)) as advance,
        concurrent.futures.ThreadPoolExecutor(4) as writers,
    ):
        for positions, x in engine.batches(params, guidance, seed, missing, labels[missing]):
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
    engine = make_engine(experiment)
    options = config_lib.guidance(config)
    record = protocol.sampling_record(
        config,
        options,
        step=step,
        weights=protocol.weights_hash(params),
        ema=config.sampler.ema,
        weak=None if engine.weaker is None else protocol.weights_hash(engine.weaker.params),
    )
    directory = resolve(workdir) / "samples" / folder_name(record)
    folder = PictureFolder(directory / "images")
    if is_primary():
        folder.directory.mkdir(parents=True, exist_ok=True)
    _meet("samples folder")
    drawn = draw_into(folder, engine, params, options, config.seed, labels, to_images)
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
