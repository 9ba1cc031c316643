"""One run at a time in a workdir, or in a folder that latents are prepared in: a file there names
the host and process that write, and its age.

On disks the file is made in one operation. Buckets offer none, so that of two runs started within a
second both may go on for a moment: the one whose file was overwritten then stops at its next sign
of life, before it saves again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from ig_jax.errors import InputError
from ig_jax.parallel import hosts
from ig_jax.parallel.processes import is_primary
from ig_jax.paths import resolve
from ig_jax.storage.files import write_atomically

log = logging.getLogger("ig_jax")

FILE = "train.lock"
BEAT_S = 15.0
# Of a run on another host whose file does not change for so long nothing more is expected.
SILENT_S = 60.0
_SETTLE_S = 1.0


class Lock:
    """A held lock, that gives signs of life in a thread of its own; made by `hold`."""

    def __init__(self, path: epath.Path):
        self._path, self._lost, self._ended = path, False, threading.Event()
        self._content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "token": uuid.uuid4().hex,
            "since": time.time(),
        }
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock, from a run that ended without giving it back if need be.

        Raises:
            InputError: another run holds it.
        """
        while not self._create():
            found = _read(self._path)
            if found is None:
                continue  # given back meanwhile
            if _is_alive(self._path, found):
                raise InputError(
                    f"{self._path.parent} is in use by {_describe(found)}: expected one run at a "
                    f"time (if that one is gone for certain, delete {self._path})"
                )
            log.warning("taking over %s from %s, which has ended", self._path, _describe(found))
            self._path.unlink(missing_ok=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `InputError` if another run took over, as after this one was held up for long."""
        if self._lost:
            raise InputError(
                f"{self._path.parent} was taken over by another run: this one stops, unsaved"
            )

    def release(self) -> None:
        """Gives the lock back."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _create(self) -> bool:
        text = json.dumps(self._content | {"beat": time.time()})
        if "://" in os.fspath(self._path):
            if self._path.exists():
                return False
            self._path.write_text(text)
            time.sleep(_SETTLE_S)
            return self._is_ours()
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        return True

    def _is_ours(self) -> bool:
        found = _read(self._path)
        return found is not None and found.get("token") == self._content["token"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A disk that fails for a while is no reason to stop.
            with contextlib.suppress(OSError, InputError):
                if not self._is_ours():
                    self._lost = True
                    return
                with write_atomically(self._path) as partial:
                    partial.write_text(json.dumps(self._content | {"beat": time.time()}))


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[Lock]:
    """Inside, this run alone writes to a folder that exists; its primary process holds the lock.

    Raises:
        InputError: another run holds it; the line names its host, process and age.
    """
    lock = Lock(resolve(workdir) / FILE)
    if is_primary():
        lock.acquire()
    hosts.wait_for_all("lock of the workdir")
    try:
        yield lock
    finally:
        if is_primary():
            lock.release()


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a lock says; empty if it says nothing readable, None if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(path: epath.Path, found: dict[str, Any]) -> bool:
    """Whether the run that a lock names still writes; of another host that may take a while."""
    if found.get("host") == socket.gethostname():
        started = _started(found.get("pid", 0))
        return started is not None and started == found.get("started")
    if time.time() - found.get("beat", time.time()) > 10 * SILENT_S:
        return False
    log.warning(
        "%s: waiting up to %.0f s for a sign of life of %s", path, SILENT_S, _describe(found)
    )
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(_SETTLE_S)
        if _read(path) != found:
            return True
    return False


def _started(pid: int) -> str | None:
    """Tells a process from others that had or will have its number; None if there is none."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError, TypeError):
        return None
    if pid <= 0:
        return None
    with contextlib.suppress(OSError, IndexError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # its start, in ticks since boot
    return ""


def _describe(found: dict[str, Any]) -> str:
    if not {"host", "pid", "since", "beat"} <= found.keys():
        return "a run whose lock is unreadable"
    age, silent = (max(time.time() - found[name], 0) for name in ("since", "beat"))
    return (
        f"process {found['pid']} on {found['host']} (for {age:.0f} s, last sign of life "
        f"{silent:.0f} s ago)"
    )
