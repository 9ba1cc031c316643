"""The processes of a run, on top of `jax.distributed`: that they find each other, agree and end.

JAX aborts with a C++ stack where something is amiss, and notices a lost process only by its
heartbeat. What can be foreseen is therefore refused before, and so that a loss is one line at once,
each process holds a connection to process 0 open: the system closes it however the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from ig_jax import stops
from ig_jax.errors import Exit, InputError

# For hosts that vanish without closing their connections.
HEARTBEAT_TIMEOUT_S = 40
# JAX aborts the others the moment process 0 is gone, so it lets them speak first.
_GRACE_S = 0.5
_VARIABLES = ("IG_JAX_COORDINATOR", "IG_JAX_PROCESS_ID", "IG_JAX_NUM_PROCESSES")
# Who starts several processes, and how it says how many there are and which one this is. Slurm and
# PMIx number lone processes too, so the first of theirs is not told from a lone one.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("PMIx", "", "PMIX_RANK"),
    ("Slurm", "", "SLURM_PROCID"),
)


class Place(NamedTuple):
    """A process's place in a run, in the words of `jax.distributed`; JAX finds what is None."""

    coordinator_address: str | None = None
    process_id: int | None = None
    num_processes: int | None = None


# Connections to this process; None where it is the only one.
_lines: list[socket.socket] | None = None
_ending = threading.Event()


def is_primary() -> bool:
    """Returns whether this process writes logs and pictures: process 0, or the only one.

    JAX's number counts, as it does for Orbax and for gathered arrays: a program that uses the
    library may have called `jax.distributed.initialize` itself.
    """
    return jax.process_index() == 0


def initialize(settings: Mapping[str, Any], timeout_s: float = 300.0) -> None:
    """Joins this process to its run, or does nothing where there is only one process.

    A run of several processes is one whose `IG_JAX_COORDINATOR`, `IG_JAX_PROCESS_ID` and
    `IG_JAX_NUM_PROCESSES` say so, or whose cluster does (TPU pod, Slurm, Open MPI 4). Must come
    before the first JAX computation. From then on, if another process dies, this one prints a line
    and ends with `Exit.PEER_LOST`, since no collective could ever finish again. (When process 0 is
    killed, JAX's client may abort first, with a message of its own.)

    Args:
        settings: nested, of JSON's types; must be equal in all processes.
        timeout_s: how long to wait for the others, in seconds.

    Raises:
        InputError: the place is incomplete or contradictory, the coordinator does not answer,
            settings differ, or there are several processes in a way that JAX does not know.
    """
    place = find_place(os.environ)
    if place is None:
        return
    _join(place, timeout_s)
    if jax.process_count() > 1:
        _compare(settings)
        _connect(place)
        stops.before_ending(_tell_others)
        # After JAX's own exit handlers are registered, hence before they wait for the others.
        atexit.register(_leave)


def abandon(code: int) -> NoReturn:
    """Ends this process with exit code `code`, and the run's other processes with it.

    For errors after `initialize`: an ordinary exit would first wait for the others, which are
    themselves waiting for this one.
    """
    if _lines is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    _tell_others()
    os._exit(code)


def _tell_others() -> None:
    """Tells the run's other processes that this one is about to end."""
    _ending.set()
    for line in _lines:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
    time.sleep(_GRACE_S)


# Where the place comes from.


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Returns what is known of this process's place, or None where it is the only process.

    Raises:
        InputError: something is missing, not a number, or out of range, or a launcher that JAX
            does not know started several processes.
    """
    place = Place(environ.get(_VARIABLES[0]), *(_whole(environ, name) for name in _VARIABLES[1:]))
    if place.num_processes == 1 and place.process_id in (None, 0):
        return None
    if None in place and _in_cluster(environ):
        return place
    if place != Place():
        _check(place)
        return place
    for launcher, size, rank in _LAUNCHERS:
        said = {name: environ[name] for name in (size, rank) if name in environ}
        if rank in said and (said.get(size, "1") != "1" or said[rank] != "0"):
            raise InputError(
                f"{' and '.join(f'{k}={v}' for k, v in said.items())} (set by {launcher}) means "
                "several processes, which cannot find each other by that: give each "
                "IG_JAX_COORDINATOR=HOST:PORT (of process 0), IG_JAX_PROCESS_ID (of this one "
                f"{said[rank]}) and IG_JAX_NUM_PROCESSES, or IG_JAX_NUM_PROCESSES=1 to run alone"
            )
    return None


def _whole(environ: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environ[name]) if name in environ else None
    except ValueError:
        raise InputError(f"{name}={environ[name]!r}: expected a whole number") from None


def _check(place: Place) -> None:
    address, process_id, number = place
    if None in place:
        missing = [name for name, value in zip(_VARIABLES, place, strict=True) if value is None]
        raise InputError(
            f"a run of several processes needs {', '.join(_VARIABLES)}; missing: "
            f"{', '.join(missing)}"
        )
    if not 0 <= process_id < number:
        raise InputError(
            f"IG_JAX_PROCESS_ID is {process_id} and IG_JAX_NUM_PROCESSES {number}: expected "
            "0 ≤ id < number"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f'IG_JAX_COORDINATOR is {address!r}: expected "host:port", as in "10.0.0.1:8476"'
        )


def _in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether to let JAX ask: in a Slurm step of several tasks, in Open MPI 4, on a TPU."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environ):
        return True
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" and "OMPI_MCA_orte_hnp_uri" in environ:
        return True
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


# The meeting.


def _join(place: Place, timeout_s: float) -> None:
    """Starts `jax.distributed`, unless that is known to fail."""
    if None not in place:
        _probe(place, timeout_s)
    try:
        jax.distributed.initialize(
            **place._asdict(),
            # In a cluster JAX also picks the local devices (one GPU for each Slurm task).
            cluster_detection_method=None if None in place else "deactivate",
            initialization_timeout=max(int(timeout_s), 1),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        # A lone TPU may be outside any cluster; by itself it knows whether it is part of a pod.
        if place != Place() or jax.process_count() > 1:
            raise InputError(
                f"the cluster does not tell this process's place ({error!r}): set "
                f"{', '.join(_VARIABLES)}"
            ) from error


def _probe(place: Place, timeout_s: float) -> None:
    """Looks whether the coordinator's port is free, or else whether someone answers there."""
    host, port = _host(place), int(place.coordinator_address.rpartition(":")[2])
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if place.process_id == 0:
                _listen(port).close()
            else:
                socket.create_connection((host, port), timeout=timeout_s).close()
            return
        except OSError as error:
            reason = error.strerror or error
        if place.process_id == 0:
            raise InputError(f"process 0 cannot listen at {place.coordinator_address}: {reason}")
        if time.monotonic() > deadline:
            raise InputError(
                f"the coordinator {place.coordinator_address} did not answer process "
                f"{place.process_id} within {timeout_s:g} s ({reason})"
            )
        time.sleep(0.1)


def _host(place: Place) -> str | None:
    """The coordinator's host, if known."""
    address = place.coordinator_address
    return address and address.rpartition(":")[0].strip("[]")


def _listen(port: int) -> socket.socket:
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=ipv6)


def _from_every_process(text: str, size: int = 256) -> list[str]:
    """Every process's text of at most `size` bytes, on all of them."""
    row = np.frombuffer(text.encode().ljust(size), np.uint8)
    return [bytes(row).decode().rstrip() for row in multihost_utils.process_allgather(row)]


def _compare(settings: Mapping[str, Any]) -> None:
    """Refuses settings that are not equal in all processes."""
    text = json.dumps(flatten_dict(dict(settings), sep="."), sort_keys=True)
    hashes = _from_every_process(hashlib.sha256(text.encode()).hexdigest())
    if len(set(hashes)) == 1:
        return
    longest = max(map(int, _from_every_process(str(len(text.encode())))))
    expected, *others = map(json.loads, _from_every_process(text, longest))
    jax.distributed.shutdown()  # All at once, so that none is taken for lost.
    other, found = next((i, f) for i, f in enumerate(others, 1) if f != expected)
    fields = [k for k in sorted(expected | found) if found.get(k) != expected.get(k)]
    differ = (f"config.{k} is {found.get(k)!r}, expected {expected.get(k)!r}" for k in fields)
    raise InputError(f"process {other} differs from process 0: {'; '.join(differ)}")


# The loss of one.


def _connect(place: Place) -> None:
    """Connects this process to process 0, or lets process 0 take the others' connections."""
    global _lines
    _lines = []
    host = socket.gethostname()
    server = _listen(0) if is_primary() else None
    first = _from_every_process(json.dumps((host, server and server.getsockname()[1])))[0]
    if server:
        threading.Thread(target=_admit, args=(server,), daemon=True).start()
        return
    host_0, port = json.loads(first)
    with contextlib.suppress(OSError):  # Where a firewall forbids it, JAX's heartbeat remains.
        line = socket.create_connection((_host(place) or host_0, port), timeout=5.0)
        line.sendall(f"process {jax.process_index()} ({host})".encode())
        _watch(line, f"process 0 ({host_0})")


def _admit(server: socket.socket) -> NoReturn:
    while True:
        line, _ = server.accept()
        line.settimeout(5.0)
        with contextlib.suppress(OSError):
            name = line.recv(128).decode(errors="replace")
            if name.startswith("process "):  # A port scan is none of ours.
                _watch(line, name)


def _watch(line: socket.socket, peer: str) -> None:
    line.settimeout(None)
    _lines.append(line)
    threading.Thread(target=_await_loss, args=(line, peer), daemon=True).start()


def _await_loss(line: socket.socket, peer: str) -> None:
    """Waits until a connection breaks, or process 0 says who was lost; then ends this process."""
    lost = peer
    with contextlib.suppress(OSError):
        lost = line.recv(128).decode() or peer
    if _ending.is_set():
        return
    _ending.set()
    for other in _lines:
        with contextlib.suppress(OSError):
            other.sendall(lost.encode())
    if is_primary():
        time.sleep(_GRACE_S)
    print(
        f"ig_jax: {lost} ended unexpectedly, so this process ends as well; restart the run to "
        "continue from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(Exit.PEER_LOST)


def _leave() -> None:
    """At exit: the others may go from now on, unless an exception is why this process ends."""
    if getattr(sys, "last_value", None) is not None:
        # The loss of another makes collectives raise; its line is the better explanation.
        time.sleep(2 * _GRACE_S)
        abandon(Exit.ERROR)
    _ending.set()
