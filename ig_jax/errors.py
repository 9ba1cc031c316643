"""The exceptions that users meet, and the exit codes of the command line.

Everything a person can get wrong (a field, a file, a shape) is raised as `InputError` with one line
that says what was found and what was expected, and a run whose numbers ran away as
`NotFiniteError`. `ig_jax.main` prints that line without a traceback and ends with the exception's
exit code.
"""

import contextlib
import enum
import errno
import os
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Exit(enum.IntEnum):
    """How a command ended, for shells and launchers; `EXIT_CODES` says it in words.

    `launch/tpu.sh` and `launch/slurm.sh` know these numbers too.
    """

    COMPLETE = 0
    ERROR = 1
    BAD_INPUT = 2
    NOT_FINITE = 3
    PEER_LOST = 4
    # EX_TEMPFAIL of BSD's sysexits.h, "try again later": no shell, signal or Python uses it.
    STOPPED = 75
    # What shells report of a program that Ctrl-C or SIGTERM ended.
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODES = {
    Exit.COMPLETE: "complete: nothing is left to do",
    Exit.ERROR: "an error of the program or the machine, with a traceback",
    Exit.BAD_INPUT: "bad input: one line names the field, file or flag",
    Exit.NOT_FINITE: "a loss or samples that are not finite: the same command would end so again",
    Exit.PEER_LOST: "another process of the run ended unexpectedly: its output says why",
    Exit.STOPPED: "training was asked to stop, all is saved: the same command continues",
    Exit.INTERRUPTED: "Ctrl-C outside training, or a second one in it: what is written stays",
    Exit.TERMINATED: "SIGTERM outside training, or a second one in it: what is written stays",
}


class OneLineError(Exception):
    """What a person is told in one line: an `InputError` or a `NotFiniteError`."""

    exit_code: Exit


class InputError(OneLineError, ValueError):
    """Bad input: a config field, flag, file or array that is not what it should be."""

    exit_code = Exit.BAD_INPUT


class UnknownNameError(InputError):
    """A name that no row of a table has: mistyped, or of a file that was not imported."""


class NotFiniteError(OneLineError, ArithmeticError):
    """A run diverged: NaN or infinite values where a loss, a network or a sampler gives numbers."""

    exit_code = Exit.NOT_FINITE


class Stopped(Exception):
    """Work was asked to stop (SIGTERM, Ctrl-C) after it had saved what the same command needs."""

    exit_code = Exit.STOPPED


def reason(error: BaseException) -> str:
    """What an exception says, in a few words without a line break."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"no {error}"
    said = str(error).strip().partition("\n")[0]
    return said[:120] or type(error).__name__


def full_disk(error: BaseException | None) -> str | None:
    """What a disk says that takes no more, if that is what an exception comes of.

    Libraries pass the operating system's error on as text, or as the cause of one of theirs.
    """
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            said = os.strerror(number)
            if getattr(error, "errno", None) == number or said in str(error):
                return said
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def reading(file: os.PathLike | str, what: str) -> Iterator[None]:
    """Inside, the content of a file from outside is read and taken apart.

    What a damaged file raises depends on where it is damaged, so whatever it is becomes one line.

    Args:
        file: its path, for the message.
        what: what it should be, such as "a JSON file".

    Raises:
        InputError: for any exception inside that is not one of ours.
    """
    try:
        yield
    except OneLineError:
        raise
    except Exception as error:
        raise InputError(f"{file}: cannot be read as {what} ({reason(error)})") from error


def suggest(name: str, known: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Returns `"; did you mean a, b?"` for the known names closest to `name`, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def check_choice(name: str, value: str, known: Collection[str], shown: str | None = None) -> None:
    """Raises `UnknownNameError` unless `value` is one of the known names.

    Args:
        name: the field or argument, for the message.
        value: what a person asked for.
        known: names, or a table of rows by name.
        shown: the text that it was found in, if that is longer.
    """
    if value not in known:
        known = tuple(known)
        raise UnknownNameError(
            f"{name} is {shown or value!r}: expected one of {', '.join(known)}"
            f"{suggest(value, known)}"
        )


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Args:
        table: rows by name.
        name: what a person asked for.
        what: what the rows are, such as "autoencoder".

    Raises:
        UnknownNameError: if there is no such row; the line names the known ones and the closest.
    """
    if name not in table:
        known = list(table)
        raise UnknownNameError(
            f"unknown {what} {name!r}: expected one of {', '.join(known)}{suggest(name, known)}"
        )
    return table[name]
