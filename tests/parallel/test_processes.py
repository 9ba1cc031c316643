"""Several real processes over loopback: they meet, disagree, get lost, and say so in one line."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from ig_jax.errors import Exit, InputError
from ig_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
START = """
import sys
from ig_jax.parallel import processes
from ig_jax.errors import InputError
try:
    processes.initialize({settings!r}, timeout_s={timeout})
except InputError as error:
    print(f"InputError: {{error}}", file=sys.stderr)
    processes.abandon(2)
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
# What launchers and clusters set, which a machine that runs these tests may have set as well.
FOREIGN = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "FLUX_", "IG_JAX", "JAX_COORDINATOR")


def foreign(name: str) -> bool:
    return name.startswith(FOREIGN) or name in ("WORLD_SIZE", "RANK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not foreign(k)}
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
    assert child.returncode == 2, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("InputError: "), stderr
    return lines[0]


def start_code(settings: dict | None = None, timeout: float = 30) -> str:
    return START.format(settings=settings or {}, timeout=timeout)


# Real runs.


def test_two_processes_meet_and_compute_together(launch):
    port = free_port()
    code = start_code() + GATHER
    children = [launch(code, **place(port, i, 2)) for i in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert "[0, 1] 2 True" in outputs[0][0]
    assert "[0, 1] 2 False" in outputs[1][0]


def test_every_process_names_the_fields_that_differ(launch):
    port = free_port()
    settings = [{"seed": 0, "train": {"steps": 9}}, {"seed": 1, "train": {"ema": 0.5}}]
    children = [launch(start_code(s), **place(port, i, 2)) for i, s in enumerate(settings)]
    for child in children:
        assert error_line(child) == (
            "InputError: process 1 differs from process 0: config.seed is 1, expected 0; "
            "config.train.ema is 0.5, expected None; config.train.steps is None, expected 9"
        )


def test_dead_coordinator_is_named_within_the_timeout(launch):
    port = free_port()
    line = error_line(launch(start_code(timeout=1), **place(port, 1, 2)))
    assert f"coordinator 127.0.0.1:{port} did not answer process 1 within 1 s" in line


def test_a_port_that_is_taken_is_refused(launch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = error_line(launch(start_code(), **place(port, 0, 2)))
    assert f"process 0 cannot listen at 127.0.0.1:{port}: Address already in use" in line


def test_several_processes_that_cannot_meet_are_refused(launch):
    line = error_line(launch(start_code(), OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"))
    assert "OMPI_COMM_WORLD_SIZE=2" in line and "IG_JAX_COORDINATOR=HOST:PORT" in line


@pytest.mark.parametrize(("victim", "number"), [(0, 2), (1, 3)])
def test_killing_one_process_ends_the_others_with_a_line(launch, victim, number):
    port = free_port()
    code = start_code() + SLEEP
    children = [launch(code, **place(port, i, number)) for i in range(number)]
    for child in children:
        assert "ready\n" in iter(child.stdout.readline, "")  # after what Gloo says
    children[victim].send_signal(signal.SIGKILL)
    for i, child in enumerate(children):
        if i == victim:
            continue
        _, stderr = child.communicate(timeout=60)
        if victim == 0 and "another task died" in stderr:
            # JAX's client notices its coordinator's death at the same moment and may be first.
            continue
        assert child.returncode == Exit.PEER_LOST, stderr
        assert len(stderr.splitlines()) == 1
        assert stderr.startswith(f"ig_jax: process {victim} (")
        assert "ended unexpectedly, so this process ends as well" in stderr


@pytest.mark.parametrize(
    ("failing", "end", "code", "said"),
    [(0, "raise OSError('disk full')", 1, "disk full"), (1, "processes.abandon(2)", 2, "")],
)
def test_a_failing_process_ends_the_others(launch, failing, end, code, said):
    port = free_port()
    survivor = launch(start_code() + SLEEP, **place(port, 1 - failing, 2))
    child = launch(start_code() + end, **place(port, failing, 2))
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code and said in stderr
    _, stderr = survivor.communicate(timeout=60)
    assert survivor.returncode == Exit.PEER_LOST, stderr
    assert f"ig_jax: process {failing} (" in stderr


def test_one_process_needs_nothing(launch):
    check = "import jax; print(jax.distributed.is_initialized(), processes.is_primary())"
    child = launch(start_code() + check)
    stdout, stderr = child.communicate(timeout=60)
    assert stdout.strip() == "False True", stderr


@pytest.mark.parametrize("index", [0, 1])
def test_the_primary_is_jaxs_where_jax_was_started_elsewhere(monkeypatch, index):
    assert processes.is_primary()
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert processes.is_primary() == (index == 0)


def test_a_stranger_who_calls_is_no_process_of_the_run(monkeypatch):
    monkeypatch.setattr(processes, "_lines", [])
    # Whoever is lost does not end this process, nor a later test's.
    monkeypatch.setattr(processes, "_await_loss", lambda line, peer: None)
    server = processes._listen(0)
    threading.Thread(target=processes._admit, args=(server,), daemon=True).start()
    address = ("127.0.0.1", server.getsockname()[1])
    with socket.create_connection(address) as scan, socket.create_connection(address) as guest:
        scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
        guest.sendall(b"process 1 (there)")
        while not processes._lines:
            time.sleep(0.01)
        (line,) = processes._lines
        assert line.getpeername()[1] == guest.getsockname()[1]


# The place.


@pytest.fixture
def clean(monkeypatch):
    for name in filter(foreign, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    return monkeypatch


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JAX_COORDINATOR_ADDRESS": "a:1"},
        {"IG_JAX_NUM_PROCESSES": "1"},
        # Told to run alone, whatever a launcher says.
        {"IG_JAX_NUM_PROCESSES": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # Shells of salloc and sbatch, in which four tasks may be started later.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # Launchers of a single process.
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"PMIX_RANK": "0"},
        # A name that anyone may use, without the other that torchrun sets.
        {"WORLD_SIZE": "4"},
    ],
)
def test_no_sign_of_other_processes(clean, environ):
    assert processes.find_place(environ) is None


def test_the_place_is_read(clean):
    assert processes.find_place(place(1234, 1, 4)) == ("127.0.0.1:1234", 1, 4)
    # Ours win over whatever a launcher says.
    assert processes.find_place(place(1234, 1, 4) | SLURM) == ("127.0.0.1:1234", 1, 4)
    assert processes.find_place(place(1, 0, 2) | {"WORLD_SIZE": "4", "RANK": "3"})[1:] == (0, 2)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"IG_JAX_NUM_PROCESSES": "two"}, "IG_JAX_NUM_PROCESSES='two': expected a whole number"),
        ({"IG_JAX_NUM_PROCESSES": "2"}, "missing: IG_JAX_COORDINATOR, IG_JAX_PROCESS_ID"),
        (place(1, 2, 2), "IG_JAX_PROCESS_ID is 2 and IG_JAX_NUM_PROCESSES 2: expected 0 ≤ id <"),
        (place(1, -1, 2), "IG_JAX_PROCESS_ID is -1"),
        (place(1, 0, 0), "IG_JAX_NUM_PROCESSES 0"),
        (place(1, 1, 2) | {"IG_JAX_COORDINATOR": "host"}, "is 'host': expected \"host:port\""),
        (place(1, 1, 2) | {"IG_JAX_COORDINATOR": "host:99999"}, "is 'host:99999'"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "set by Open MPI"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 and RANK=1 .set by torchrun.*_ID .of th"),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "PMI_SIZE=8 and PMI_RANK=0"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 .set by PMIx"),
        # A container that hides half of Slurm's variables from its processes.
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "SLURM_PROCID=3 .set by Slurm"),
    ],
)
def test_bad_places(clean, environ, message):
    with pytest.raises(InputError, match=message) as error:
        processes.find_place(environ)
    assert "IG_JAX_" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def asked(clean):
    """What JAX was asked to join."""
    calls = []
    clean.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    "environ",
    [SLURM, {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "3"}],
    ids=["slurm", "ompi"],
)
def test_jax_asks_the_cluster_for_what_is_not_given(clean, asked, environ):
    for name, value in environ.items():
        clean.setenv(name, value)
    processes.initialize({})
    clean.setenv("IG_JAX_COORDINATOR", "127.0.0.1:9")  # Nobody answers there, but who is process 0?
    processes.initialize({})
    assert [call["coordinator_address"] for call in asked] == [None, "127.0.0.1:9"]
    assert {call["process_id"] for call in asked} == {None}
    assert {call["cluster_detection_method"] for call in asked} == {None}


def test_jax_asks_on_tpus(clean, asked):
    clean.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    processes.initialize({})  # JAX_PLATFORMS is "cpu" in tests.
    assert not asked
    clean.delenv("JAX_PLATFORMS")
    processes.initialize({})
    assert len(asked) == 1


def test_a_cluster_that_does_not_answer(clean):
    def fail(**options):
        raise ValueError("coordinator_address should be defined.")

    clean.setattr(jax.distributed, "initialize", fail)
    clean.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    clean.delenv("JAX_PLATFORMS")
    processes.initialize({})  # A lone TPU, as far as JAX knows.
    clean.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match="does not tell this process's place .*IG_JAX_COORDINATOR"):
        processes.initialize({})
