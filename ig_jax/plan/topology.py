"""TPUs that need not be there: their devices, as the TPU's compiler describes them, and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from ig_jax.errors import InputError, suggest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of one chip.

    Attributes:
        memory: GiB.
        flops: dense bfloat16 FLOP/s.
        memory_rate, exchange_rate: bytes/s, of its memory, and of its links to other chips in both
            directions.
        source: of the numbers.
    """

    memory: int
    flops: float
    memory_rate: float
    exchange_rate: float
    source: str


def _tpu(memory: int, tera: float, giga: float, links: float) -> Chip:
    return Chip(memory, tera * 1e12, giga * 1e9, links * 1e9, 'Google Cloud, "TPU versions"')


def _gpu(memory: int, tera: float, giga: float, links: float) -> Chip:
    return Chip(memory, tera * 1e12, giga * 1e9, links * 1e9, "NVIDIA's data sheet, dense bfloat16")


# By how the kind that JAX reports begins; the first that fits.
CHIPS: dict[str, Chip] = {
    "TPU v2": _tpu(16, 46, 700, 125),
    "TPU v3": _tpu(32, 123, 900, 164),
    "TPU v4": _tpu(32, 275, 1228, 600),
    "TPU v5 lite": _tpu(16, 197, 819, 400),
    "TPU v5": _tpu(95, 459, 2765, 1200),
    "TPU v6 lite": _tpu(32, 918, 1640, 800),
    "NVIDIA A100-SXM4-40GB": _gpu(40, 312, 1555, 600),
    "NVIDIA A100-SXM4-80GB": _gpu(80, 312, 2039, 600),
    "NVIDIA H100 PCIe": _gpu(80, 756, 2000, 600),
    "NVIDIA H100": _gpu(80, 989, 3350, 900),
    "NVIDIA H200": _gpu(141, 989, 4800, 900),
}
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:4x4", "v6e:16x16")
LIBTPU = "libtpu==0.0.42.*"


def devices(topology: str) -> list[jax.Device]:
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


def chip(device: jax.Device) -> Chip | None:
    """The data sheet of a device's chip, or None for a CPU and what is not in the table."""
    kinds = (kind for kind in CHIPS if device.device_kind.startswith(kind))
    return next((CHIPS[kind] for kind in kinds), None)


def cores(devices: Sequence[jax.Device]) -> int:
    """How many of these devices are one chip, whose memory and links they share."""
    return 1 + max(getattr(device, "core_on_chip", 0) for device in devices)


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of memory of one device, or None where that is unknown (a CPU)."""
    found = chip(devices[0])
    if found is not None and devices[0].platform == "tpu":
        return found.memory * GIB // cores(devices)
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError, NotImplementedError):
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    return None
