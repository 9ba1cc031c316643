"""Where a run's numbers and pictures go: always into `metrics.jsonl`, into TensorBoard's files by
CLU's writer where TensorFlow is installed, and to Weights & Biases where that is asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax.errors import InputError, reason
from ig_jax.parallel.processes import is_primary
from ig_jax.storage import files

FILE = "metrics.jsonl"
# TensorBoard's table of hyperparameters: what it always has, the sections whose fields it has where
# they differ from the defaults, and the metrics beside.
_ALWAYS = (
    "guidance.ig_scale",
    "loss.auxiliary_weight",
    "model.auxiliary_depth",
    "model.family",
    "model.size",
    "optimizer.learning_rate",
    "train.batch_size",
)
_SECTIONS = ("guidance", "loss", "model", "optimizer", "seed")
_METRICS = ("validation/loss", "train/loss", "speed/images_per_second")

log = logging.getLogger("ig_jax")

Scalars = Mapping[str, float]


class Writer(Protocol):
    """What takes numbers and pictures of steps, named `group/name` ("train/loss")."""

    def write_scalars(self, step: int, scalars: Scalars) -> None: ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Takes (H, W, 3) uint8 pictures."""
        ...

    def write_scores(self, step: int, scores: Scalars, table: str) -> None:
        """Takes the scores of one step, and the same for people: a table in Markdown."""
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Takes a config's fields."""
        ...

    def close(self) -> None: ...


class Lines:
    """A JSON object a line: step, time (seconds since 1970) and scalars. Pictures are left out.

    Args:
        path: the file, local or `gs://`.
        first_step: what an earlier run wrote of later steps is dropped, as they are taken again.
    """

    def __init__(self, path: epath.Path, first_step: int):
        self._path, self._first_step = path, first_step
        self._keep(lambda found: found["step"] <= first_step)

    def _keep(self, wanted: Any) -> None:
        """Drops lines, the half one of a killed run among them."""
        old = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in old if (found := _parsed(line)) and wanted(found)]
        if kept != old:
            with files.write_atomically(self._path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        if step <= self._first_step:  # scores of a run that had ended, once more
            self._keep(lambda found: found["step"] != step or scalars.keys().isdisjoint(found))
        # JSON knows no NaN.
        values = {n: float(v) if math.isfinite(v) else None for n, v in scalars.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """They are in the workdir's folder of samples anyway."""

    def write_scores(self, step: int, scores: Scalars, table: str) -> None:
        self.write_scalars(step, scores)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The config is in every checkpoint."""

    def close(self) -> None:
        """Every line was written whole."""


def read_lines(workdir: epath.Path) -> list[dict[str, Any]]:
    """What `Lines` wrote into a workdir, in order; the half line of a killed run is passed over."""
    path = workdir / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [found for line in lines if (found := _parsed(line))]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "step" in found else None


class WeightsAndBiases:
    """A run at Weights & Biases; the same one when training continues.

    Args:
        project: its project.
        workdir: keeps the run's id; its name is the run's.
    """

    def __init__(self, project: str, workdir: epath.Path):
        import wandb

        place = workdir / "wandb_id.txt"
        if not place.exists():
            place.write_text(secrets.token_hex(4))
        local = "://" not in str(workdir)
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=place.read_text(),
                resume="allow",
                dir=str(workdir) if local else None,
            )
        except Exception as error:  # no login, no network, a project of somebody else's, …
            raise InputError(
                f"config.train.wandb is {project!r}: Weights & Biases says {reason(error)!r}; "
                "expected after `wandb login`, or with WANDB_MODE=offline"
            ) from error

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        # Of steps that it has seen it takes nothing: nothing is there twice.
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: self._image(image) for name, image in images.items()}, step=step)

    def write_scores(self, step: int, scores: Scalars, table: str) -> None:
        self.write_scalars(step, scores)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._run.config.update(dict(hparams), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


class Logs:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for writer in self._writers:
            writer.write_images(step, images)

    def write_scores(self, step: int, scores: Scalars, table: str) -> None:
        for writer in self._writers:
            writer.write_scores(step, scores, table)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def check(config: ConfigDict) -> None:
    """Raises `InputError` if what the config wants to log with is not installed."""
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"config.train.wandb is {config.train.wandb!r}: Weights & Biases is not installed, "
            "expected after pip install 'ig_jax[wandb]'"
        )


def import_ahead() -> None:
    """Starts to import what `open_logs` needs: seconds in which the first programs compile."""

    def load() -> None:
        # What is missing is said by whoever needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module("clu.metric_writers")

    if is_primary():
        threading.Thread(target=load, daemon=True).start()


def open_logs(config: ConfigDict, workdir: epath.Path, first_step: int) -> Logs:
    """Opens what this process writes to, which is nothing unless it is the primary one.

    Args:
        config: of the run; its fields are written as hyperparameters.
        workdir: where to.
        first_step: the last step that is kept of what an earlier run wrote.
    """
    if not is_primary():
        return Logs()
    found: list[Writer] = [Lines(workdir / FILE, first_step)]
    with console.stage("opening the logs"):
        if (board := _tensorboard(config, workdir, first_step)) is not None:
            found.append(board)
        if config.train.wandb:
            found.append(WeightsAndBiases(config.train.wandb, workdir))
    logs = Logs(*found)
    logs.write_hparams(hyperparameters(config))
    return logs


def _tensorboard(config: ConfigDict, workdir: epath.Path, first_step: int) -> Writer | None:
    """CLU's writer in a thread of its own; None where TensorFlow is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        log.warning(
            "no TensorBoard files, as TensorFlow is not installed (it has no wheels for the newest "
            "Python): scalars are in %s", workdir / FILE,
        )  # fmt: skip
        return None
    from clu import metric_writers
    from tensorboard.compat.proto import event_pb2
    from tensorboard.plugins.hparams import api
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    # Of all hyperparameters TensorBoard would show the first five in alphabetical order.
    columns = [api.HParam(name) for name in interesting(config)]
    metrics = [api.Metric(name) for name in _METRICS]
    # At the second start that it reads, it forgets later steps, which are taken again.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    first = (
        event_pb2.Event(summary=api.hparams_config_pb(columns, metrics)),
        event_pb2.Event(step=first_step + 1, session_log=start),
    )
    writer = EventFileWriter(str(workdir))
    for event in first:
        event.wall_time = time.time()
        writer.add_event(event)
    writer.close()

    class Board(metric_writers.AsyncMultiWriter):
        """As scalars, scores of one step would be a plot of a single point each."""

        def write_scores(self, step: int, scores: Scalars, table: str) -> None:
            self.write_texts(step, {"evaluation/scores": table})

    return Board([metric_writers.SummaryWriter(str(workdir))])


def interesting(config: ConfigDict) -> list[str]:
    """The hyperparameters by which runs are told apart: a few always, and of what decides on the
    network and its training what differs from the defaults."""
    usual = hyperparameters(config_lib.default_config())
    changed = [name for name, value in hyperparameters(config).items() if usual.get(name) != value]
    return sorted({*_ALWAYS, *(name for name in changed if name.split(".")[0] in _SECTIONS)})


def hyperparameters(config: ConfigDict) -> dict[str, Any]:
    """A config as flat names and plain values."""
    flat = {}
    for section, values in config.items():
        pairs = values.items() if isinstance(values, ConfigDict) else [(None, values)]
        for name, value in pairs:
            if isinstance(value, str | tuple):  # a path need not be UTF-8
                value = pictures.printable(str(value))
            flat[f"{section}.{name}" if name else section] = value
    return flat
