"""`--mode=train`: the loop with everything that a config asks for beside the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from ig_jax.experiment import ToImages, make_to_images
from ig_jax.sampling import own
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.labels import label_rule
from ig_jax.sampling.run import check_weaker, make_engine
from ig_jax.training import loop
from ig_jax.training.callbacks import Callback, Profile
from ig_jax.training.grids import SampleGrid, ScaleGrid
from ig_jax.training.setup import Programs, Setup
from ig_jax.training.validation import Validation

# What evaluates during training and at its end, if the config says so; it lives above this floor.
Evaluations = Callable[[Setup, Engine, ToImages], Sequence[Callback]]


def callbacks(setup: Setup, evaluations: Evaluations | None = None) -> list[Callback]:
    """What the config wants done beside the steps; raises `InputError` if something is missing."""
    config = setup.config
    # Wrong ones would show when the first pictures are due, or after training.
    label_rule(config, setup.source.class_names)
    check_weaker(setup.experiment)
    found: list[Callback] = [Validation(setup)]
    if config.train.profile_at:
        found.append(Profile(setup.workdir, config.train.profile_at))
    if config.train.sample_every or config.evaluation.every or config.evaluation.at_end:
        # Already here: a missing autoencoder shows now and not when the first pictures are due.
        draws = setup, make_engine(setup.experiment), make_to_images(setup.experiment, setup.source)
        found += evaluations(*draws) if evaluations else ()
        found += [SampleGrid(*draws)] if config.train.sample_every else []
        found += [ScaleGrid(*draws)] if config.evaluation.at_end else []
    return found


def train(
    config: ConfigDict,
    workdir: str,
    evaluations: Evaluations | None = None,
    programs: Programs | None = None,
) -> loop.Trained:
    """Trains the experiment that a config describes.

    Args:
        config: a complete config.
        workdir: where checkpoints, logs and pictures go; local or `gs://`. A run that was stopped
            there continues.
        evaluations: makes the callbacks for `config.evaluation`, of which there are none without.
        programs: those of a run that differs in its seed and folders alone, compiled already.

    Raises:
        InputError: a config, data set or workdir that does not fit, before anything is written
            (but a network's own samples, if these are the data).
        NotFiniteError: a step was not finite (it is not saved; the last checkpoint is whole).
        Stopped: after SIGTERM or SIGINT, once a checkpoint is saved.
    """
    own.draw_once(config)
    setup = Setup.from_config(config, workdir, programs)
    return loop.train(setup, callbacks(setup, evaluations))


def run(config: ConfigDict, workdir: str, evaluations: Evaluations) -> str:
    """`--mode=train`: as `train`; returns the last line to print."""
    trained = train(config, workdir, evaluations)
    said = trained.said or (f"checkpoints, samples and logs are in {workdir}",)
    return "; ".join((f"trained {trained.step} steps", *said))
