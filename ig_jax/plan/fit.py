"""`--mode=compile`: the train step and the sampler compiled for a TPU that need not be there, from
shapes alone, to see before paying for a pod whether a run fits and what its devices exchange."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ig_jax import console
from ig_jax.data import shards
from ig_jax.data.source import DataSource
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models.functional import parameter_count
from ig_jax.models.trunk import REMAT_POLICIES
from ig_jax.parallel import sharding
from ig_jax.plan import roofline, topology
from ig_jax.plan.hlo import Collective, collectives
from ig_jax.plan.topology import GIB
from ig_jax.sampling.run import make_engine
from ig_jax.training.setup import make_programs


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
        refused: whether the compiler gave up for want of memory; nothing but `peak` is known then.
    """

    name: str
    seconds: float
    arguments: int
    temporaries: int
    peak: int
    fits: bool
    collectives: dict[str, Collective]
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """The plan of a run on certain devices; bytes are those of one device.

    Attributes:
        devices: their number, kind and mesh in words.
        choices: the config fields that decide on memory, by name.
        batch: the arrays of a global training batch in words, and whose they are.
        parameters: number of parameters.
        forward_flops: floating-point operations of one forward pass of one image.
        state_bytes: of "parameters", "EMA" and "optimiser".
        memory: bytes of one device's memory, or None if unknown.
        programs: the train step and the sampler.
        bound: the least time of the train step, where the devices' data sheet is known.
        advice: config fields to change, with values, that make everything fit; empty if it does,
            None if no single change of those tried would.
    """

    devices: str
    choices: dict[str, Any]
    batch: str
    parameters: int
    forward_flops: int
    state_bytes: dict[str, int]
    memory: int | None
    programs: tuple[Compiled, ...]
    bound: roofline.Bound | None
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
            self.batch,
            f"{self.parameters / 1e6:.1f} M parameters; on each device: {state}",
            f"{giga:.1f} GFLOP an image forward, {3 * giga:.1f} GFLOP in training",
        ]
        for program in self.programs:
            lines += ["", *self._program_lines(program)]
            if program.name == "train step" and self.bound is not None:
                lines.append(f"  {self.bound.line()}")
        return "\n".join([*lines, "", self._verdict()])

    def _program_lines(self, program: Compiled) -> Iterator[str]:
        yield f"{program.name}: compiled in {program.seconds:.0f} s"
        if program.refused:
            needs = f": needs {_gib(program.peak)} or more" if program.peak else ""
            yield f"  memory: refused by the compiler{needs}"
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
        if self.fits:
            unknown = "memory of these devices unknown: compare the peak with theirs"
            return unknown if self.memory is None else "it fits"
        if self.advice is None:
            return "it does not fit, nor with any one change tried: use a larger topology"
        fields = " ".join(f"--config.{name}={value}" for name, value in self.advice.items())
        return f"it does not fit; it would with {fields}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def run(config: ConfigDict, workdir: str, sweep: bool = False) -> str:
    """`--mode=compile`: compiles for `config.mesh.topology` (the present devices if empty).

    Returns:
        The report, to be printed, or with `sweep` what `search` finds. Raises `InputError` for an
        unknown topology, a mesh or batch that does not fit it, or where libtpu is not installed.
    """
    del workdir
    return search(config) if sweep else report(config).table()


def search(config: ConfigDict) -> str:
    """Compiles the train step over batch size, remat and fsdp, a minute each.

    Returns:
        A line for each way to train that fits and that no other beats in both memory and the bound
        on images per second: the Pareto front, from the least memory on. Raises `InputError` as
        `run` does, and without a topology.
    """
    devices, memory, config = _open(config)
    chip = topology.chip(devices[0])
    if chip is None:
        raise InputError("config.mesh.topology is empty: expected a TPU's, to search ways to train")
    batch, fsdp = (
        config.train.batch_size,
        Experiment.from_config(config, devices).mesh.shape["fsdp"],
    )
    ways = list(itertools.product((batch, 2 * batch, 4 * batch), REMAT_POLICIES, (fsdp, 2 * fsdp)))
    names = ("train.batch_size", "model.remat", "mesh.fsdp")
    points = []
    with console.progress_bar(len(ways), "compiling") as advance:
        for way in ways:
            values = dict(zip(names, way, strict=True)) | {"mesh.data": -1}
            advance(text=" ".join(map(str, way)))
            try:
                other = changed(config, values)
                experiment = Experiment.from_config(other, devices)
            except InputError:  # more fsdp than devices
                continue
            program = _compile("train step", experiment, memory)
            bound = _bound(other, devices, [program]) if program.fits else None
            if bound is not None:
                points.append((program.peak, way[0] / bound.seconds, bound.mfu, values))
    return "\n".join(_front(points, memory)) or "nothing tried fits: use a larger topology"


def _front(points: list[tuple[int, float, float, dict[str, Any]]], memory: int) -> Iterator[str]:
    """Those (peak, images/s, MFU, values) that no other beats in memory and images per second."""
    best = 0.0
    for peak, rate, mfu, values in sorted(points, key=lambda point: (point[0], -point[1])):
        if rate > best:
            best = rate
            flags = " ".join(f"--config.{name}={value}" for name, value in values.items())
            yield (
                f"{_gib(peak)} of {_gib(memory)}, at most {rate:,.0f} images/s (MFU {mfu:.0%}): "
                f"{flags}"
            )


def _open(config: ConfigDict) -> tuple[Sequence[jax.Device], int | None, ConfigDict]:
    """The devices that a config names, the memory of one, and the config with "auto" resolved."""
    name = config.mesh.topology
    devices = topology.devices(name) if name else jax.devices()
    return devices, topology.device_memory(devices), _resolve(config, devices)


def changed(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with other values, by name such as "model.remat"."""
    copied = copy.deepcopy(config)
    for name, value in values.items():
        section, field = name.split(".")
        copied[section][field] = value
    return copied


def report(config: ConfigDict, programs: Sequence[str] = ("train step", "sampler")) -> Report:
    """Compiles a config's programs from shapes alone: no data, weights or TPU needed.

    Args:
        config: a complete config; `mesh.topology` names the devices, e.g. "v5e:4x4", with "*2" at
            the end for two slices.
        programs: which to compile.

    Returns:
        The report. Raises `InputError` as `run` does.
    """
    devices, memory, config = _open(config)
    experiment = Experiment.from_config(config, devices)
    with console.progress_bar(len(programs), "compiling") as advance:
        compiled = []
        for name in programs:
            compiled.append(_compile(name, experiment, memory))
            advance(text=f"{name} in {console.duration(compiled[-1].seconds)}")
    advice: dict[str, Any] | None = {}
    for program in compiled:
        if not program.fits and advice is not None:
            change = _smallest_change(program.name, config, devices, memory)
            advice = None if change is None else advice | change
    shapes = make_programs(experiment, shapes_only(experiment)).shapes
    mesh = experiment.mesh.shape
    return Report(
        devices=(
            f"{len(devices)} × {devices[0].device_kind}"
            f"{f' ({config.mesh.topology})' if config.mesh.topology else ''}: "
            f"data {mesh['data']} × fsdp {mesh['fsdp']}"
        ),
        choices={name: _field(config, name) for name in _CHOICES},
        batch=_describe(config, batch_shapes(experiment)),
        parameters=parameter_count(experiment.shapes),
        forward_flops=experiment.spec.forward_flops(),
        state_bytes={
            "parameters": sharding.bytes_per_device(shapes.params),
            "EMA": sharding.bytes_per_device(shapes.ema),
            "optimiser": sharding.bytes_per_device(shapes.optimizer),
        },
        memory=memory,
        programs=tuple(compiled),
        bound=_bound(config, devices, compiled),
        advice=advice,
    )


def _bound(
    config: ConfigDict, devices: Sequence[jax.Device], compiled: Sequence[Compiled]
) -> roofline.Bound | None:
    """The roofline of the train step, if it was compiled for a chip whose data sheet is known."""
    chip = topology.chip(devices[0])
    steps = [program for program in compiled if program.name == "train step"]
    if chip is None or not steps or steps[0].refused:
        return None
    work = roofline.step_work(
        config, devices, lambda one: lower_train_step(one).compile(), steps[0].collectives
    )
    return work and roofline.Bound(work, chip, topology.cores(devices))


_CHOICES = (
    "model.family",
    "model.size",
    "model.dtype",
    "model.remat",
    "train.batch_size",
    "train.accumulate",
    "sampler.batch_size",
)


def _resolve(config: ConfigDict, devices: Sequence[jax.Device]) -> ConfigDict:
    """Fixes what "auto" means on `devices`, which need not be the present ones."""
    config = copy.deepcopy(config)
    automatic = "float32" if devices[0].platform == "cpu" else "bfloat16"
    if config.model.dtype == "auto":
        config.model.dtype = automatic
    if config.optimizer.newton_schulz_dtype == "auto":
        config.optimizer.newton_schulz_dtype = automatic
    return config


def shapes_only(experiment: Experiment) -> DataSource:
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


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one global training batch; of latents, as `--mode=prepare` writes them."""
    config = experiment.config
    place = sharding.batch_sharding(experiment.mesh)

    def array(*shape: int, dtype: type = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=place)

    pixels = np.uint8 if config.data.name in ("folder", "tfds") else np.float32
    names = shards.FIELDS if config.data.name == "latents" else ("x",)
    images = {name: array(*experiment.sample_shape, dtype=pixels) for name in names}
    return {"label": array(dtype=np.int32)} | images


def _describe(config: ConfigDict, batch: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """The arrays of a batch in words."""
    arrays = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in batch.items())
    prepared = " (latents as --mode=prepare writes them; LightningDiT's shards hold x alone)"
    return f"batch: {arrays}{prepared if config.data.name == 'latents' else ''}"


def lower_train_step(experiment: Experiment) -> jax.stages.Lowered:
    """The train step of an experiment, lowered for its mesh from shapes alone."""
    programs = make_programs(experiment, shapes_only(experiment))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return programs.step.lower(programs.shapes, batch_shapes(experiment), key)


def lower_sampler(experiment: Experiment) -> jax.stages.Lowered:
    """The sampler of an experiment, lowered for its mesh from shapes alone."""
    engine = make_engine(experiment)
    guidance = GuidanceOptions.of(experiment.config.guidance).build(engine.weaker)
    return engine.lower(experiment.abstract_params(), guidance)


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
        return Compiled(name, time.monotonic() - start, 0, 0, needed, False, {}, refused=True)
    seconds = time.monotonic() - start
    sizes, peak = compiled.memory_analysis(), peak_memory(compiled)
    return Compiled(
        name=name,
        seconds=seconds,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        peak=peak,
        fits=memory is None or peak <= memory,
        collectives=collectives(compiled.as_text()),
    )


def peak_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs at once on each device: arguments, results not written over them,
    and temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


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
        change = {field: value} | ({"mesh.data": -1} if field == "mesh.fsdp" else {})
        try:
            experiment = Experiment.from_config(changed(config, change), devices)
        except InputError:
            continue
        with console.stage(f"trying config.{field}={value}"):
            fits = _compile(name, experiment, memory).fits
        if fits:
            return change
    return None
