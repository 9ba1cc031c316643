"""`--mode=sample`: a workdir's samples as pictures, and the engine that a config describes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures, tables
from ig_jax import record as record_lib
from ig_jax.diffusion import samplers
from ig_jax.diffusion.guidance import GuidanceOptions, Weaker
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment, ToImages, make_to_images
from ig_jax.models import network
from ig_jax.models.functional import Params, merge
from ig_jax.models.network import Spec
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.sampling.engine import Engine, Settings
from ig_jax.sampling.folder import PictureFolder, folder_name, write_npz
from ig_jax.sampling.labels import LabelRule, label_rule
from ig_jax.storage import files
from ig_jax.storage.checkpoints import (
    Checkpoints,
    find_step,
    parse_step,
    saved_config,
    saved_source,
)


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


def check_weaker(experiment: Experiment) -> tuple[Experiment, int] | None:
    """What `config.guidance.weak` names, for Autoguidance: a workdir's experiment, and the step.

    Raises `InputError` if there is no such checkpoint, or it is of other data or another path.
    """
    workdir = experiment.config.guidance.weak
    which = parse_step(experiment.config.guidance.weak_step, "config.guidance.weak_step")
    if not workdir:
        return None
    step = find_step(workdir, which)  # once, while training may save another
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
    return weak, step


def _open_weaker(experiment: Experiment) -> Weaker | None:
    """Loads the network that `config.guidance.weak` names."""
    found = check_weaker(experiment)
    if found is None:
        return None
    weak, step = found
    config = experiment.config
    checkpoints = Checkpoints(
        config.guidance.weak, read_only=True, verify=config.train.verify_checkpoints
    )
    params = checkpoints.weights(weak.abstract_params(), step)
    checkpoints.close()
    return Weaker(params, weak.graphdef)


def open_weights(
    experiment: Experiment, workdir: epath.PathLike, which: int | str = "last"
) -> record_lib.Weights:
    """A checkpoint's weights, EMA or raw as `config.sampler.ema` says.

    What the record says of them is what that checkpoint's own config says, not this one's. Raises
    `InputError` if there is no such checkpoint.
    """
    ema = experiment.config.sampler.ema
    verify = experiment.config.train.verify_checkpoints
    checkpoints = Checkpoints(workdir, read_only=True, verify=verify)
    step = checkpoints.step(which)
    saved = config_lib.model_spec(saved_config(workdir, step))
    if found := network.difference(saved, experiment.spec):
        name, theirs, ours = found
        raise InputError(
            f"config.model has {name} {ours}: the checkpoint of step {step} in {workdir} has "
            f"{theirs}, expected the same (--mode=train makes another network)"
        )
    params = checkpoints.weights(experiment.abstract_params(), step, ema)
    checkpoints.close()
    # Converted weights come without their training's config: the decay there is a recipe's.
    trained_here = saved_source(workdir, step) is not None
    decay = saved_config(workdir, step).train.ema_decay if ema and trained_here else None
    return record_lib.Weights(params, step, ema, decay)


def sampling_record(
    experiment: Experiment,
    engine: Engine,
    guidance: GuidanceOptions,
    weights: record_lib.Weights,
    labels: LabelRule,
    seed: int,
    to_images: ToImages,
) -> dict[str, Any]:
    """All that sample i of a run depends on, from the values that it is drawn with.

    Every field of the engine's settings, of the labels' rule and of the way to pictures is in it,
    whatever fields there are.
    """
    settings, spec = engine.settings, experiment.spec
    fields = {
        f.name: record_lib.plain(getattr(settings, f.name))
        for f in dataclasses.fields(settings)
        if f.name != "graphdef"  # the spec and the precision make it
    }
    if not settings.sampler.fixed_grid:
        fields |= {"num_steps": None, "time_shift": None}
    weaker = engine.weaker
    return {
        "model": _summary(spec),
        **weights.record(),
        "network": record_lib.plain(spec),
        "precision": config_lib.compute_dtype(experiment.config.model.dtype).name,
        **fields,
        "sampler": tables.spell(samplers.SAMPLERS, settings.sampler),
        "sampler_options": fields["sampler"],
        "sampler_kind": "SDE" if settings.sampler.stochastic else "ODE",
        **record_lib.guidance_record(guidance),
        "guidance": guidance.build(weaker).record(),
        "weak_model": None if weaker is None else record_lib.weights_hash(weaker.params),
        "weak_network": None if weaker is None else _network_of(weaker),
        "labels": str(labels),
        "label_rule": record_lib.plain(labels),
        "seed": seed,
        **to_images.record(),
        # Rows of the tables may come from these.
        "imports": {os.path.basename(f): record_lib.file_hash(f)[:16] for f in tables.IMPORTED},
    }


def _summary(spec: Spec) -> str:
    heads = ", ".join(map(str, spec.auxiliary_depths)) or None
    return f"{spec.summary}, auxiliary head after {heads}"


def _network_of(weaker: Weaker) -> Any:
    return record_lib.plain(merge(weaker.graph, weaker.params).spec)


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
    missing = np.flatnonzero(hosts.gather(todo)[0])
    where = f" at {record_lib.describe(options)}"
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


def _finish(
    folder: PictureFolder,
    directory: epath.Path,
    labels: np.ndarray,
    names: Sequence[str],
    record: dict[str, Any],
) -> None:
    """Writes what lies beside the pictures of a complete folder."""
    count = len(labels)
    first = np.stack([folder.read(i) for i in range(min(count, 100))])
    hashes: list[bytes] = []

    def images() -> Iterator[np.ndarray]:
        for i in range(count):
            image = folder.read(i)
            hashes.append(record_lib.picture_hash(image))
            yield image

    write_npz(directory / "samples.npz", images(), count, first.shape[1:])
    pictures.save_image(directory / "samples.png", pictures.labelled_grid(first, names[:100]))
    _write_facts(directory, labels, names, record, hashes)


def _finish_vectors(
    x: np.ndarray,
    directory: epath.Path,
    labels: np.ndarray,
    names: Sequence[str],
    record: dict[str, Any],
) -> None:
    """Writes vectors (N, D), as they are no pictures: `arr_0`, and a plot in place of the grid."""
    directory.mkdir(parents=True, exist_ok=True)
    with files.write_atomically(directory / "samples.npz") as partial, partial.open("wb") as file:
        np.savez(file, x)
    pictures.save_image(directory / "samples.png", pictures.labelled_grid(x, names))
    _write_facts(directory, labels, names, record, [record_lib.picture_hash(v) for v in x])


def _write_facts(
    directory: epath.Path,
    labels: np.ndarray,
    names: Sequence[str],
    record: dict[str, Any],
    hashes: Sequence[bytes],
) -> None:
    """Writes the labels and the record of samples with these hashes."""
    pairs = enumerate(zip(labels, names, strict=True))
    lines = (f"{i:06d} {label} {name}" for i, (label, name) in pairs)
    (directory / "labels.txt").write_text("\n".join(lines) + "\n")
    digest = record_lib.pictures_hash(hashes)
    record_lib.save_sampling(directory / "protocol.json", record, len(labels), digest)


def run(config: ConfigDict, workdir: str, which: int | str = "last") -> str:
    """`--mode=sample`: as `draw_pictures`; returns the last line to print."""
    found = draw_pictures(config, workdir, which)
    line = f"{config.sampler.num_samples} samples of step {found.step}"
    if found.drawn is None:
        return f"{line}: {found.directory}/samples.png and samples.npz"
    return (
        f"{line} ({found.drawn} drawn now): {found.directory}/samples.png, samples.npz and images/"
    )


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        directory: where it is.
        step: the checkpoint's.
        drawn: how many pictures were missing; None for vectors, which are always drawn.
    """

    directory: epath.Path
    step: int
    drawn: int | None


def draw_pictures(config: ConfigDict, workdir: str, which: int | str = "last") -> Drawn:
    """Draws `config.sampler.num_samples` pictures into `workdir/samples/…`.

    A folder named after what fixes the pictures gets numbered PNGs in `images`, `samples.npz`
    (`arr_0`, uint8 (N, H, W, C), as evaluators expect), `labels.txt`, `protocol.json` and a grid
    of the first 100, `samples.png`. Started again after a stop it draws only what is missing.
    Vectors are few bytes: they get `samples.npz` (float32 (N, D)) and a plot, and no files each.
    `which` checkpoint is "last", "best" or a step. Raises `InputError` if there is none.
    """
    experiment = Experiment.from_config(config)
    step = find_step(workdir, which)
    source = experiment.open_facts(workdir, step)
    rule = label_rule(config, source.class_names)
    to_images = make_to_images(experiment, source)
    weights = open_weights(experiment, workdir, step)
    engine = make_engine(experiment)
    options, seed = GuidanceOptions.of(config.guidance), config.seed
    record = sampling_record(experiment, engine, options, weights, rule, seed, to_images)
    indices = np.arange(config.sampler.num_samples)
    labels = rule(indices)
    names = [source.class_names[i] if rule.num_classes else "" for i in labels]
    directory = resolve(workdir) / "samples" / folder_name(record)
    if len(experiment.sample_shape) == 1:
        x = engine.draw(weights.params, options.build(engine.weaker), seed, indices, labels)
        points = to_images(x, indices, f" at {record_lib.describe(options)}")
        if is_primary():
            _finish_vectors(points, directory, labels, names, record)
        return Drawn(directory, step, None)
    folder = PictureFolder(directory / "images")
    if is_primary():
        folder.directory.mkdir(parents=True, exist_ok=True)
    hosts.wait_for_all("samples folder")
    drawn = draw_into(folder, engine, weights.params, options, seed, labels, to_images)
    hosts.wait_for_all("samples drawn")
    if is_primary():
        with console.stage("writing samples.npz"):
            _finish(folder, directory, labels, names, record)
    return Drawn(directory, step, drawn)
