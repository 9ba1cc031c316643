"""Checkpoints of a run: parameters, EMA, optimiser, data iterator and the config that made them.

They are separate items of one Orbax step, so that sampling reads the EMA weights and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from ig_jax import config as config_lib
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError
from ig_jax.training.state import TrainState

# Name of the one number that Orbax compares checkpoints by.
SCORE = "score"
ITEMS = ("params", "ema", "optimizer", "config", "data", "source")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored training state and its data iterator's state (JSON values)."""

    state: TrainState
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
        self.directory = epath.Path(workdir) / "checkpoints"
        keep = checkpoint_managers
        policy = keep.AnyPreservationPolicy(
            [
                keep.LatestN(max_to_keep),
                keep.BestN(
                    get_metric_fn=lambda metrics: metrics[SCORE],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[SCORE],
            best_mode="min",
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def step(self, which: int | str = "last") -> int:
        """Resolves "last", "best" or a number to a step; raises `InputError` if there is none."""
        steps = self.steps()
        if not steps:
            raise InputError(
                f"no checkpoint in {self.directory}: expected a workdir that --mode=train wrote"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if int(which) not in steps:
            raise InputError(
                f"no checkpoint of step {which} in {self.directory}: "
                f"there are {', '.join(map(str, steps))}"
            )
        return int(which)

    def config(self, which: int | str = "last") -> ConfigDict:
        """The config that made a checkpoint."""
        items = self._restore(which, config=ocp.args.JsonRestore())
        return config_lib.from_json(items["config"])

    def save(
        self,
        state: TrainState,
        step: int,
        config: ConfigDict,
        data: dict[str, Any],
        score: float | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint in the background; `wait` ends it. Repeats are ignored.

        Args:
            state: the training state.
            step: its step.
            config: the config that made it.
            data: the data iterator's state.
            score: what decides on the best checkpoint, smaller is better: FID, or validation loss.
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
            metrics=None if score is None else {SCORE: score},
        )

    def restore(self, abstract: TrainState, which: int | str = "last") -> Restored:
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
        state = TrainState(counter, items["params"], items["ema"], items["optimizer"])
        return Restored(state, items["data"])

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


def saved_config(workdir: str) -> ConfigDict:
    """The config of a workdir's last checkpoint; raises `InputError` if there is no checkpoint."""
    return config_lib.from_json(_saved_json(workdir, "config"))


def saved_source(workdir: str) -> DataSource | None:
    """What a workdir's last checkpoint says of the data set; None if it was converted."""
    facts = _saved_json(workdir, "source")
    return DataSource.from_facts(facts) if facts else None


def _saved_json(workdir: str, item: str) -> dict[str, Any]:
    """Reads a JSON item of the last checkpoint without Orbax.

    An Orbax manager would start JAX's devices, which must wait until the processes of a run have
    found each other.
    """
    directory = epath.Path(workdir) / "checkpoints"
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
    steps = [int(name) for name in names if name.isdigit()]
    if not steps:
        raise InputError(
            f"no checkpoint in {directory}: expected a workdir that --mode=train wrote"
        )
    return json.loads((directory / str(max(steps)) / item / "metadata").read_text())
