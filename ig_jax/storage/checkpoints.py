"""Checkpoints of a run: parameters, EMA, optimiser, data iterator and the config that made them.

They are separate items of one Orbax step, so that sampling reads the EMA weights and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint._src.metadata import array_metadata_store

from ig_jax import config as config_lib
from ig_jax import console
from ig_jax.errors import InputError, reason
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import check_name, resolve
from ig_jax.storage import manifest
from ig_jax.storage.manifest import UntrustedError

log = logging.getLogger("ig_jax")

FOLDER = "checkpoints"
ARRAYS = ("params", "ema", "optimizer")
ITEMS = (*ARRAYS, "config", "data", "source")
# A checkpoint that training does not trust is kept under this name.
UNTRUSTED = "{step}.untrusted"
# Of an array of which devices hold copies each writes a slice, if that is of as many bytes. Smaller
# ones take longer to slice than to write: a millisecond a device and array.
_WORTH_SLICING = 1 << 20
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


@dataclasses.dataclass
class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Keeps `best_step`, where Orbax's own policy would compare scores of any name."""

    directory: epath.Path

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        best = best_step({info.step: self._metrics(info) for info in checkpoints})
        return [info.step == best for info in checkpoints]

    def _metrics(self, info: Any) -> Mapping[str, float] | None:
        """Of this run's own checkpoints Orbax knows them, the others' are read."""
        with contextlib.suppress(UntrustedError):
            return info.metrics or _saved_metrics(self.directory, info.step)
        return None


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
        read_only: never creates or deletes anything. Otherwise what a killed run left half written
            is removed: only one run may write at a time.
        verify: whether arrays that are read are compared with their checksums; their files' sizes
            and all else always are.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        max_to_keep: int = 3,
        read_only: bool = False,
        verify: bool = True,
    ):
        self.directory = find_workdir(workdir) / FOLDER
        self._verify, self._saving, self._read_back = verify, 0, read_only
        policy = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(max_to_keep), _KeepBest(self.directory)]
        )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Orbax stores scores only if told how to rank them; `best_step` does.
            best_fn=lambda metrics: next(iter(metrics.values())),
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # It would read every checkpoint's scores, and fail where one is damaged.
            lightweight_initialize=True,
            async_options=None
            if read_only
            else ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        handler = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_WORTH_SLICING,
            array_metadata_store=array_metadata_store.Store(),  # as Orbax's own has
        )
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=ITEMS)

    def steps(self) -> list[int]:
        """Steps that are on disk, ascending."""
        return _steps(self.directory)

    def step(self, which: int | str = "last") -> int:
        """Resolves "last", "best" or a number to a step.

        Raises:
            InputError: there is no such step, or, for "best", no step with a score.
        """
        return _find_step(self.directory, self.steps(), which)

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

        The first one is waited for, and its structure read back: what cannot be read should show
        at once.

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
        self._manager.wait_until_finished()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(getattr(state, name)) for name in ARRAYS},
                config=ocp.args.JsonSave(config_lib.to_json(config)),
                data=ocp.args.JsonSave(data),
                source=ocp.args.JsonSave(source or {}),
            ),
            metrics=None if score is None else {score.name: score.value},
        )
        if not self._read_back:
            self.wait()
            self._check_structure(state, step)
            self._read_back = True

    def _write_manifest(self) -> None:
        """Called by Orbax on the primary process, in the background, when all items are written.

        A folder gets its name after that, so that whatever is committed has a manifest; a bucket's
        has its name from the start, and a marker makes it count.
        """
        final = self.directory / str(self._saving)
        partial = final.with_name(final.name + orbax_path.step.TMP_DIR_SUFFIX)
        manifest.write(partial if partial.exists() else final, self._saving)

    def _check_structure(self, state: State, step: int) -> None:
        """Raises `UntrustedError` unless the arrays on disk have the state's names and shapes."""
        found = self._manager.item_metadata(step)
        for name in ARRAYS:
            expected = jax.tree.map(np.shape, ocp.utils.serialize_tree(getattr(state, name), True))
            shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), found[name].tree)
            if jax.tree.leaves(expected) != jax.tree.leaves(shapes):
                raise UntrustedError(
                    self.directory / str(step), f"{name} reads back as {shapes}, not {expected}"
                )

    def restore(self, abstract: S, which: int | str = "last") -> Restored[S]:
        """Restores a training state onto the shapes and shardings of `abstract`.

        Raises:
            UntrustedError: the checkpoint is not what was written.
        """
        step = self.step(which)
        arrays = {name: ocp.args.StandardRestore(getattr(abstract, name)) for name in ARRAYS}
        items = self._restore(step, **arrays)
        data = _saved_json(self.directory, step, "data")
        # Weights that were converted start the data from the beginning.
        if data.get("step", 0) != step:
            raise UntrustedError(
                self.directory / str(step), f"its data iterator is {data}, expected step {step}"
            )
        counter = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        arrays = {name: items[name] for name in ARRAYS}
        return Restored(abstract.replace(step=counter, **arrays), data)

    def resume(self, abstract: S) -> Restored[S] | None:
        """As `restore`, from the newest checkpoint that can be trusted; None if there are none.

        Newer ones are renamed, so that the run can save these steps again; a line says why.

        Raises:
            UntrustedError: there are checkpoints, and none can be trusted.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(abstract, step)
            except UntrustedError as error:
                problems.append(error)
                continue
            if problems:
                self._set_aside(problems, step)
            return restored
        if problems:
            raise problems[0]
        return None

    def _set_aside(self, problems: Iterable[UntrustedError], step: int) -> None:
        self._manager.close()
        for problem in problems if is_primary() else ():
            kept = UNTRUSTED.format(step=problem.folder.name)
            while (problem.folder.parent / kept).exists():
                kept += "-"
            problem.folder.rename(problem.folder.parent / kept)
            log.warning("%s; kept as %s, continuing from step %d", problem, kept, step)
        hosts.wait_for_all("untrusted checkpoints")
        self._manager = self._open()

    def weights(self, abstract: Any, which: int | str = "last", ema: bool = True) -> Any:
        """Restores the EMA (or raw) parameters onto the shapes and shardings of `abstract`."""
        name = "ema" if ema else "params"
        args = {name: ocp.args.StandardRestore(abstract)}
        with _naming_others(self.directory):
            return self._restore(self.step(which), **args)[name]

    def _restore(self, step: int, **items: Any) -> Any:
        folder = self.directory / str(step)
        with console.stage("checking the checkpoint"):
            verified = manifest.check(folder, items, content=self._verify, shared=True)
        try:
            with console.stage("reading the checkpoint"):
                return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            names, why = ", ".join(items), reason(error)
            if verified and self._verify:
                raise InputError(
                    f"{folder} cannot be read as {names} of this config: {why}"
                ) from error
            raise UntrustedError(folder, f"{names} cannot be read ({why})") from error

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to take this machine away (agreed on by all processes)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        with console.stage("writing the checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases threads."""
        self.wait()
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


def saved_config(workdir: epath.PathLike, which: int | str = "last") -> ConfigDict:
    """The config of a workdir's checkpoint; raises `InputError` as `Checkpoints.step` does."""
    directory = find_workdir(workdir) / FOLDER
    with _naming_others(directory):
        return _config(directory, find_step(workdir, which))


def resumed_config(workdir: epath.PathLike) -> ConfigDict | None:
    """The config of the newest checkpoint whose config can be trusted; None if there are none.

    Raises:
        UntrustedError: there are checkpoints, and none of their configs can be trusted.
    """
    directory = find_workdir(workdir) / FOLDER
    problems = []
    for step in reversed(_steps(directory)):
        try:
            return _config(directory, step)
        except UntrustedError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return None


def saved_source(workdir: epath.PathLike, which: int | str = "last") -> dict[str, Any] | None:
    """The `DataSource.facts` in a workdir's checkpoint; None if it was converted."""
    directory = find_workdir(workdir) / FOLDER
    with _naming_others(directory):
        return _saved_json(directory, find_step(workdir, which), "source") or None


def _config(directory: epath.Path, step: int) -> ConfigDict:
    values = _saved_json(directory, step, "config")
    return config_lib.from_json(values, f"the config of {directory.parent}")


def _saved_json(directory: epath.Path, step: int, item: str, file: str = "metadata") -> Any:
    """Reads a JSON item of a checkpoint without Orbax.

    An Orbax manager would start JAX's devices, which must wait until the processes of a run have
    found each other.
    """
    folder = directory / str(step)
    manifest.check(folder, [item])
    try:
        return json.loads((folder / item / file).read_text())
    except (OSError, ValueError) as error:
        raise UntrustedError(folder, f"{item} cannot be read ({error})") from error


@contextlib.contextmanager
def _naming_others(directory: epath.Path) -> Iterator[None]:
    """Adds to the line on an untrusted checkpoint which others there are, and how to take one."""
    try:
        yield
    except UntrustedError as error:
        others = [str(step) for step in _steps(directory) if str(step) != error.folder.name]
        remedy = "; there is no other checkpoint"
        if others:
            remedy = (
                f"; an older one is taken with --step=N (config.guidance.weak_step of a weak "
                f"network): there are {', '.join(others)}"
            )
        raise UntrustedError(error.folder, error.reason, remedy) from error


def _steps(directory: epath.Path) -> list[int]:
    """The steps of committed checkpoints, as Orbax sees them: `00070` or a file `70` is none."""
    if not directory.exists():
        return []
    folders = [p for p in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name)]
    return sorted(int(path.name) for path in folders if _committed(path))


def _committed(folder: epath.Path) -> bool:
    if "://" in str(folder):
        return (folder / orbax_path.atomicity.COMMIT_SUCCESS_FILE).exists()
    return folder.is_dir()


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
    if not (directory / str(step) / "metrics").exists():
        return None
    return _saved_json(directory, step, "metrics", "metrics")
