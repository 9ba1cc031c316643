"""What a person at a terminal sees: progress bars, tables, and quiet libraries.

Bars appear only on a terminal; elsewhere the same work reports through log lines.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

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
    # Orbax narrates every step through absl's logger, which CLU's metric writer shares; CLU's lines
    # of scalars have this format. On a terminal the progress bar says the same.
    logging.getLogger("absl").addFilter(
        lambda record: (
            record.levelno >= logging.ERROR
            or (str(record.msg).startswith("[%d]%s ") and not is_terminal())
        )
    )
    warnings.filterwarnings("ignore", category=DeprecationWarning)


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


@contextlib.contextmanager
def progress_bar(total: int, description: str, done: int = 0) -> Iterator[Advance]:
    """Shows a bar with speed and time left while the context is open.

    Args:
        total: number of units of work.
        description: what is being done, e.g. "sampling".
        done: units finished before (a resumed run).

    Yields:
        `advance(count=1, text="")`: reports finished units and a short text beside the bar.
    """
    if not is_terminal():
        yield lambda count=1, text="": None
        return
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
        task = bar.add_task(description, total=total, completed=done, text="")

        def advance(count: int = 1, text: str = "") -> None:
            if text:
                bar.update(task, advance=count, text=text)
            else:
                bar.update(task, advance=count)

        yield advance


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
