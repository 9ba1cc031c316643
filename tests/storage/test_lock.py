"""One run at a time in a workdir: who is refused, and from whom the lock is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from ig_jax.errors import InputError
from ig_jax.storage import lock as lock_lib
from ig_jax.storage.lock import hold
from ig_jax.training import loop
from ig_jax.training.callbacks import Callback
from ig_jax.training.setup import Setup
from tests.common import tiny_config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_lib, "SILENT_S", 0.2)
    monkeypatch.setattr(lock_lib, "_SETTLE_S", 0.01)
    monkeypatch.setattr(lock_lib, "BEAT_S", 0.01)


def write(workdir, **changes):
    now = time.time()
    content = {"host": lock_lib.socket.gethostname(), "pid": os.getpid(), "token": "other"}
    content |= {"started": lock_lib._started(os.getpid()), "since": now - 90, "beat": now - 5}
    (workdir / lock_lib.FILE).write_text(json.dumps(content | changes))


def test_a_second_run_is_refused_by_name_and_age(tmp_path):
    in_use = pytest.raises(InputError, match="is in use by process")
    with hold(tmp_path), in_use as caught, hold(tmp_path):
        pass
    assert not (tmp_path / lock_lib.FILE).exists()
    host = lock_lib.socket.gethostname()
    assert f"process {os.getpid()} on {host} (for 0 s, last sign of life 0 s ago)" in str(
        caught.value
    )
    with hold(tmp_path):  # given back
        pass


def test_the_age_is_that_of_the_other_run(tmp_path):
    write(tmp_path)
    with (
        pytest.raises(InputError, match=r"\(for 90 s, last sign of life 5 s ago\)"),
        hold(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / lock_lib.FILE).read_text())["token"] == "other"


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


STALE = {
    "a process that is gone": lambda: {"pid": dead_process()},
    "another process of that number": lambda: {"started": "1"},
    "no process at all": lambda: {"pid": None},
    "a silent run elsewhere": lambda: {"host": "elsewhere"},
    "a run elsewhere long ago": lambda: {"host": "elsewhere", "beat": time.time() - 1e6},
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_lock_is_taken_over(case, tmp_path, caplog):
    write(tmp_path, **STALE[case]())
    with caplog.at_level("WARNING", "ig_jax"), hold(tmp_path):
        assert json.loads((tmp_path / lock_lib.FILE).read_text())["pid"] == os.getpid()
    assert any("taking over" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("content", [b"", b"[]", b"\x00\xff"])
def test_an_unreadable_lock_is_taken_over(content, tmp_path):
    (tmp_path / lock_lib.FILE).write_bytes(content)
    with hold(tmp_path):
        pass


def test_a_living_run_elsewhere_is_recognised_by_its_signs_of_life(tmp_path, monkeypatch):
    with hold(tmp_path):  # beats
        monkeypatch.setattr(lock_lib.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(InputError, match="is in use by process"), hold(tmp_path):
            pass


def test_who_lost_the_lock_stops_before_it_saves(tmp_path):
    class TakeOver(Callback):
        def on_step(self, moment):
            if moment.step == 2:
                write(tmp_path)
                time.sleep(0.3)

    with pytest.raises(InputError, match="was taken over by another run"):
        loop.train(Setup.from_config(tiny_config(validate_every=0), tmp_path), [TakeOver()])
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert json.loads((tmp_path / lock_lib.FILE).read_text())["token"] == "other"


def test_training_where_another_trains_changes_nothing(tmp_path):
    write(tmp_path)
    leftover = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    with pytest.raises(InputError, match="is in use by process"):
        loop.train(Setup.from_config(tiny_config(), tmp_path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "3.orbax-checkpoint-tmp",
        "checkpoints",
        lock_lib.FILE,
    ]
