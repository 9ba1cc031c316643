"""`--mode=benchmark --sizes`: what one forward pass costs for each published size, at the config's
number of tokens and at four times as many: operations, bytes and time, and whether they grow as the
model's formula says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ig_jax import config as config_lib
from ig_jax import console, pictures
from ig_jax import record as record_lib
from ig_jax.errors import InputError
from ig_jax.experiment import Experiment
from ig_jax.models import functional
from ig_jax.models.dit import PUBLISHED_FAMILIES
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.plan import benchmark, fit, roofline
from ig_jax.storage.files import write_atomically

NAMES = ("s", "b", "l", "xl")
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one forward pass of one image with all heads.

    Attributes:
        size: a name of `recipes.SIZES`.
        tokens, parameters: of the network.
        formula: floating-point operations by `Spec.forward_flops`, matrix products only.
        compiled: floating-point operations that the compiler counts.
        memory: bytes that the compiled program moves to and from memory, at least.
        seconds: the median of some runs.
    """

    size: str
    tokens: int
    parameters: int
    formula: int
    compiled: float
    memory: float
    seconds: float


def _forward(experiment: Experiment) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The compiled function (params, x, t, y) → heads, and the shapes of its arguments."""

    def run(params: functional.Params, x: jax.Array, t: jax.Array, y: jax.Array) -> Any:
        heads = functional.merge(experiment.graphdef, params)(x, t, y)
        return heads.final, heads.auxiliary

    x = jax.ShapeDtypeStruct((1, *experiment.sample_shape), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32))
    return jax.jit(run), (experiment.abstract_params(), x, t, y)


def _case(experiment: Experiment) -> benchmark.Case:
    """One forward pass of one image, with random weights."""

    def start(stack: contextlib.ExitStack) -> tuple[Callable[[], Any], int]:
        run, (_, *shapes) = _forward(experiment)
        inputs = [jnp.ones(s.shape, s.dtype) for s in shapes]
        params = benchmark.random_params(experiment)
        compiled = run.lower(params, *inputs).compile()
        return lambda: jax.block_until_ready(compiled(params, *inputs)), fit.peak_memory(compiled)

    return benchmark.Case("forward", 1, experiment.spec.forward_flops(), start)


def costs(config: ConfigDict) -> list[Cost]:
    """Measures all sizes of a config's family; raises `InputError` where it has none."""
    family = config.model.family
    if family not in PUBLISHED_FAMILIES:
        raise InputError(
            f"config.model.family is {family!r}: expected one of {', '.join(PUBLISHED_FAMILIES)} "
            "with --sizes"
        )
    found = []
    side, device = config.model.input_size, jax.devices()[:1]
    own: Mapping[str, Any] = {"width": 0, "depth": 0, "heads": 0, "auxiliary_depth": -1}
    with console.progress_bar(2 * len(NAMES), "sizes") as advance:
        for input_size in (side, 2 * side):
            for size in NAMES:
                values = {"size": size, "input_size": input_size, **own}
                changed = fit.changed(config, {f"model.{n}": v for n, v in values.items()})
                changed.mesh.update(data=1, fsdp=1)
                experiment = Experiment.from_config(changed, device)
                spec = experiment.spec
                flops, memory = roofline.whole_cost(changed, device, _compile)
                (line,) = benchmark.measure([_case(experiment)], ROUNDS)
                count = functional.parameter_count(experiment.shapes)
                formula = spec.forward_flops()
                found.append(Cost(size, spec.tokens, count, formula, flops, memory, line.median))
                advance(text=f"{spec.summary}, {spec.tokens} tokens")
    return found


def _compile(experiment: Experiment) -> jax.stages.Compiled:
    run, shapes = _forward(experiment)
    return run.lower(*shapes).compile()


def growth(found: list[Cost], value: Callable[[Cost], float]) -> float:
    """The power of the formula's operations by which a value grows: 1 if it grows as they do."""
    logs = np.log([[cost.formula, value(cost)] for cost in found])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def plot(found: list[Cost], about: str) -> Any:
    """A figure of operations, bytes and time against the formula's operations."""
    figure = pictures.make_figure(11, 3.8)
    panels: tuple[tuple[str, Callable[[Cost], float]], ...] = (
        ("GFLOP counted by the compiler", lambda cost: cost.compiled / 1e9),
        ("GB read and written at least", lambda cost: cost.memory / 1e9),
        ("ms", lambda cost: 1e3 * cost.seconds),
    )
    for axes, (label, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for tokens, marker in zip(sorted({cost.tokens for cost in found}), "os", strict=True):
            some = [cost for cost in found if cost.tokens == tokens]
            x, y = [cost.formula / 1e9 for cost in some], [value(cost) for cost in some]
            (drawn,) = axes.plot(x, y, marker=marker, label=f"{tokens:,} tokens")
            for cost, *place in zip(some, x, y, strict=True):
                shift = {"xytext": (4, -9), "textcoords": "offset points"}
                axes.annotate(cost.size.upper(), place, color=drawn.get_color(), **shift)
        # Through the middle of the points, growing as the operations do.
        ends = np.array([min(cost.formula for cost in found), max(cost.formula for cost in found)])
        level = np.exp(np.mean(np.log([value(cost) / cost.formula for cost in found])))
        axes.plot(ends / 1e9, level * ends, ":", color=pictures.INK, label="as the formula grows")
        axes.set(xscale="log", yscale="log", xlabel="GFLOP by the formula", ylabel=label)
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"one forward pass of one image, {about}", fontsize="medium")
    return figure


def run(config: ConfigDict, workdir: str) -> str:
    """Prints the table; writes `sizes.json` and `sizes.png` into the workdir.

    Returns:
        The last line to print. Raises `InputError` as `costs` does.
    """
    config_lib.validate(config)
    found = costs(config)
    dtype = jnp.dtype(config_lib.compute_dtype(config.model.dtype)).name
    about = f"{config.model.family}, {dtype}, {jax.devices()[0].device_kind}"
    folder = resolve(workdir)
    if is_primary():
        columns = ("", "tokens", "M parameters", "GFLOP", "compiled", "GB", "ms", "GFLOP/s")
        rows = [
            (
                cost.size.upper(),
                f"{cost.tokens:,}",
                f"{cost.parameters / 1e6:.1f}",
                f"{cost.formula / 1e9:.2f}",
                f"{cost.compiled / cost.formula - 1:+.1%}",
                f"{cost.memory / 1e9:.2f}",
                f"{1e3 * cost.seconds:,.0f}",
                f"{cost.formula / cost.seconds / 1e9:,.0f}",
            )
            for cost in found
        ]
        console.print_table(f"one forward pass of one image, {about}", columns, rows)
        content = {"versions": record_lib.versions(), "about": about}
        content |= {"sizes": [dataclasses.asdict(cost) for cost in found]}
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(folder / "sizes.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
        pictures.save_figure(folder / "sizes.png", plot(found, about))
    powers = {
        "FLOPs": growth(found, lambda cost: cost.compiled),
        "bytes": growth(found, lambda cost: cost.memory),
        "time": growth(found, lambda cost: cost.seconds),
    }
    said = ", ".join(f"{name} as {power:.2f}" for name, power in powers.items())
    return f"powers of the formula's FLOPs that grow alike: {said}\nnumbers and plot: {folder}"
