"""The exceptions that users meet: `InputError`, and a kind of it for numbers that ran away.

Everything a person can get wrong (a field, a file, a shape) is raised as `InputError` with one line
that says what was found and what was expected; `ig_jax.main` prints that line without a traceback.
"""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input: a config field, flag, file or array that is not what it should be."""


class NotFiniteError(InputError):
    """NaN or infinite values where a network or a sampler should have given numbers."""


def suggest(name: str, known: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Returns `"; did you mean a, b?"` for the known names closest to `name`, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Args:
        table: rows by name.
        name: what a person asked for.
        what: what the rows are, such as "autoencoder".

    Raises:
        InputError: if there is no such row; the line names the known ones and the closest.
    """
    if name not in table:
        known = list(table)
        raise InputError(
            f"unknown {what} {name!r}: expected one of {', '.join(known)}{suggest(name, known)}"
        )
    return table[name]
