"""The least time that a training step can take on a TPU that need not be there: its arithmetic, its
memory traffic and its exchange, each at the rate of the data sheet, as if nothing else mattered."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from ig_jax.experiment import Experiment
from ig_jax.models.trunk import TrunkSpec
from ig_jax.plan import hlo
from ig_jax.plan.topology import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one step.

    Attributes:
        flops: floating-point operations, recomputation included.
        memory: bytes read from and written to its memory, at least.
        exchange: bytes of the arrays that it exchanges with others.
        model_flops: its share of three forward passes of the batch by the model's formula.
    """

    flops: float
    memory: float
    exchange: float
    model_flops: float


@dataclasses.dataclass(frozen=True)
class Bound:
    """The roofline of one step; it assumes that arithmetic, memory and links overlap perfectly.

    Attributes:
        work: of one device.
        chip: its data sheet.
        cores: devices that share the chip.
    """

    work: Work
    chip: Chip
    cores: int = 1

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that each part takes by itself."""
        work, chip = self.work, self.chip
        return {
            "arithmetic": work.flops * self.cores / chip.flops,
            "memory": work.memory * self.cores / chip.memory_rate,
            "exchange": work.exchange * self.cores / chip.exchange_rate,
        }

    @property
    def seconds(self) -> float:
        """No step takes less."""
        return max(self.parts.values())

    @property
    def mfu(self) -> float:
        """No step makes better use of the chip: the model's own operations over the chip's."""
        return self.work.model_flops * self.cores / self.chip.flops / self.seconds

    def line(self) -> str:
        """The bound in words."""
        work, parts = self.work, self.parts
        amounts = {
            "arithmetic": f"{work.flops / 1e12:.2f} TFLOP",
            "memory": f"{work.memory / 1e9:.1f} GB",
            "exchange": f"{work.exchange / 1e9:.2f} GB",
        }
        each = ", ".join(f"{n} {1e3 * s:.0f} ms ({amounts[n]})" for n, s in parts.items())
        limit = max(parts, key=parts.__getitem__)
        return (
            f"at least {1e3 * self.seconds:.0f} ms, by {limit}, so MFU at most {self.mfu:.0%}: "
            f"{each}; rates of {self.chip.source}"
        )


def step_work(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    compile_step: Callable[[Experiment], jax.stages.Compiled],
    exchanges: Mapping[str, hlo.Collective],
) -> Work | None:
    """Counts a training step's work as `whole_cost` does.

    Muon's iteration stays a loop: its repetitions are left out, and the bound remains one.

    Args:
        config: of the run.
        devices: what it is compiled for.
        compile_step: compiles an experiment's step.
        exchanges: of the whole step, by kind.

    Returns:
        The work, or None for a network that is no `Trunk`.
    """
    spec = Experiment.from_config(config, devices).spec
    if not isinstance(spec, TrunkSpec):
        return None
    flops, memory = whole_cost(config, devices, compile_step)
    model = 3.0 * spec.forward_flops() * config.train.batch_size / len(devices)
    return Work(flops, memory, sum(found.bytes for found in exchanges.values()), model)


def whole_cost(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    compile_one: Callable[[Experiment], jax.stages.Compiled],
) -> tuple[float, float]:
    """A program's floating-point operations, and the bytes that it moves to and from memory at
    least, from two shallow networks without loops.

    The compiler's own count takes the body of a loop once. Unrolled networks one and two blocks
    deeper than their heads give the cost of a block, and of all that is no block.

    Args:
        config: of a `Trunk`.
        devices: what it is compiled for.
        compile_one: compiles an experiment's program.
    """
    spec = Experiment.from_config(config, devices).spec
    shallow, heads = [], len(spec.auxiliary_depths)
    for depth in (heads + 1, heads + 2):
        changed = copy.deepcopy(config)
        auxiliary = tuple(range(1, heads + 1))
        changed.model.update(depth=depth, scan_blocks=False)
        changed.model.auxiliary_depth = auxiliary if heads > 1 else heads
        changed.train.accumulate = 1
        compiled = compile_one(Experiment.from_config(changed, devices))
        flops, memory = compiled.cost_analysis()["flops"], hlo.memory_traffic(compiled.as_text())
        shallow.append((flops, float(memory)))
    rest = spec.depth - heads - 1
    flops, memory = (one + rest * (two - one) for one, two in zip(*shallow, strict=True))
    return flops, memory
