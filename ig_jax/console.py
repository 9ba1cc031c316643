"""What a person sees of work: stages by name, bars or lines, tables, and quiet libraries.

On a terminal counted work has a bar; elsewhere a line every half minute says how much is done, how
fast, and how long still. What takes a moment, imports and compilers too, is named in both.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ig_jax.errors import full_disk

T = TypeVar("T")
Advance = Callable[..., None]


def quiet_libraries() -> None:
    """Silences start-up chatter of XLA, TensorFlow and gRPC; call before importing them."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not _may_have_tpu():
        # An installed libtpu (ahead-of-time compilation) would ask a cloud's metadata server, and
        # complain at length that there is none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        if not _has_jax_plugin():
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(_is_news)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether what a library logs is to be seen: Orbax narrates every step through absl's logger.

    A full disk it logs with a traceback, and tells the main thread, which says it in a line.
    """
    full = record.exc_info is not None and full_disk(record.exc_info[1]) is not None
    return record.levelno >= logging.ERROR and not full


def leave_full_disks_to_the_program() -> None:
    """Lets no library's thread print that a disk is full, which the main thread is told of, too.

    Nor that TensorStore wanted to tell an event loop that is closed by then.
    """
    in_threads, in_calls = threading.excepthook, sys.unraisablehook

    def of_thread(arguments: Any) -> None:
        if full_disk(arguments.exc_value) is None:
            in_threads(arguments)

    def of_call(arguments: Any) -> None:
        if str(arguments.exc_value) != "Event loop is closed":
            in_calls(arguments)

    threading.excepthook, sys.unraisablehook = of_thread, of_call


# What messages and tables use beyond ASCII, for an output that knows no more.
_ASCII = {"–": "-", "−": "-", "×": "x", "·": "*", "±": "+-", "→": "->", "≥": ">="}


def _substitute(error: UnicodeError) -> tuple[bytes, int]:
    """Stands in for characters that an encoding lacks; bytes that were no text stay as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = b""
    for character in error.object[error.start : error.end]:
        if "\udc80" <= character <= "\udcff":
            found += bytes([ord(character) - 0xDC00])
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore")
            found += _ASCII.get(character, "").encode() or plain or b"?"
    return found, error.end


def forgive_output() -> None:
    """Lets standard output and error carry any text: what they cannot say is substituted.

    A terminal or pipe may know ASCII only, and names on disk need not be text.
    """
    codecs.register_error("ig_jax.substitute", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ig_jax.substitute")


def _may_have_tpu() -> bool:
    """Whether a PCI device of Google's is present (a TPU, or a cloud machine's network card)."""
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    if not vendors:
        return sys.platform == "linux"
    for vendor in vendors:
        with contextlib.suppress(OSError), open(vendor, encoding="utf-8") as file:
            if file.read().strip() == "0x1ae0":
                return True
    return False


def _has_jax_plugin() -> bool:
    """Whether a plugin for GPUs or other accelerators is installed: JAX then looks for devices.

    Which files stand for a device differs (NVIDIA's is /dev/nvidiactl, but /dev/dxg under WSL2).
    """
    entries = importlib.metadata.entry_points(group="jax_plugins")
    return bool(entries) or importlib.util.find_spec("jax_plugins") is not None


def is_terminal() -> bool:
    """Whether progress bars can be drawn (standard error is a terminal)."""
    return sys.stderr.isatty()


# A stage is named once it lasts so long: on a terminal, and in a log, which is read later.
_MOMENT_S, _LONG_S = 1.0, 15.0
# No silence lasts longer.
_SILENCE_S = 30.0
_TICK_S = 0.25


def duration(seconds: float) -> str:
    """A time in its two largest units: "45 s", "6 min 48 s", "3 h 05 min", "2 d 04 h"."""
    seconds = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // below:02d} {smaller}"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


@dataclasses.dataclass(eq=False)
class Stage:
    """A piece of work, and how much of it is done where that is counted (`total` is not 0)."""

    name: str
    since: float
    total: int = 0
    done: int = 0
    has_bar: bool = False
    text: str = ""
    named: bool = False
    # When it advanced first, to what, and when last: before that is compilation and the like.
    first: tuple[float, int] | None = None
    last: float = 0.0

    def advance(self, count: int, text: str, now: float) -> None:
        """Counts finished units; the last text stays."""
        self.done, self.text = self.done + count, text or self.text
        if count:
            self.first, self.last = self.first or (now, self.done), now

    def describe(self, now: float) -> str:
        """In a few words: what, how much, how fast, how long still."""
        spent = now - self.since
        if not self.total:
            return self.name if spent < 2 * _MOMENT_S else f"{self.name}, {duration(spent)} so far"
        words = [f"{self.name} {self.done:,} of {self.total:,} ({self.done / self.total:.0%})"]
        since, done = self.first or (0.0, self.done)
        # Devices take several steps into their queue at once, which says nothing of their speed.
        if self.done > done and self.last - since >= _MOMENT_S:
            each = (self.last - since) / (self.done - done)
            words += [f"{1 / each:.3g}/s" if each < 10 else f"{duration(each)} each"]
            words += [f"{duration((self.total - self.done) * each)} left"]
        return ", ".join(words) + (f"; {self.text}" if self.text else "")


class Speaker:
    """Says what is worked on: it is told of stages, and somebody makes it tick.

    Args:
        write: takes a line.
        moment: how long a stage lasts before it is named, in seconds.
        clock: seconds.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        moment: float = _LONG_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write, self._moment, self._clock = write, moment, clock
        self._lock = threading.RLock()
        self._stages: list[Stage] = []
        self._known: set[str] = set()
        self._began = self._said = clock()

    def say(self, line: str) -> None:
        """Writes a line of whatever origin."""
        with self._lock:
            self._said = self._clock()
            self._write(line)

    def mute(self) -> None:
        """Says nothing any more: another process of the run speaks."""
        self._write = lambda line: None

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 0, done: int = 0, bar: bool = False) -> Iterator[Stage]:
        """What happens inside has a name and, if it is counted, `total` units."""
        stage = self.begin(name, total, done, bar)
        try:
            yield stage
        except BaseException:
            self.end(stage, complete=False)
            raise
        self.end(stage)

    def begin(self, name: str, total: int = 0, done: int = 0, bar: bool = False) -> Stage:
        """Begins a stage that `end` ends; of those that could have a bar, the outermost has."""
        with self._lock:
            has_bar = bar and total > 0 and not any(s.has_bar for s in self._stages)
            self._stages.append(Stage(name, self._clock(), total, done, has_bar))
            return self._stages[-1]

    def advance(self, stage: Stage, count: int, text: str) -> None:
        """Counts finished units of a stage."""
        with self._lock:
            stage.advance(count, text, self._clock())

    def end(self, stage: Stage, complete: bool = True) -> None:
        """Ends a stage; says how long it took, if it was named or long."""
        with self._lock:
            self._stages.remove(stage)
            spent = self._clock() - stage.since
            if complete and not stage.has_bar and (stage.named or spent >= _SILENCE_S):
                done = f" {stage.done:,} of {stage.total:,}" if stage.total else ""
                text = f"; {stage.text}" if stage.text else ""
                self.say(f"{stage.name}{done}: took {duration(spent)}{text}")

    def tick(self) -> None:
        """Names a stage that has lasted for a moment, and breaks a silence."""
        with self._lock:
            now, inner = self._clock(), self._stages[-1] if self._stages else None
            if inner is not None and inner.has_bar:
                return
            fresh = inner is not None and inner.name not in self._known
            if not (fresh and now - inner.since >= self._moment) and now - self._said < _SILENCE_S:
                return
            if inner is not None:
                self._known.add(inner.name)
                inner.named = True
            words = [stage.describe(now) for stage in self._stages if not stage.has_bar]
            self.say(" > ".join(words or [f"at work for {duration(now - self._began)}"]) + " …")


def _write_line(line: str) -> None:
    """Writes to what standard error is now: while a bar is drawn, the line goes above it."""
    stamp = "" if is_terminal() else time.strftime("%H:%M:%S ")
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        sys.stderr.write(f"{stamp}{line}\n")
        sys.stderr.flush()


# A library draws bars, but says nothing.
_speaker = Speaker(lambda line: None)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Inside, stages are named and silence is broken; for a whole program.

    A thread of its own does it, so that neither imports nor compilers keep it from speaking.
    """
    global _speaker
    moment = _MOMENT_S if is_terminal() else _LONG_S
    before, speaker, over = _speaker, Speaker(_write_line, moment), threading.Event()

    def keep_ticking() -> None:
        while not over.wait(_TICK_S):
            speaker.tick()

    thread = threading.Thread(target=keep_ticking, daemon=True)
    _speaker = speaker
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _speaker = before


def stage(name: str) -> contextlib.AbstractContextManager[Any]:
    """Names what happens inside, such as "reading the checkpoint"."""
    return _speaker.stage(name)


def mute() -> None:
    """Leaves speaking to another process of the run; warnings are still written."""
    _speaker.mute()


class _Lines(logging.Handler):
    """Log records as lines."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        _write_line(level + self.format(record))


def log_lines() -> None:
    """Makes plain lines of log records, in place of absl's prefixes; for programs."""
    logging.getLogger().handlers = [_Lines()]


_COMPILING = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


@functools.cache
def name_compilations() -> None:
    """Makes stages of what JAX traces and compiles, from now on."""
    import jax

    # Of each thread: the speaker and the stage, or None inside another one.
    open_stages = threading.local()

    def begin(event: str, _: float, *, fun_name: str = "", **__: Any) -> None:
        if event in _COMPILING:
            stack = open_stages.__dict__.setdefault("stack", [])
            name = fun_name.removeprefix("jit(").removesuffix(")").replace("_", " ").strip()
            stage = None if stack else _speaker.begin(f"{_COMPILING[event]} {name}")
            stack.append((_speaker, stage))

    def end(event: str, _: float, **__: Any) -> None:
        stack = open_stages.__dict__.get("stack")
        if event in _COMPILING and stack:
            speaker, stage = stack.pop()
            if stage is not None:
                speaker.end(stage)

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)


@contextlib.contextmanager
def progress_bar(total: int, description: str, done: int = 0) -> Iterator[Advance]:
    """Counts work: a bar with speed and time left on a terminal, lines elsewhere.

    Args:
        total: number of units of work.
        description: what is being done, e.g. "sampling".
        done: units finished before (a resumed run).

    Yields:
        `advance(count=1, text="", details="")`: reports finished units, a short text beside the
        bar, and what a line has room for besides.
    """
    speaker = _speaker
    with (
        speaker.stage(description, total, done, bar=is_terminal()) as stage,
        contextlib.ExitStack() as stack,
    ):
        update = stack.enter_context(_bar(stage)) if stage.has_bar else None

        def advance(count: int = 1, text: str = "", details: str = "") -> None:
            speaker.advance(stage, count, ", ".join(filter(None, (text, details))))
            if update is not None:
                update(advance=count, **({"text": text} if text else {}))

        yield advance


@contextlib.contextmanager
def _bar(stage: Stage) -> Iterator[Callable[..., None]]:
    """Draws the bar of a stage; yields what updates it."""
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
        rich_progress.TextColumn("[dim]left"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(stage.name, total=stage.total, completed=stage.done, text="")
        yield functools.partial(bar.update, task)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterates over `items` behind a progress bar; `total` defaults to `len(items)`."""
    total = len(items) if total is None else total  # type: ignore[arg-type]
    with progress_bar(total, description) as advance:
        for item in items:
            yield item
            advance()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table to standard output; numbers arrive formatted, the first column is a name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
