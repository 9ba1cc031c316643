"""`--mode=compile`: the train step and the sampler compiled for a TPU that need not be there, from
shapes alone, to see before paying for a pod whether a run fits and what its devices exchange."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import math
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, sampling
from ig_jax.data.source import DataSource
from ig_jax.errors import InputError, suggest
from ig_jax.experiment import Experiment
from ig_jax.models import dit
from ig_jax.training import loop, sharding

GIB = 2**30
# Memory of one chip in GiB (Google Cloud, "TPU versions"), by the kind that JAX calls it.
HBM_GIB = {
    "TPU v2": 16,
    "TPU v3": 32,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
}
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:4x4", "v6e:16x16")
LIBTPU = "libtpu==0.0.42.*"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices in one run of a program.

    Attributes:
        count: how often it happens, scanned layers counted one by one.
        bytes: sizes of the whole arrays exchanged, by one device, added up.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one program; bytes are those of one device.

    Attributes:
        name: "train step" or "sampler".
        seconds: time to trace and compile.
        arguments: bytes of state and batch.
        temporaries: bytes of everything in between.
        peak: bytes needed at once: arguments, results not written over them, and temporaries; for
            a program that the compiler refused, the least it asked for.
        fits: whether `peak` is within the device's memory (True if that is unknown).
        collectives: what devices exchange, by kind ("all-gather", …).
    """

    name: str
    seconds: float
    arguments: int
    temporaries: int
    peak: int
    fits: bool
    collectives: dict[str, Collective]


@dataclasses.dataclass(frozen=True)
class Report:
    """The plan of a run on certain devices; bytes are those of one device.

    Attributes:
        devices: their number, kind and mesh in words.
        choices: the config fields that decide on memory, by name.
        parameters: number of parameters.
        forward_flops: floating-point operations of one forward pass of one image.
        state_bytes: of "parameters", "EMA" and "optimiser".
        memory: bytes of one device's memory, or None if unknown.
        programs: the train step and the sampler.
        advice: config fields to change, with values, that make everything fit; empty if it does,
            None if no single change of those tried would.
    """

    devices: str
    choices: dict[str, Any]
    parameters: int
    forward_flops: int
    state_bytes: dict[str, int]
    memory: int | None
    programs: tuple[Compiled, ...]
    advice: dict[str, Any] | None

    @property
    def fits(self) -> bool:
        """Whether every program fits into a device's memory."""
        return all(program.fits for program in self.programs)

    def table(self) -> str:
        """The report in plain text, as `--mode=compile` prints it."""
        choices = ", ".join(f"{name} {value}" for name, value in self.choices.items())
        state = ", ".join(f"{name} {_gib(size)}" for name, size in self.state_bytes.items())
        giga = self.forward_flops / 1e9
        lines = [
            self.devices,
            choices,
            f"{self.parameters / 1e6:.1f} M parameters; on each device: {state}",
            f"{giga:.1f} GFLOP an image forward, {3 * giga:.1f} GFLOP in training",
        ]
        for program in self.programs:
            lines += ["", *self._program_lines(program)]
        return "\n".join([*lines, "", self._verdict()])

    def _program_lines(self, program: Compiled) -> Iterator[str]:
        yield f"{program.name}: compiled in {program.seconds:.0f} s"
        if not program.temporaries:
            yield f"  memory: refused by the compiler: needs {_gib(program.peak)} or more"
            return
        spare = ""
        if self.memory:
            spare = f" of {_gib(self.memory)} ({1 - program.peak / self.memory:.0%} to spare)"
        yield (
            f"  memory: arguments {_gib(program.arguments)}, "
            f"temporaries {_gib(program.temporaries)}, peak {_gib(program.peak)}{spare}"
        )
        for kind, found in sorted(program.collectives.items()):
            yield f"  {kind:18} {found.count:6,} × {found.bytes / 1e6:12,.1f} MB in all"
        if not program.collectives:
            yield "  no exchange between devices"

    def _verdict(self) -> str:
        if self.memory is None:
            return "memory of these devices unknown: compare the peak with theirs"
        if self.fits:
            return "it fits"
        if self.advice is None:
            return "it does not fit, nor with any one change tried: use a larger topology"
        fields = " ".join(f"--config.{name}={value}" for name, value in self.advice.items())
        return f"it does not fit; it would with {fields}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def run(config: ConfigDict, workdir: str) -> str:
    """`--mode=compile`: compiles for `config.mesh.topology` (the present devices if empty).

    Returns:
        The report, to be printed. Raises `InputError` for an unknown topology, a mesh or batch that
        does not fit it, or where libtpu is not installed.
    """
    del workdir
    return report(config).table()


def report(config: ConfigDict, programs: Sequence[str] = ("train step", "sampler")) -> Report:
    """Compiles a config's programs from shapes alone: no data, weights or TPU needed.

    Args:
        config: a complete config; `mesh.topology` names the devices, e.g. "v5e:4x4", with "*2" at
            the end for two slices.
        programs: which to compile.

    Returns:
        The report. Raises `InputError` as `run` does.
    """
    devices = topology_devices(config.mesh.topology) if config.mesh.topology else jax.devices()
    config = _resolve(config, devices)
    memory = device_memory(devices)
    experiment = Experiment.from_config(config, devices)
    with console.progress_bar(len(programs), "compiling") as advance:
        compiled = []
        for name in programs:
            compiled.append(_compile(name, experiment, memory))
            advance()
    advice: dict[str, Any] | None = {}
    for program in compiled:
        if not program.fits and advice is not None:
            change = _smallest_change(program.name, config, devices, memory)
            advice = None if change is None else advice | change
    shapes = loop.make_programs(experiment, _shapes_only(experiment)).shapes
    mesh = experiment.mesh.shape
    return Report(
        devices=(
            f"{len(devices)} × {devices[0].device_kind}"
            f"{f' ({config.mesh.topology})' if config.mesh.topology else ''}: "
            f"data {mesh['data']} × fsdp {mesh['fsdp']}"
        ),
        choices={name: _field(config, name) for name in _CHOICES},
        parameters=dit.parameter_count(experiment.shapes),
        forward_flops=dit.forward_flops(experiment.spec),
        state_bytes={
            "parameters": sharding.bytes_per_device(shapes.params),
            "EMA": sharding.bytes_per_device(shapes.ema),
            "optimiser": sharding.bytes_per_device(shapes.optimizer),
        },
        memory=memory,
        programs=tuple(compiled),
        advice=advice,
    )


_CHOICES = (
    "model.family",
    "model.size",
    "model.dtype",
    "model.remat",
    "train.batch_size",
    "train.accumulate",
    "sampler.batch_size",
)


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, made up by the TPU compiler.

    Args:
        topology: generation and chips, e.g. "v5e:4x4"; "*2" at the end means two slices of it.

    Returns:
        Device descriptions to build a mesh of. Raises `InputError`.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"config.mesh.topology is {topology!r}: compiling for a TPU needs its compiler; "
            f'pip install "{LIBTPU}"'
        )
    name, star, slices = topology.partition("*")
    if star and not slices.isdecimal():
        raise InputError(f"config.mesh.topology is {topology!r}: expected a number after '*'")
    from jax.experimental import topologies

    # libtpu looks for a TPU machine and, where there is none, says so in a dozen lines.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # It also keeps a second process out, for the sake of a TPU that is not used here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"num_slices": int(slices)} if star else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(
            f"config.mesh.topology is {topology!r}: expected a TPU topology such as "
            f"{', '.join(TOPOLOGIES)}{suggest(name, TOPOLOGIES)} ({str(error).splitlines()[0]})"
        ) from None


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of memory of one device, or None where that is unknown (a CPU)."""
    kind = devices[0].device_kind
    if kind in HBM_GIB:
        cores = 1 + max(device.core_on_chip for device in devices)
        return HBM_GIB[kind] * GIB // cores
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError, NotImplementedError):
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    return None


def _resolve(config: ConfigDict, devices: Sequence[jax.Device]) -> ConfigDict:
    """Fixes what "auto" means on `devices`, which need not be the present ones."""
    config = copy.deepcopy(config)
    automatic = "float32" if devices[0].platform == "cpu" else "bfloat16"
    if config.model.dtype == "auto":
        config.model.dtype = automatic
    if config.optimizer.newton_schulz_dtype == "auto":
        config.optimizer.newton_schulz_dtype = automatic
    return config


def _shapes_only(experiment: Experiment) -> DataSource:
    """A data set without data, for programs that are only compiled."""
    return DataSource(
        train=(),
        validation=None,
        shape=experiment.sample_shape,
        num_classes=experiment.spec.num_classes,
        class_names=(),
        shift=np.zeros(1, np.float32),
        scale=np.ones(1, np.float32),
        autoencoder=None,
    )


def _batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one global training batch."""
    config = experiment.config
    place = sharding.batch_sharding(experiment.mesh)

    def array(*shape: int, dtype: type = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=place)

    sampled = config.data.name == "latents" and config.data.autoencoder.startswith("sd-vae")
    pixels = np.uint8 if config.data.name in ("folder", "tfds") else np.float32
    names = ("mean", "std") if sampled else ("x",)
    images = {name: array(*experiment.sample_shape, dtype=pixels) for name in names}
    return {"label": array(dtype=np.int32)} | images


def lower_train_step(experiment: Experiment) -> jax.stages.Lowered:
    """The train step of an experiment, lowered for its mesh from shapes alone."""
    programs = loop.make_programs(experiment, _shapes_only(experiment))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return programs.step.lower(programs.shapes, _batch(experiment), key)


def lower_sampler(experiment: Experiment) -> jax.stages.Lowered:
    """The sampler of an experiment, lowered for its mesh from shapes alone."""
    guidance = config_lib.guidance(experiment.config)
    return sampling.make_drawer(experiment).lower(experiment.abstract_params(), guidance)


_LOWER: dict[str, Callable[[Experiment], jax.stages.Lowered]] = {
    "train step": lower_train_step,
    "sampler": lower_sampler,
}


def _compile(name: str, experiment: Experiment, memory: int | None) -> Compiled:
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            # JAX's cache on disk, if in use, cannot read back programs of absent devices.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            compiled = _LOWER[name](experiment).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _refused(str(error))
        if needed is None:
            raise
        return Compiled(name, time.monotonic() - start, 0, 0, needed, False, {})
    seconds = time.monotonic() - start
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes
    return Compiled(
        name=name,
        seconds=seconds,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        peak=peak,
        fits=memory is None or peak <= memory,
        collectives=collectives(compiled.as_text()),
    )


def _refused(message: str) -> int | None:
    """Bytes that a program asked for which the compiler found too large, or None if that is not
    what the message says."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = [
        float(n) * {"M": 2**20, "G": GIB}[u] for n, u in re.findall(r"([\d.]+)([MG])", message)
    ]
    return int(max(sizes, default=0))


def _field(config: ConfigDict, name: str) -> Any:
    section, field = name.split(".")
    return config[section][field]


def _changes(name: str, config: ConfigDict, devices: int) -> Iterator[tuple[str, Any]]:
    """Single changes of a config that save memory, the least costly first."""
    if name == "sampler":
        batch = config.sampler.batch_size
        while (batch := batch // 2) >= devices:
            yield "sampler.batch_size", batch
        return
    fsdp = config.mesh.fsdp
    while (fsdp := 2 * fsdp) <= devices:
        yield "mesh.fsdp", fsdp
    policies = ("none", "dots", "full")
    for remat in policies[policies.index(config.model.remat) + 1 :]:
        yield "model.remat", remat
    accumulate = config.train.accumulate
    while config.train.batch_size // (accumulate := 2 * accumulate) >= devices:
        yield "train.accumulate", accumulate
    batch = config.train.batch_size
    while (batch := batch // 2) >= devices * config.train.accumulate:
        yield "train.batch_size", batch


def _smallest_change(
    name: str, config: ConfigDict, devices: Sequence[jax.Device], memory: int | None
) -> dict[str, Any] | None:
    """Finds, by compiling, the first change of one field with which a program fits."""
    for field, value in _changes(name, config, len(devices)):
        changed = copy.deepcopy(config)
        section, key = field.split(".")
        changed[section][key] = value
        if field == "mesh.fsdp":
            changed.mesh.data = -1
        try:
            experiment = Experiment.from_config(changed, devices)
        except InputError:
            continue
        if _compile(name, experiment, memory).fits:
            return {field: value} | ({"mesh.data": -1} if field == "mesh.fsdp" else {})
    return None


# Reading a compiled program.

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# Groups of one device each, as an axis of size 1 makes.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")


@dataclasses.dataclass
class _Computation:
    """One computation of an HLO module: its exchanges, what it calls how often, and its lines."""

    lines: list[str] = dataclasses.field(default_factory=list)
    found: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)


def collectives(hlo: str) -> dict[str, Collective]:
    """Counts what one device exchanges in one run of a compiled program.

    Args:
        hlo: the optimised module's text, of a TPU, GPU or CPU.

    Returns:
        By kind, its count and bytes, the bodies of loops taken as often as they run. A TPU's
        all-reduce whose result is at once cut into pieces counts as the reduce-scatter that it is.
    """
    module, entry = _read(hlo)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for kind, size in module[name].found:
            counts[kind] += times
            sizes[kind] += times * size
        for called, calls in module[name].calls.items():
            visit(called, times * calls)

    visit(entry, 1)
    return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}


def _read(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Reads a module: its computations by name, and the name of its entry."""
    module: dict[str, _Computation] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            module[name] = _Computation()
            entry = name if header[1] else entry
        elif _INSTRUCTION.match(line):
            module[name].lines.append(line)
    for name, computation in module.items():
        computation.found = _exchanges(name, computation.lines)
        for line in computation.lines:
            computation.calls.update(_calls(line, module))
    return module, entry


def _calls(line: str, module: dict[str, _Computation]) -> dict[str, int]:
    """The computations that an instruction runs, and how often."""
    if _INSTRUCTION.match(line)[3] != "while":
        branches = [n.strip(" %") for names in _BRANCHES.findall(line) for n in names.split(",")]
        return Counter(_CALLED.findall(line) + branches)
    condition, body = (re.search(rf"{key}=%?([\w.-]+)", line)[1] for key in ("condition", "body"))
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return {body: int(known[1])}
    # A scan counts up to a constant that its condition compares with.
    bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(module[condition].lines))
    return {body: max(map(int, bounds), default=1)}


def _exchanges(name: str, lines: list[str]) -> list[tuple[str, int]]:
    """Kind and bytes of every exchange that begins in the computation called `name`."""
    # A TPU spreads one gather over the computations it overlaps with; only the first one counts.
    if name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in x for x in lines):
        return []
    instructions = [_INSTRUCTION.match(line).groups() for line in lines]
    shapes = {name: shape for name, shape, _ in instructions}
    found = []
    for line, (_, shape, operation) in zip(lines, instructions, strict=True):
        kind = operation.removesuffix("-start")
        if not re.fullmatch(_KINDS, kind) or _ALONE.search(line):
            continue
        if kind == "reduce-scatter":
            operands = re.search(rf" {operation}\(([^)]*)\)", line)[1].split(", ")
            shape = " ".join(shapes[operand.split("%")[-1]] for operand in operands)
        arrays = [_bytes(*array) for array in _ARRAY.findall(shape) if array[0] != "u32"]
        if operation.endswith("-start") and kind not in ("all-reduce", "reduce-scatter"):
            arrays = arrays[len(arrays) // 2 :]  # Operands come first, then results.
        if name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        found.append((kind, sum(arrays)))
    return found


def _bytes(kind: str, shape: str) -> int:
    """Bytes of an array that HLO writes as `kind[shape]`."""
    bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.search(r"\d+", kind)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
