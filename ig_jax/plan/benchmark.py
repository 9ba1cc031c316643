"""`--mode=benchmark`: how fast a config trains, samples, decodes and reads on the devices at hand,
from synthetic data and random weights, and how near that is to what they can do."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console
from ig_jax import record as record_lib
from ig_jax.data import pipeline
from ig_jax.diffusion.guidance import GuidanceOptions
from ig_jax.experiment import Experiment
from ig_jax.models import autoencoder, families, functional
from ig_jax.models.network import Spec
from ig_jax.models.trunk import REMAT_POLICIES, TrunkSpec
from ig_jax.parallel import sharding
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.plan import fit, topology
from ig_jax.sampling.engine import Engine
from ig_jax.sampling.run import make_engine
from ig_jax.storage.files import write_atomically
from ig_jax.training.setup import make_programs

ROUNDS = 5
# Of the square matrix product that stands for what the devices reach; large enough for any of them.
_CEILING = {"cpu": 2048}
_CEILING_ELSEWHERE = 8192
# The paper's two scales and the interval of its best FID (IG paper, main table).
_IG, _CFG, _CFG_INTERVAL = 1.4, 1.35, (0.0, 0.7)


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to be timed.

    Attributes:
        name: of its line.
        images: how many one run makes or takes.
        flops: of one run by the model's formula, over all devices; 0 where nobody counts.
        start: compiles what is timed; returns `run()`, which ends when the results are there, and
            bytes of one device's memory that it needs, or None. What must be closed it leaves to
            the stack.
    """

    name: str
    images: int
    flops: float
    start: Callable[[contextlib.ExitStack], tuple[Callable[[], Any], int | None]]


@dataclasses.dataclass
class Line:
    """What was measured of a case; times are seconds.

    Attributes:
        name, images, flops: of the case.
        compile, first: to compile it, and of its first run.
        peak: bytes of memory of one device, or None.
        seconds: of each round.
    """

    name: str
    images: int
    flops: float
    compile: float
    first: float
    peak: int | None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def record(self, ceiling: float, peak: float | None) -> dict[str, Any]:
        """The line in plain values; `ceiling` and `peak` are FLOP/s of all devices."""
        rate = self.flops / self.median if self.flops else None
        return dataclasses.asdict(self) | {
            "median": self.median,
            "images_per_second": self.images / self.median,
            "mfu_of_ceiling": rate and rate / ceiling,
            "mfu_of_data_sheet": rate and peak and rate / peak,
        }


def _aot(lowered: jax.stages.Lowered, *arguments: Any) -> tuple[Callable[[], Any], int]:
    """A program compiled for these arguments, run on them; and the memory it needs."""
    compiled = lowered.compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), fit.peak_memory(compiled)


def _train_case(name: str, config: ConfigDict) -> Case:
    """A training step on one synthetic batch, which moves the state on as training does."""

    def start(stack: contextlib.ExitStack) -> tuple[Callable[[], Any], int]:
        experiment = Experiment.from_config(config)
        programs = make_programs(experiment, fit.shapes_only(experiment))
        state = [programs.init(jax.random.key(0))]
        batch, key = _batch(experiment), jax.random.key(1)
        compiled = programs.step.lower(state[0], batch, key).compile()

        def run() -> Any:
            state[0], metrics = compiled(state[0], batch, key)
            return jax.block_until_ready((state[0], metrics))

        return run, fit.peak_memory(compiled)

    count = config.train.batch_size
    forward = Experiment.from_config(config).spec.forward_flops()
    return Case(name, count, 3.0 * forward * count, start)


def _batch(experiment: Experiment) -> dict[str, jax.Array]:
    """A synthetic batch on the devices, of the shapes that the data give."""
    generator, classes = np.random.default_rng(0), max(experiment.spec.num_classes, 1)

    def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = generator.standard_normal(shape.shape)
        if np.issubdtype(shape.dtype, np.integer):
            values = generator.integers(0, classes, shape.shape)
        values = values.astype(shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda at: values[at])

    return jax.tree.map(array, fit.batch_shapes(experiment))


def _sampler_case(
    name: str, experiment: Experiment, engine: Engine, guidance: GuidanceOptions
) -> Case:
    """One batch from noise to samples in model space."""
    terms, count = guidance.build(), engine.batch_size

    def start(stack: contextlib.ExitStack) -> tuple[Callable[[], Any], int]:
        place = sharding.batch_sharding(experiment.mesh)
        rows = jax.device_put(np.arange(count, dtype=np.int32), place)
        labels = jax.jit(lambda rows: rows % max(experiment.spec.num_classes, 1))(rows)
        params = random_params(experiment)
        _, prepared = engine.settings.prepare(terms)
        lowered = engine.lower(experiment.abstract_params(), terms)
        return _aot(lowered, params, prepared, np.uint32(0), rows, labels)

    return Case(name, count, count * sampler_flops(experiment.spec, engine, guidance), start)


def random_params(experiment: Experiment) -> functional.Params:
    """Random weights as `abstract_params` places them."""
    options = config_lib.model_options(experiment.config)
    places = jax.tree.map(lambda s: s.sharding, experiment.abstract_params())

    def init(key: jax.Array) -> functional.Params:
        return functional.split(families.make(experiment.spec, **options, rngs=nnx.Rngs(key)))[1]

    return jax.jit(init, out_shardings=places)(jax.random.key(0))


def sampler_flops(spec: Spec, engine: Engine, guidance: GuidanceOptions) -> float:
    """Floating-point operations of one sample by the model's formula, branches that are off left
    out; 0 for an adaptive sampler, whose evaluations nobody knows beforehand."""
    settings = engine.settings
    if not isinstance(spec, TrunkSpec) or not len(settings.sampler.nodes):
        return 0.0
    whole = spec.forward_flops()
    block = (dataclasses.replace(spec, depth=spec.depth + 1).forward_flops()) - whole

    def of_pass(upto: int | None) -> float:
        return whole if upto is None else whole - block * (spec.depth - spec.auxiliary_depths[upto])

    evaluations = settings.passes(guidance.build())
    return float(sum(of_pass(one.upto) for passes in evaluations for one in passes))


def _decode_case(config: ConfigDict, experiment: Experiment) -> Case:
    """Latents to pixels by a decoder of random weights."""
    published, count = autoencoder.AUTOENCODERS[config.data.autoencoder], 32

    def start(stack: contextlib.ExitStack) -> tuple[Callable[[], Any], None]:
        dtype = config_lib.compute_dtype(config.model.dtype)
        model = autoencoder.Autoencoder(published.spec, dtype=dtype, rngs=nnx.Rngs(0))
        decode = autoencoder.make_decoder(model, experiment.mesh, count, uint8=True)
        latents = np.random.default_rng(0).standard_normal((count, *experiment.sample_shape))
        return lambda: decode(latents.astype(np.float32)), None

    return Case("decode", count, 0.0, start)


class _Examples:
    """As many examples as an epoch needs, made up from a few: reading costs, disks do not."""

    def __init__(self, experiment: Experiment):
        shapes = fit.batch_shapes(experiment)
        self._example = {n: np.ones(s.shape[1:], s.dtype) for n, s in shapes.items()}

    def __len__(self) -> int:
        return 2**17

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: value.copy() for name, value in self._example.items()}


def _reading_case(config: ConfigDict, experiment: Experiment) -> Case:
    """Batches through the pipeline onto the devices; `plan.reading` times the files themselves."""

    def start(stack: contextlib.ExitStack) -> tuple[Callable[[], Any], None]:
        iterator = pipeline.make_iterator(
            _Examples(experiment),
            batch_size=config.train.batch_size,
            seed=0,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
            flip=config.data.flip,
        )
        batches = pipeline.DevicePrefetch(iterator, sharding.batch_sharding(experiment.mesh))
        stack.callback(batches.close)
        return lambda: jax.block_until_ready(next(batches)), None

    return Case("reading", config.train.batch_size, 0.0, start)


def cases(config: ConfigDict) -> Iterator[Case]:
    """What is timed of a config; what its network or data have not is left out."""
    experiment = Experiment.from_config(config)
    yield _train_case("train step", config)
    heads = len(experiment.spec.auxiliary_depths)
    if heads:
        plain = fit.changed(config, {"model.auxiliary_depth": 0, "guidance.ig_scale": 1.0})
        yield _train_case("train step, no head", plain)
    engine = dataclasses.replace(make_engine(experiment), weaker=None)
    ig, cfg = ({"ig_scale": _IG} if heads else {}), {"cfg_scale": _CFG}
    wanted = {"no guidance": {}, "IG": ig}
    if experiment.spec.num_classes:
        wanted |= {"CFG": cfg, "IG + CFG, interval": ig | cfg | {"cfg_interval": _CFG_INTERVAL}}
        wanted |= {"CFG, shallow": cfg | {"cfg_source": "shallow"}} if heads else {}
    for name, values in wanted.items():
        if values or name == "no guidance":
            yield _sampler_case(f"sampler: {name}", experiment, engine, GuidanceOptions(**values))
    if config.data.autoencoder in autoencoder.AUTOENCODERS:
        yield _decode_case(config, experiment)
    yield _reading_case(config, experiment)


def measure(wanted: list[Case], rounds: int) -> list[Line]:
    """Compiles all cases, then runs them in turn, so that what slows the machine slows all."""
    lines, runs = [], []
    with contextlib.ExitStack() as stack:
        bar = console.progress_bar(len(wanted) * (1 + rounds), "benchmark")
        advance = stack.enter_context(bar)
        for case in wanted:
            began = time.perf_counter()
            run, peak = case.start(stack)
            compiled = time.perf_counter()
            run()
            first = time.perf_counter() - compiled
            lines.append(Line(case.name, case.images, case.flops, compiled - began, first, peak))
            runs.append(run)
            advance(text=case.name)
        for line, run in list(zip(lines, runs, strict=True)) * rounds:
            began = time.perf_counter()
            run()
            line.seconds.append(time.perf_counter() - began)
            advance(text=line.name)
    return lines


def matmul_ceiling(dtype: jnp.dtype, rounds: int) -> tuple[float, str]:
    """FLOP/s that all devices together reach in a square matrix product, and its description."""
    devices = jax.devices()
    side = _CEILING.get(devices[0].platform, _CEILING_ELSEWHERE)
    if devices[0].platform == "cpu":
        devices = devices[:1]  # simulated ones share the cores
    mesh = sharding.make_mesh(len(devices), 1, devices)
    place = sharding.batch_sharding(mesh)
    make = jax.jit(lambda: jnp.ones((len(devices), side, side), dtype), out_shardings=place)
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a), out_shardings=place)
    a, seconds = make(), []
    jax.block_until_ready(product(a))
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - began)
    rate = 2.0 * side**3 * len(devices) / float(np.median(seconds))
    return rate, f"{jnp.dtype(dtype).name} product of {side}×{side} matrices"


def _paired(lines: dict[str, Line], name: str, base: str) -> str:
    """How much longer one case takes than another, by the median of its rounds' ratios."""
    ratios = np.divide(lines[name].seconds, lines[base].seconds)
    return f"{float(np.median(ratios)) - 1:+.1%}"


def _print(lines: list[Line], ceiling: float, peak: float | None) -> None:
    rows = []
    for line in lines:
        found = line.record(ceiling, peak)
        spread = (max(line.seconds) - min(line.seconds)) / 2 / line.median
        mfu = [found["mfu_of_data_sheet"], found["mfu_of_ceiling"]]
        rows.append(
            (
                line.name,
                f"{found['images_per_second']:,.1f}",
                f"{1e3 * line.median:,.1f} ± {spread:.0%}",
                f"{line.flops / line.images / 1e9:,.4g}" if line.flops else "–",
                *("–" if share is None else f"{share:.1%}" for share in mfu),
                "–" if line.peak is None else f"{line.peak / topology.GIB:.2f}",
                f"{line.compile:.1f}",
                f"{line.first:.2f}",
            )
        )
    columns = ("", "images/s", "ms", "GFLOP/image", "MFU sheet", "MFU product", "GiB")
    console.print_table("benchmark", (*columns, "compile s", "first s"), rows)


def run(config: ConfigDict, workdir: str, sweep: bool = False) -> str:
    """`--mode=benchmark`: times a config's programs; writes `benchmark.json` into the workdir.

    Args:
        config: a complete config.
        workdir: where the numbers go.
        sweep: also try ways to train, and print the fastest one's flags.

    Returns:
        The last line to print. Raises `InputError` for a config that cannot be.
    """
    config_lib.validate(config)
    devices = jax.devices()
    ceiling, about = matmul_ceiling(config_lib.compute_dtype(config.model.dtype), ROUNDS)
    chip = topology.chip(devices[0])
    peak = chip.flops * len(devices) if chip else None
    lines = measure(list(cases(config)), ROUNDS)
    by_name = {line.name: line for line in lines}
    found = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": record_lib.versions(),
        "ceiling": {"flops_per_second": ceiling, "of": about},
        "data_sheet": {"flops_per_second": peak, "of": chip and chip.source},
        "lines": [line.record(ceiling, peak) for line in lines],
    }
    said = [f"MFU product: of {ceiling / 1e12:.3g} TFLOP/s, a measured {about}"]
    said += [f"MFU sheet: of {peak / 1e12:.4g} TFLOP/s ({chip.source})"] if chip else []
    if "train step, no head" in by_name:
        head = _paired(by_name, "train step", "train step, no head")
        ig = _paired(by_name, "sampler: IG", "sampler: no guidance")
        said.append(f"the auxiliary head costs {head} of a training step, IG {ig} of sampling")
    path = resolve(workdir) / "benchmark.json"

    def save() -> None:
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as temporary:
                temporary.write_text(json.dumps(found, indent=2) + "\n")

    save()
    if is_primary():
        _print(lines, ceiling, peak)
    if sweep:
        found["sweep"] = []
        for tried in search(config):
            found["sweep"].append(tried)
            save()  # each way: they take long, and one may end the process
        best = max(found["sweep"], key=lambda way: way["images_per_second"] or 0.0)
        rate = best["images_per_second"] or 0.0
        said.append(f"fastest training: {best['flags']} ({rate:,.1f} images/s)")
    return "\n".join([*said, f"numbers: {path}"])


def search(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Times the training step over scan or unroll, remat and batch size.

    Yields:
        A record of each way: its flags and its images per second, None where memory did not
        suffice.
    """
    devices, batch = jax.device_count(), config.train.batch_size
    sizes = [size for size in (batch // 2, batch, 2 * batch) if size and size % devices == 0]
    ways = itertools.product((True, False), REMAT_POLICIES, sizes)
    names = ("model.scan_blocks", "model.remat", "train.batch_size")
    for way in ways:
        values = dict(zip(names, way, strict=True))
        flags = " ".join(f"--config.{name}={str(value).lower()}" for name, value in values.items())
        try:
            (line,) = measure([_train_case(flags, fit.changed(config, values))], ROUNDS)
            rate = line.images / line.median
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rate = None
        yield {"flags": flags, "images_per_second": rate}
