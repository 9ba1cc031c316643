"""Draws the samples that a network's own head is trained on, once (SSG, arXiv 2607.29122)."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from ig_jax import console
from ig_jax.data import samples
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError, NotFiniteError
from ig_jax.experiment import Experiment, make_to_images
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import check_writable, resolve
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import make_engine, open_weights, sampling_record
from ig_jax.storage import files
from ig_jax.storage.checkpoints import find_step
from ig_jax.streams import numpy_stream

# Samples to a file, which is what a stopped run draws again.
_PIECE = 4096


def draw_once(config: ConfigDict) -> None:
    """Fills `config.data.path`, where `config.data.name` is "samples" and it is not there yet.

    The network of `config.train.init_from` draws `config.sampler.num_samples` samples by
    `config.sampler` and `config.guidance`, without internal guidance, whose head is to be trained.
    Their noise is no other use's of the seed. Started again after a stop it draws what is missing.

    Raises:
        InputError: no network, or no place for the samples; they cannot be what they are scored by.
        NotFiniteError: samples that are no numbers.
    """
    if config.data.name != "samples":
        return
    _check(config)
    folder = resolve(config.data.path)
    if hosts.primary_says((folder / samples.INDEX).exists()):
        return
    experiment, step = _network(config)
    source = experiment.open_facts(config.train.init_from, step)
    weights = open_weights(experiment, config.train.init_from, step)
    rule, engine = label_rule(experiment.config, source.class_names), make_engine(experiment)
    options = GuidanceOptions.of(experiment.config.guidance)
    seed = int(numpy_stream(config.seed, "own samples").integers(2**32))
    record = sampling_record(
        experiment, engine, options, weights, rule, seed, make_to_images(experiment, source)
    )
    stem, count, pieces = files.json_digest(record)[:12], config.sampler.num_samples, []
    if is_primary():
        folder.mkdir(parents=True, exist_ok=True)
    with console.progress_bar(count, "drawing own samples") as advance:
        for start in range(0, count, _PIECE):
            indices = np.arange(start, min(start + _PIECE, count))
            pieces.append(f"{stem}-{start:07d}-{len(indices)}.npz")
            if not hosts.primary_says((folder / pieces[-1]).exists()):
                labels = rule(indices)
                terms = options.build(engine.weaker)
                x = engine.draw(weights.params, terms, seed, indices, labels)
                if not np.isfinite(x).all():
                    raise NotFiniteError(f"own samples of {config.train.init_from} are not finite")
                if is_primary():
                    samples.save_piece(folder / pieces[-1], x * source.scale + source.shift, labels)
            advance(len(indices))
    if is_primary():
        samples.save_index(folder, pieces, source.facts(), record)
    hosts.wait_for_all("own samples")


def _check(config: ConfigDict) -> None:
    """Raises `InputError` for what could not be drawn, or would be scored against itself."""
    evaluation = config.evaluation
    if (evaluation.every or evaluation.at_end) and not evaluation.reference:
        raise InputError(
            "config.evaluation.reference is empty: expected a reference to score samples during "
            "training, since own samples are none (or config.evaluation.at_end=False and every=0)"
        )
    if not config.data.path:
        raise InputError("config.data.path is empty: expected the folder to keep own samples in")
    if not config.train.init_from:
        raise InputError(
            "config.train.init_from is empty: expected the workdir whose network draws the samples"
        )
    check_writable(config.data.path, "config.data.path")


def _network(config: ConfigDict) -> tuple[Experiment, int]:
    """The experiment that draws, and the step of its checkpoint."""
    workdir = config.train.init_from
    step = find_step(workdir)
    drawing = Experiment.from_config(config).of_workdir(workdir, step).config
    drawing.sampler.update(config.sampler.to_dict())
    drawing.guidance.update(config.guidance.to_dict() | dict(ig_scale=1.0, ig_null_scale="same"))
    drawing.data.autoencoder_path = config.data.autoencoder_path
    drawing.seed = config.seed
    return Experiment.from_config(drawing), step
