"""SIGTERM and Ctrl-C, seen by a thread of their own (`listen`).

So the first is answered at once, whatever the main thread is doing (importing, compiling, writing),
and none is lost in a library that swallows `KeyboardInterrupt`. What is on disk is whole at any
moment, so a process may end anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ig_jax.errors import Exit

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_CODES = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}
# One key press may come twice, from the terminal and from a program in between (uv, srun).
_SAME_S = 0.3

# Of the program: whether signals are ours, whether it trains, the pipe that signals are written to
# once a thread listens, and what to do before ending.
_watched = _training = False
_pipe: tuple[int, int] | None = None
_farewell: Callable[[], None] | None = None
# The stop that signals ask for instead of ending the process.
_request: Request | None = None
_last_signal = -_SAME_S


class Request:
    """What SIGTERM and Ctrl-C ask for where they do not end the process; see `request`.

    Attributes:
        asked: whether one came.
    """

    def __init__(self, forward: bool):
        self.asked = False
        self._forward, self._answered = forward, False
        self._previous: list[object] = []

    def defer(self) -> None:
        """From now on a first signal only asks; a second one ends the process."""
        global _request
        if _request is self:
            return
        if not _watched:
            # A library leaves signals to its program until then; in threads altogether, and where
            # there are several processes, to JAX.
            if self._forward or threading.current_thread() is not threading.main_thread():
                return
            self._previous = [signal.signal(n, lambda n, _: self.answer(n)) for n in _NUMBERS]
        _request = self

    def answer(self, number: int) -> None:
        """Notes the first signal, and ends at once with the second."""
        if self._answered:
            if not _watched:
                raise KeyboardInterrupt
            _end(_CODES[number], "ended at once: the same command continues from what is saved")
        self._answered = True
        _say(f"{_NAMES[number]}: stopping once a checkpoint is saved (again: at once)")
        if not self._forward:
            self.asked = True
        elif number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore(self) -> None:
        """Leaves signals as they were."""
        global _request
        _request = None
        for number, handler in zip(_NUMBERS, self._previous, strict=False):
            signal.signal(number, handler)


@contextlib.contextmanager
def request(forward: bool = False) -> Iterator[Request]:
    """Inside, once `Request.defer` is called, SIGTERM and Ctrl-C but ask to stop.

    Args:
        forward: do not set `asked`, and pass Ctrl-C on as SIGTERM, whose handler is another's:
            JAX's, by which the processes of a run agree on when to stop.
    """
    found = Request(forward)
    try:
        yield found
    finally:
        found.restore()


def asked() -> bool:
    """Whether a stop was asked for, so that long work beside the steps of training may end."""
    return _request is not None and _request.asked


def watch(argv: Sequence[str] = ("", "--mode=")) -> None:
    """Watches for the rest of this program: outside a `request`, a signal ends it with one line.

    Called before anything large is imported. The exit code is `Exit.STOPPED` for a program that
    trains, as the same command continues, and else the signal's.

    Args:
        argv: the command line, from which the mode is read before flags are there.
    """
    global _watched, _training
    modes = re.findall(r"(?<!\S)--?mode[= ](\S*)", " ".join(argv))
    _watched, _training = True, not modes or modes[-1] == "train"
    for number in _NUMBERS:
        signal.signal(number, _on_signal)


def listen() -> None:
    """Answers from now on even where the main thread cannot, if the program is watched.

    Not part of `watch`, since how memory is allocated must be decided before there are threads.
    """
    global _pipe
    if not _watched or _pipe is not None:
        return
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    threading.Thread(target=_listen, daemon=True).start()
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)


def before_ending(farewell: Callable[[], None]) -> None:
    """Has a function called before a signal ends the process; it may be any moment."""
    global _farewell
    _farewell = farewell


def _on_signal(number: int, _: object) -> None:
    """Python's part of a signal, in the main thread when that comes to it: often too late."""
    if _pipe is None:
        _answer(number)
    elif signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False) != _pipe[1]:
        os.write(_pipe[1], bytes([number]))  # an event loop had taken the place


def _listen() -> NoReturn:
    while True:
        number = os.read(_pipe[0], 1)[0]
        if number in _NUMBERS:
            _answer(number)


def _answer(number: int) -> None:
    global _last_signal
    now = time.monotonic()
    same, _last_signal = now - _last_signal < _SAME_S, now
    if same:
        return
    if _request is not None:
        _request.answer(number)
    elif _training:
        _end(Exit.STOPPED, f"{_NAMES[number]}: nothing to save, the same command continues")
    else:
        _end(_CODES[number], _CODES[number].name.lower())


def _say(line: str) -> None:
    # The main thread may be inside sys.stderr, and keep its lock.
    text = f"ig_jax: {line}\n"
    if sys.stderr.isatty():
        text = f"\r\x1b[K\x1b[?25h{text}"  # over a progress bar, which hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _end(code: int, line: str) -> NoReturn:
    """Ends the process without the main thread, which may be far from able to."""
    _say(line)
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1.0)
    if _farewell is not None:
        _farewell()
    os._exit(code)
