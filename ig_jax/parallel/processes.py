"""Starts a run of several processes: who takes part, that they agree, and what ends them.

`jax.distributed` carries the run; because its client aborts with a C++ stack when a process is
missing or dies, the processes first meet over plain TCP at the coordinator's address, where every
mistake becomes one line, and they keep those connections to notice the loss of one another.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import glob
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ig_jax.errors import InputError

# The runtime's own check, for hosts that vanish without closing their connections.
HEARTBEAT_TIMEOUT_S = 40
EXIT_CODE_PEER_LOST = 1
# Kubernetes is not among them: a lone pod there is no sign of a run of several processes.
_CLUSTERS = ("gcetpu", "gketpu", "slurm", "ompi")
_RETRY_S = 0.1
_NEWS_S = 0.5
_LINE_BYTES = 4096
_FAREWELL = b"bye\n"


@dataclasses.dataclass(frozen=True)
class Layout:
    """One process's place in a run: the coordinator's "host:port", its id, and how many there are.

    `cluster` is the name of the environment that JAX recognised, or None if all was given by hand.
    """

    coordinator: str
    process_id: int
    num_processes: int
    cluster: str | None = None


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a process tells the coordinator about itself when it arrives."""

    process_id: int
    num_processes: int
    config_hash: str
    host: str

    def __str__(self) -> str:
        return f"process {self.process_id} ({self.host})"


class _Run:
    """The one run that this Python process is part of (`jax.distributed` has one as well)."""

    process_id: int = 0
    peers: dict[socket.socket, str] = {}
    watcher: threading.Thread


def is_primary() -> bool:
    """Returns whether this process writes logs and pictures: process 0, or the only one.

    JAX's number counts, as it does for Orbax and for gathered arrays: a program that uses the
    library may have called `jax.distributed.initialize` itself.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0


def initialize(
    config_hash: str,
    *,
    coordinator_address: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Joins this process to its run, or does nothing where there is only one process.

    A run of several processes is one whose arguments, or `IG_JAX_COORDINATOR`,
    `IG_JAX_PROCESS_ID` and `IG_JAX_NUM_PROCESSES`, or cluster (TPU pod, Slurm; of Open MPI only the
    variables of version 4 are known) say so. Must come before the first JAX computation. From then
    on, if another process dies, this one prints a line and ends with exit code 1, since no
    collective could ever finish again. (When process 0 is the one that dies, JAX's client may abort
    first, with a message of its own.)

    Args:
      config_hash: any string; must be the same in all processes.
      coordinator_address: "host:port" at which process 0 is reached.
      process_id: this process's id, 0 to num_processes − 1.
      num_processes: how many processes the run has.
      timeout_s: how long to wait for the others, in seconds.

    Raises:
      InputError: the layout is incomplete or contradictory, the coordinator or another process
        does not turn up in time, or the processes' configs differ. No JAX state is touched then.
    """
    layout = find_layout(
        os.environ,
        coordinator_address=coordinator_address,
        process_id=process_id,
        num_processes=num_processes,
        timeout_s=timeout_s,
    )
    if layout is None:
        return
    hello = Hello(layout.process_id, layout.num_processes, config_hash, socket.gethostname())
    deadline = time.monotonic() + timeout_s
    if layout.process_id == 0:
        peers = _gather(layout, hello, deadline, timeout_s)
    else:
        peers = _join(layout, hello, deadline, timeout_s)
    _Run.process_id = layout.process_id
    _Run.peers = peers
    _Run.watcher = threading.Thread(target=_watch, name="ig_jax-peers", daemon=True)
    _Run.watcher.start()
    _start_jax(layout, timeout_s)
    # After JAX's own exit handlers are registered, hence before they wait for the peers.
    atexit.register(_depart)


def abandon(code: int) -> NoReturn:
    """Ends this process with exit code `code`, and the run's other processes with it.

    For errors after `initialize`: an ordinary exit would first wait for the others, which are
    themselves waiting for this one.
    """
    if not _Run.peers:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Where the layout comes from.


def find_layout(
    environ: Mapping[str, str],
    *,
    coordinator_address: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    timeout_s: float = 300.0,
) -> Layout | None:
    """Returns this process's layout, or None where it is the only process.

    Arguments win over `IG_JAX_*` variables, those over JAX's `JAX_COORDINATOR_ADDRESS`, and that
    over what the cluster says.

    Raises:
      InputError: something is missing, not a number, or out of range.
    """
    address = coordinator_address or environ.get("IG_JAX_COORDINATOR")
    if process_id is None:
        process_id = _integer(environ, "IG_JAX_PROCESS_ID")
    if num_processes is None:
        num_processes = _integer(environ, "IG_JAX_NUM_PROCESSES")
    given = (address, process_id, num_processes)
    address = address or environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes == 1 and process_id in (None, 0):
        return None
    cluster = None
    if None in (address, process_id, num_processes) and _may_be_cluster(environ):
        address, process_id, num_processes, cluster = _ask_cluster(
            address, process_id, num_processes, timeout_s
        )
    if cluster is None and given == (None, None, None):
        return None
    if num_processes == 1 and process_id == 0:
        return None
    _check_layout(address, process_id, num_processes)
    return Layout(address, process_id, num_processes, cluster)


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: expected a whole number") from None


def _check_layout(address: str | None, process_id: int | None, num_processes: int | None) -> None:
    values = {
        "coordinator address (IG_JAX_COORDINATOR)": address,
        "process id (IG_JAX_PROCESS_ID)": process_id,
        "number of processes (IG_JAX_NUM_PROCESSES)": num_processes,
    }
    if missing := [name for name, value in values.items() if value is None]:
        raise InputError(
            f"a run of several processes needs all of {', '.join(values)}; "
            f"missing: {', '.join(missing)}"
        )
    if num_processes < 1:
        raise InputError(f"number of processes is {num_processes}; expected at least 1")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"process id is {process_id}; with {num_processes} processes it must be "
            f"0 to {num_processes - 1}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f'coordinator address is {address!r}; expected "host:port", as in "10.0.0.1:8476"'
        )


def _may_be_cluster(environ: Mapping[str, str]) -> bool:
    """Looks for a cluster's traces without importing JAX."""
    if environ.get("SLURM_NTASKS", "1") != "1" or "OMPI_MCA_orte_hnp_uri" in environ:
        return True
    on_cpu = environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
    return not on_cpu and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _ask_cluster(
    address: str | None, process_id: int | None, num_processes: int | None, timeout_s: float
) -> tuple[str | None, int | None, int | None, str | None]:
    """Fills what is None with what JAX's own detection of clusters finds."""
    from jax._src.clusters import ClusterEnv  # JAX has no public name for it.

    known = [env for env in ClusterEnv._cluster_types if env.name in _CLUSTERS]
    name = "the cluster"
    try:
        env = next((env for env in known if env.is_env_present()), None)
        if env is None:
            return address, process_id, num_processes, None
        name = env.name
        if num_processes is None:
            num_processes = env.get_process_count()
        if process_id is None:
            process_id = env.get_process_id()
        if address is None and num_processes > 1:
            address = env.get_coordinator_address(
                timeout_secs=int(timeout_s),
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"cannot read this process's place from {name}: {error!r}") from error
    return address, process_id, num_processes, name


# The meeting before JAX starts.


def disagreement(hellos: Sequence[Hello], appointment: str) -> str | None:
    """Returns what is wrong with those who arrived (the coordinator first), or None.

    `appointment` says where and within what time they were to arrive.
    """
    first = hellos[0]
    expected = first.num_processes
    for other in hellos[1:]:
        if other.num_processes != first.num_processes:
            return (
                f"{other} was started as one of {other.num_processes} processes, "
                f"{first} as one of {first.num_processes}"
            )
    seen: dict[int, Hello] = {}
    for hello in hellos:
        if hello.process_id in seen:
            twin = seen[hello.process_id]
            return f"two processes have id {hello.process_id}, on {twin.host} and on {hello.host}"
        seen[hello.process_id] = hello
    if missing := sorted(set(range(expected)) - set(seen)):
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        return f"{len(missing)} of {expected} processes did not turn up {appointment}: {names}"
    for other in hellos[1:]:
        if other.config_hash != first.config_hash:
            return (
                f"{other} has another config than {first}: hash {other.config_hash}, "
                f"expected {first.config_hash}"
            )
    return None


def _gather(
    layout: Layout, hello: Hello, deadline: float, timeout_s: float
) -> dict[socket.socket, str]:
    """As the coordinator, awaits everyone, tells everyone the verdict, returns the connections."""
    arrived: dict[socket.socket, Hello] = {}
    with _listen(layout) as server:
        while len(arrived) < layout.num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            if guest := _hear(connection):
                arrived[connection] = guest
            else:
                connection.close()
    appointment = f"at {layout.coordinator} within {timeout_s:g} s"
    error = disagreement([hello, *arrived.values()], appointment)
    for connection in arrived:
        _send(connection, json.dumps({"error": error}).encode() + b"\n")
    if error:
        for connection in arrived:
            connection.close()
        raise InputError(error)
    return {connection: str(guest) for connection, guest in arrived.items()}


def _listen(layout: Layout) -> socket.socket:
    port = int(layout.coordinator.rpartition(":")[2])
    ipv6 = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            dualstack_ipv6=ipv6,
            backlog=layout.num_processes,
        )
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen at {layout.coordinator}: {error.strerror}"
        ) from error


def _hear(connection: socket.socket) -> Hello | None:
    """Reads a guest's hello; None from anything that is not one of ours, such as a port scan."""
    connection.settimeout(5.0)
    try:
        return Hello(**json.loads(_read_line(connection)))
    except (OSError, ValueError, TypeError):
        return None


def _join(
    layout: Layout, hello: Hello, deadline: float, timeout_s: float
) -> dict[socket.socket, str]:
    """Finds the coordinator, says hello, heeds the verdict; returns the one connection."""
    host, _, port = layout.coordinator.rpartition(":")
    connection = _connect(host.strip("[]"), int(port), deadline)
    if isinstance(connection, OSError):
        raise InputError(
            f"the coordinator {layout.coordinator} did not answer process {layout.process_id} "
            f"within {timeout_s:g} s ({connection.strerror or connection})"
        )
    _send(connection, json.dumps(dataclasses.asdict(hello)).encode() + b"\n")
    # The coordinator may have started as late as our deadline and then waits for others.
    connection.settimeout(max(deadline - time.monotonic(), 0.0) + timeout_s)
    try:
        error = json.loads(_read_line(connection))["error"]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        connection.close()
        raise InputError(
            f"what answered process {layout.process_id} at {layout.coordinator} is not process 0 "
            "of a run that is starting: wrong port, or the run has started or ended already"
        ) from problem
    if error:
        connection.close()
        raise InputError(error)
    return {connection: "process 0"}


def _connect(host: str, port: int, deadline: float) -> socket.socket | OSError:
    """Tries until the deadline; returns the last error if nobody answered."""
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((host, port), timeout=max(left, 0.001))
            if connection.getsockname() != connection.getpeername():
                return connection
            # Linux lets a socket reach itself where nobody listens on a port it may also pick.
            connection.close()
            error = ConnectionRefusedError("connection refused")
        except OSError as problem:
            error = problem
        if left <= _RETRY_S:
            return error
        time.sleep(_RETRY_S)


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
        piece = connection.recv(1)  # Byte by byte, so that nothing after the line is lost.
        if not piece:
            break
        line += piece
    return line


def _send(connection: socket.socket, line: bytes) -> None:
    with contextlib.suppress(OSError):  # Whoever is gone is noticed by the reader.
        connection.sendall(line)


def _start_jax(layout: Layout, timeout_s: float) -> None:
    import jax

    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=layout.coordinator,
        num_processes=layout.num_processes,
        process_id=layout.process_id,
        # In a cluster JAX also picks the local devices (one GPU for each Slurm task).
        cluster_detection_method=None if layout.cluster else "deactivate",
        initialization_timeout=max(int(timeout_s), 1),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
    )


# From then on.


def _watch() -> None:
    """Waits for news from the peers; ends this process when one of them is lost."""
    for connection in _Run.peers:
        connection.settimeout(None)
    watched = dict(_Run.peers)
    while watched:
        for connection in select.select(list(watched), [], [])[0]:
            try:
                line = _read_line(connection)
            except OSError:
                line = b""
            if line == _FAREWELL:
                del watched[connection]
                continue
            # The coordinator sees every loss and passes on whose it was.
            lost = line.decode(errors="replace").strip() or watched[connection]
            for other in watched:
                _send(other, f"{lost}\n".encode())
            if _Run.process_id == 0 and len(watched) > 1:
                time.sleep(_NEWS_S)  # JAX aborts the others the moment its coordinator is gone.
            _end(lost)


def _end(lost: str) -> NoReturn:
    print(
        f"ig_jax: {lost} ended unexpectedly, so process {_Run.process_id} ends as well; "
        "restart the run to continue from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(EXIT_CODE_PEER_LOST)


def _depart() -> None:
    """At exit: takes leave of the peers, or lets them know if an exception is the cause."""
    if getattr(sys, "last_value", None) is not None:
        # A lost peer makes collectives raise; the watcher then has the better explanation.
        _Run.watcher.join(timeout=2 * _NEWS_S)
        abandon(EXIT_CODE_PEER_LOST)
    for connection in _Run.peers:
        _send(connection, _FAREWELL)
