"""Two real processes with four devices each train one model over loopback."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ig_jax.errors import Exit
from ig_jax.parallel import sharding
from ig_jax.storage.checkpoints import Checkpoints
from tests import meshes
from tests.parallel.test_processes import environment, free_port, place

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def start(arguments, port, process_id, log):
    """Starts one of two processes; its output goes to the file `log`."""
    # Only process 0 writes JAX's cache: it would start at once what the other still compiles, and
    # Gloo waits for 30 seconds at most.
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    devices["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with open(log, "w") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(**place(port, process_id, 2), **devices),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def wait(children, logs, timeout=300):
    """Waits for all; returns their exit codes, or kills them and fails."""
    try:
        return [child.wait(timeout) for child in children]
    except subprocess.TimeoutExpired:
        for child in children:
            child.kill()
        pytest.fail("\n".join(log.read_text()[-3000:] for log in logs))


def test_two_processes_learn_draw_and_restore_what_one_does(tmp_path):
    config = meshes.wide_config()
    one = meshes.train_and_draw(config, sharding.make_mesh(devices=jax.devices()[:1]))
    saved = meshes.train_and_draw(config, sharding.make_mesh(1, 8)).state
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(saved, meshes.STEPS, config, {"step": meshes.STEPS})
    checkpoints.close()
    port, output = free_port(), tmp_path / "result"
    logs = [tmp_path / f"log{i}" for i in range(2)]
    command = ["-m", "tests.meshes", str(tmp_path), str(output)]
    children = [start(command, port, i, logs[i]) for i in range(2)]
    assert wait(children, logs) == [0, 0], [log.read_text() for log in logs]
    expected = jax.tree.leaves(jax.device_get(saved))
    for i in range(2):
        with np.load(f"{output}.{i}.npz") as file:
            np.testing.assert_allclose(file["losses"], one.losses, rtol=1e-5)
            np.testing.assert_allclose(file["samples"], one.samples, atol=1e-4)
            for k, leaf in enumerate(expected):
                np.testing.assert_array_equal(file[f"leaf{k}"], leaf)


def checkpoint_steps(workdir):
    directory = workdir / "checkpoints"
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def long_run(workdir, **fields):
    """The command of a run that lasts until it is stopped."""
    fields = dict(validate_every=0, sample_every=0, batch_size=64, num_steps=100_000) | fields
    return [
        *("-m", "ig_jax.main", "--config=configs/digits_ig.py", f"--workdir={workdir}"),
        *(f"--config.train.{name}={value}" for name, value in fields.items()),
        *("--config.model.width=32", "--config.model.heads=2", "--config.evaluation.at_end=False"),
        "--config.mesh.fsdp=2",
    ]


def await_checkpoint(workdir, children, log):
    deadline = time.monotonic() + 300
    while not checkpoint_steps(workdir):
        assert all(child.poll() is None for child in children), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_one_terminated_process_stops_all_with_the_code_that_launchers_continue(tmp_path):
    workdir = tmp_path / "run"
    logs = [tmp_path / f"log{i}" for i in range(2)]
    port = free_port()
    command = long_run(workdir, checkpoint_every=20)
    children = [start(command, port, i, logs[i]) for i in range(2)]
    try:
        await_checkpoint(workdir, children, logs[0])
        children[1].send_signal(signal.SIGTERM)
        codes = [child.wait(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [Exit.STOPPED, Exit.STOPPED], [log.read_text()[-2000:] for log in logs]
    stopped = f"ig_jax: stopped at step {checkpoint_steps(workdir)[-1]}, checkpoint saved"
    assert [stopped in log.read_text() for log in logs] == [True, False]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_a_restart_continues(tmp_path, victim):
    workdir = tmp_path / "run"
    command = long_run(workdir, checkpoint_every=20)
    logs = [tmp_path / f"log{i}" for i in range(2)]
    port = free_port()
    children = [start(command, port, i, logs[i]) for i in range(2)]
    try:
        await_checkpoint(workdir, children, logs[0])
        children[victim].send_signal(signal.SIGKILL)
        survivor = children[1 - victim]
        code = survivor.wait(timeout=60)
    finally:
        for child in children:
            child.kill()
    said = logs[1 - victim].read_text()
    if code != -signal.SIGABRT:
        # JAX's client may notice the loss of its coordinator first, with words of its own.
        assert code == Exit.PEER_LOST, said
        assert f"ig_jax: process {victim} (" in said and "restart the run to continue" in said
    last = checkpoint_steps(workdir)[-1]
    command = [a.replace("num_steps=100000", f"num_steps={last + 3}") for a in command]
    port = free_port()
    children = [start(command, port, i, logs[i]) for i in range(2)]
    assert wait(children, logs) == [0, 0], [log.read_text() for log in logs]
    assert f"trained {last + 3} steps" in logs[0].read_text()
    assert checkpoint_steps(workdir)[-1] == last + 3
