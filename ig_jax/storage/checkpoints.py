"""Checkpoints of a run: parameters, EMA, optimiser, data iterator and the config that made them.

They are separate items of one Orbax step, so that sampling reads the EMA weights and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from ig_jax import config as config_lib
from ig_jax.errors import InputError
from ig_jax.paths import check_name, resolve

FOLDER = "checkpoints"
ITEMS = ("params", "ema", "optimizer", "config", "data", "source")
# What scores were called before they had names: a validation loss or a FID, who knows.
_UNNAMED = "score"


@dataclasses.dataclass(frozen=True)
class Score:
    """What ranks a checkpoint among those whose score has the same name; smaller is better.

    Attributes:
        name: everything that two values must share to be comparable: "validation_loss", or a FID
            with its number of samples, guidance and so on.
        value: the number.
    """

    name: str
    value: float


def best_step(metrics: Mapping[int, Mapping[str, float] | None]) -> int | None:
    """The step with the smallest score, among those that the newest score can be compared with.

    Args:
        metrics: step → {name of its score: value}, or None for a step without one. Scores that
            older versions saved without a name count where there is no other.

    Returns:
        The step (the later one of equals), or None if no step has a finite score.
    """
    scores = {
        step: Score(*item)
        for step, found in sorted(metrics.items())
        for item in (found or {}).items()
        if math.isfinite(item[1])
    }
    names = [score.name for score in scores.values() if score.name != _UNNAMED] or [_UNNAMED]
    values = {step: score.value for step, score in scores.items() if score.name == names[-1]}
    return min(values, key=lambda step: (values[step], -step), default=None)


class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Keeps `best_step`, where Orbax's own policy would compare scores of any name."""

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        best = best_step({info.step: info.metrics for info in checkpoints})
        return [info.step == best for info in checkpoints]


class State(Protocol):
    """What is saved of a training state: pytrees of arrays, or of their shapes and shardings."""

    step: Any
    params: Any
    ema: Any
    optimizer: Any

    def replace(self, **changes: Any) -> Self:
        """A copy with other arrays."""
        ...


S = TypeVar("S", bound=State)


@dataclasses.dataclass(frozen=True)
class Restored(Generic[S]):
    """A restored training state and its data iterator's state (JSON values)."""

    state: S
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`: the last few and the best one are kept.

    Args:
        workdir: local or `gs://` directory.
        max_to_keep: how many of the latest are kept.
        read_only: never creates or deletes anything.
    """

    def __init__(
        self,
        workdir: str,
        *,
        max_to_keep: int = 3,
        read_only: bool = False,
    ):
        self.directory = find_workdir(workdir) / FOLDER
        policy = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(max_to_keep), _KeepBest()]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Orbax stores scores only if told how to rank them; `best_step` does.
            best_fn=lambda metrics: next(iter(metrics.values())),
            best_mode="min",
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def step(self, which: int | str = "last") -> int:
        """Resolves "last", "best" or a number to a step.

        Raises:
            InputError: there is no such step, or, for "best", no step with a score.
        """
        return _find_step(self.directory, self.steps(), which)

    def config(self, which: int | str = "last") -> ConfigDict:
        """The config that made a checkpoint."""
        items = self._restore(which, config=ocp.args.JsonRestore())
        return config_lib.from_json(items["config"], f"the config in {self.directory}")

    def save(
        self,
        state: State,
        step: int,
        config: ConfigDict,
        data: dict[str, Any],
        score: Score | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint in the background; `wait` ends it. Repeats are ignored.

        Args:
            state: the training state.
            step: its step.
            config: the config that made it.
            data: the data iterator's state.
            score: what decides on the best checkpoint.
            source: `DataSource.facts`, so that sampling needs no data set.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave(state.optimizer),
                config=ocp.args.JsonSave(config_lib.to_json(config)),
                data=ocp.args.JsonSave(data),
                source=ocp.args.JsonSave(source or {}),
            ),
            metrics=None if score is None else {score.name: score.value},
        )

    def restore(self, abstract: S, which: int | str = "last") -> Restored[S]:
        """Restores a training state onto the shapes and shardings of `abstract`."""
        step = self.step(which)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            ema=ocp.args.StandardRestore(abstract.ema),
            optimizer=ocp.args.StandardRestore(abstract.optimizer),
            data=ocp.args.JsonRestore(),
        )
        counter = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        arrays = {name: items[name] for name in ("params", "ema", "optimizer")}
        return Restored(abstract.replace(step=counter, **arrays), items["data"])

    def weights(self, abstract: Any, which: int | str = "last", ema: bool = True) -> Any:
        """Restores the EMA (or raw) parameters onto the shapes and shardings of `abstract`."""
        name = "ema" if ema else "params"
        return self._restore(which, **{name: ocp.args.StandardRestore(abstract)})[name]

    def _restore(self, which: int | str, **items: Any) -> Any:
        return self._manager.restore(self.step(which), args=ocp.args.Composite(**items))

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to take this machine away (agreed on by all processes)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def find_workdir(path: epath.PathLike) -> epath.Path:
    """The workdir that a path means: the path, or its parent if it is a workdir's `checkpoints`.

    Args:
        path: as typed; it need not exist.

    Raises:
        InputError: it is one checkpoint (the line says how to name its workdir and step), or named
            as no workdir can be.
    """
    path = resolve(path)
    check_name(path)
    if (path / FOLDER).exists():
        return path
    if path.parent.name == FOLDER and path.name.isdigit() and path.exists():
        workdir = path.parent.parent
        raise InputError(
            f"{path} is one checkpoint of a workdir: expected the workdir, as in "
            f"--workdir={workdir} --step={path.name}"
        )
    return path.parent if path.name == FOLDER and _steps(path) else path


def parse_step(text: str, what: str = "--step") -> int | str:
    """What a flag or field says of a step: "last", "best" or a number; raises `InputError`."""
    if text in ("last", "best"):
        return text
    if not re.fullmatch("[0-9]+", text):
        raise InputError(f"{what} is {text!r}: expected last, best, or the number of a step")
    return int(text)


def find_step(workdir: epath.PathLike, which: int | str = "last") -> int:
    """As `Checkpoints.step`, without Orbax, whose managers start JAX's devices."""
    directory = find_workdir(workdir) / FOLDER
    return _find_step(directory, _steps(directory), which)


def saved_config(workdir: str, which: int | str = "last") -> ConfigDict:
    """The config of a workdir's checkpoint; raises `InputError` as `Checkpoints.step` does."""
    return config_lib.from_json(_saved_json(workdir, which, "config"), f"the config of {workdir}")


def saved_source(workdir: str, which: int | str = "last") -> dict[str, Any] | None:
    """The `DataSource.facts` in a workdir's checkpoint; None if it was converted."""
    return _saved_json(workdir, which, "source") or None


def _saved_json(workdir: str, which: int | str, item: str) -> dict[str, Any]:
    """Reads a JSON item of a checkpoint without Orbax.

    An Orbax manager would start JAX's devices, which must wait until the processes of a run have
    found each other.
    """
    directory, step = find_workdir(workdir) / FOLDER, find_step(workdir, which)
    return json.loads((directory / str(step) / item / "metadata").read_text())


def _steps(directory: epath.Path) -> list[int]:
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def _find_step(directory: epath.Path, steps: Sequence[int], which: int | str) -> int:
    """Resolves `which` among the (ascending) steps in a directory; see `Checkpoints.step`."""
    if not steps:
        raise InputError(
            f"no checkpoint in {directory}: expected a workdir that --mode=train wrote"
        )
    if which == "last":
        return steps[-1]
    if which == "best":
        best = best_step({step: _saved_metrics(directory, step) for step in steps})
        if best is None:
            raise InputError(
                f"no checkpoint in {directory} carries a score: expected a run that validates "
                "(config.train.validate_every) or evaluates (config.evaluation.every) to have a "
                f"best one; there are {', '.join(map(str, steps))}"
            )
        return best
    if str(which) not in map(str, steps):
        raise InputError(
            f"no checkpoint of step {which} in {directory}: there are {', '.join(map(str, steps))}"
        )
    return int(which)


def _saved_metrics(directory: epath.Path, step: int) -> dict[str, float] | None:
    path = directory / str(step) / "metrics" / "metrics"
    return json.loads(path.read_text()) if path.exists() else None
