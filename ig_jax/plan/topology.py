"""TPUs that need not be there: their devices, as the TPU's compiler describes them, and memory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from ig_jax.errors import InputError, suggest

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


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of memory of one device, or None where that is unknown (a CPU)."""
    kind = devices[0].device_kind
    if kind in HBM_GIB:
        cores = 1 + max(device.core_on_chip for device in devices)
        return HBM_GIB[kind] * GIB // cores
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError, NotImplementedError):
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    return None
