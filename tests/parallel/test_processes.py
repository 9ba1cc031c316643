"""Several real processes over loopback: they meet, disagree, get lost, and say so in one line."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from ig_jax.errors import InputError
from ig_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
START = """
import sys
from ig_jax.parallel import processes
from ig_jax.errors import InputError
try:
    processes.initialize({hash!r}, timeout_s={timeout})
except InputError as error:
    sys.exit(f"InputError: {{error}}")
"""
GATHER = """
import jax, numpy as np
from jax.experimental import multihost_utils
ids = multihost_utils.process_allgather(np.array([jax.process_index()])).ravel().tolist()
print(ids, jax.device_count(), processes.is_primary(), flush=True)
"""
SLEEP = """
import time
print("ready", flush=True)
time.sleep(60)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "IG_JAX"))}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    kept["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    return kept | extra


@pytest.fixture
def launch():
    """Starts children; whatever a failed test leaves behind is killed."""
    children: list[subprocess.Popen] = []

    def start(code: str, **extra: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(**extra),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


def place(port: int, process_id: int, num_processes: int) -> dict[str, str]:
    return {
        "IG_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "IG_JAX_PROCESS_ID": str(process_id),
        "IG_JAX_NUM_PROCESSES": str(num_processes),
    }


def error_line(child: subprocess.Popen) -> str:
    """Returns what a child that met bad input said: one line, and no stack."""
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 1, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("InputError: "), stderr
    return lines[0]


def start_code(config_hash: str = "same", timeout: float = 30) -> str:
    return START.format(hash=config_hash, timeout=timeout)


# Real runs.


def test_two_processes_meet_and_compute_together(launch):
    port = free_port()
    code = start_code() + GATHER
    children = [launch(code, **place(port, i, 2)) for i in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert "[0, 1] 2 True" in outputs[0][0]
    assert "[0, 1] 2 False" in outputs[1][0]


def test_different_configs_are_refused_by_every_process(launch):
    port = free_port()
    names = ["aaa", "aaa", "bbb"]
    children = [launch(start_code(name), **place(port, i, 3)) for i, name in enumerate(names)]
    for child in children:
        line = error_line(child)
        assert "process 2 (" in line and "process 0 (" in line
        assert "hash bbb, expected aaa" in line


def test_dead_coordinator_is_named_within_the_timeout(launch):
    port = free_port()
    line = error_line(launch(start_code(timeout=1), **place(port, 1, 2)))
    assert f"coordinator 127.0.0.1:{port} did not answer process 1 within 1 s" in line


def test_coordinator_names_those_who_did_not_turn_up(launch):
    port = free_port()
    coordinator = launch(start_code(timeout=3), **place(port, 0, 4))
    guest = launch(start_code(timeout=3), **place(port, 2, 4))
    for child in (coordinator, guest):
        line = error_line(child)
        assert f"2 of 4 processes did not turn up at 127.0.0.1:{port} within 3 s: 1, 3" in line


def test_two_processes_with_one_id_are_refused(launch):
    port = free_port()
    children = [launch(start_code(), **place(port, i, 3)) for i in (0, 1, 1)]
    for child in children:
        assert "two processes have id 1" in error_line(child)


def test_different_process_counts_are_refused(launch):
    port = free_port()
    children = [launch(start_code(), **place(port, i, n)) for i, n in ((0, 2), (1, 3))]
    for child in children:
        line = error_line(child)
        assert "was started as one of 3 processes" in line and "as one of 2" in line


def test_a_port_that_is_taken_is_refused(launch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = error_line(launch(start_code(), **place(port, 0, 2)))
    assert f"process 0 cannot listen at 127.0.0.1:{port}: Address already in use" in line


def test_a_stranger_at_the_coordinators_address_is_refused(launch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        line = error_line(launch(start_code(), **place(port, 1, 2)))
    assert f"at 127.0.0.1:{port} is not process 0 of a run that is starting" in line


def test_a_port_scan_does_not_disturb_the_meeting(launch):
    port = free_port()
    coordinator = launch(start_code() + "print('up')", **place(port, 0, 2))
    scan = processes._connect("127.0.0.1", port, processes.time.monotonic() + 30)
    scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
    guest = launch(start_code() + "print('up')", **place(port, 1, 2))
    for child in (coordinator, guest):
        stdout, stderr = child.communicate(timeout=60)
        assert child.returncode == 0 and "up" in stdout, stderr
    scan.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_others_with_a_line(launch, victim):
    port = free_port()
    children = [launch(start_code() + SLEEP, **place(port, i, 3)) for i in range(3)]
    for child in children:
        assert child.stdout.readline().strip() == "ready"
    children[victim].send_signal(signal.SIGKILL)
    for i, child in enumerate(children):
        if i == victim:
            continue
        _, stderr = child.communicate(timeout=60)
        if victim == 0 and child.returncode == -signal.SIGABRT:
            # JAX's client notices its coordinator's death at the same moment and may be first.
            assert "another task died" in stderr
            continue
        assert child.returncode == processes.EXIT_CODE_PEER_LOST, stderr
        assert f"ig_jax: process {victim}" in stderr
        assert f"ended unexpectedly, so process {i} ends as well" in stderr


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("raise OSError('disk full')", 1, "disk full"), ("processes.abandon(2)", 2, "")],
)
def test_a_failing_process_ends_the_others(launch, end, code, said):
    port = free_port()
    survivor = launch(start_code() + SLEEP, **place(port, 0, 2))
    failing = launch(start_code() + end, **place(port, 1, 2))
    _, stderr = failing.communicate(timeout=60)
    assert failing.returncode == code and said in stderr
    _, stderr = survivor.communicate(timeout=60)
    assert survivor.returncode == processes.EXIT_CODE_PEER_LOST
    assert "ig_jax: process 1" in stderr


def test_one_process_needs_nothing_and_imports_no_jax(launch):
    child = launch(start_code() + "print('jax' in sys.modules, processes.is_primary())")
    stdout, stderr = child.communicate(timeout=60)
    assert stdout.strip() == "False True", stderr


@pytest.mark.parametrize("index", [0, 1])
def test_the_primary_is_jaxs_where_jax_was_started_elsewhere(monkeypatch, index):
    import jax

    assert processes.is_primary()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert processes.is_primary() == (index == 0)


# The layout.


@pytest.fixture
def clean(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "IG_JAX", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_no_sign_of_other_processes(clean):
    assert processes.find_layout({}) is None
    assert processes.find_layout({"JAX_COORDINATOR_ADDRESS": "a:1"}) is None
    assert processes.find_layout({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}) is None
    assert processes.find_layout({}, num_processes=1, process_id=0) is None
    assert processes.find_layout({"IG_JAX_NUM_PROCESSES": "1"}) is None


def test_arguments_win_over_variables():
    environ = place(1234, 1, 4) | {"JAX_COORDINATOR_ADDRESS": "other:9"}
    assert processes.find_layout(environ) == processes.Layout("127.0.0.1:1234", 1, 4)
    found = processes.find_layout(
        environ, coordinator_address="[::1]:80", process_id=2, num_processes=3
    )
    assert found == processes.Layout("[::1]:80", 2, 3)
    environ.pop("IG_JAX_COORDINATOR")
    assert processes.find_layout(environ).coordinator == "other:9"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"IG_JAX_NUM_PROCESSES": "two"}, "IG_JAX_NUM_PROCESSES='two': expected a whole number"),
        ({"IG_JAX_NUM_PROCESSES": "2"}, "missing: coordinator address .*, process id"),
        (place(1, 2, 2), "process id is 2; with 2 processes it must be 0 to 1"),
        (place(1, -1, 2), "process id is -1"),
        (place(1, 0, 0), "number of processes is 0"),
        (place(1, 1, 2) | {"IG_JAX_COORDINATOR": "host"}, "is 'host'; expected \"host:port\""),
        (place(1, 1, 2) | {"IG_JAX_COORDINATOR": "host:99999"}, "is 'host:99999'"),
    ],
)
def test_bad_layouts(environ, message):
    with pytest.raises(InputError, match=message):
        processes.find_layout(environ)


def test_slurm_tasks(clean):
    variables = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    for name, value in variables.items():
        clean.setenv(name, value)
    found = processes.find_layout(os.environ)
    assert found == processes.Layout("node007:61441", 9, 16, "slurm")
    found = processes.find_layout(os.environ, coordinator_address="head:5000")
    assert found == processes.Layout("head:5000", 9, 16, "slurm")


def test_open_mpi_ranks(clean):
    clean.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    clean.setenv("OMPI_COMM_WORLD_SIZE", "3")
    clean.setenv("OMPI_COMM_WORLD_RANK", "2")
    found = processes.find_layout(os.environ)
    assert (found.process_id, found.num_processes, found.cluster) == (2, 3, "ompi")
    assert found.coordinator.startswith("10.96.0.1:")
    clean.delenv("OMPI_COMM_WORLD_RANK")
    with pytest.raises(InputError, match="cannot read this process's place from ompi"):
        processes.find_layout(os.environ)


def test_tpu_pod_of_two_slices(clean):
    from jax._src.clusters import cloud_tpu_cluster

    metadata = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:0:10.0.0.1,a:1:10.0.0.2,a:2:10.0.0.3,a:3:10.0.0.4",
    }
    variables = {
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    for name, value in variables.items():
        clean.setenv(name, value)
    for name in ("TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
        clean.delenv(name, raising=False)
    clean.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    clean.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata.get(key, ""), 200))
    clean.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    found = processes.find_layout(os.environ)
    assert found == processes.Layout("10.0.0.1:8482", 7, 8, "gcetpu")
    # On one host of one slice there is nobody to meet, and JAX_PLATFORMS=cpu means no TPU.
    metadata["worker-network-endpoints"], metadata["agent-worker-number"] = "10.0.0.1", "0"
    clean.setenv("MEGASCALE_NUM_SLICES", "1")
    clean.setenv("MEGASCALE_SLICE_ID", "0")
    assert processes.find_layout(os.environ) is None
    clean.setenv("MEGASCALE_NUM_SLICES", "2")
    clean.setenv("JAX_PLATFORMS", "cpu")
    assert processes.find_layout(os.environ) is None
