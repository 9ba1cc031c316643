"""Rows of a table by name, with options: `projected(eta=0.5)`. Configs, flags and records all spell
a guidance rule, a schedule or a sampler this way, so a row added to a table needs nothing else."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ig_jax.errors import InputError, check_choice, suggest

T = TypeVar("T")

# Files whose rows are in the tables (`--import`), absolute.
IMPORTED: list[str] = []


def make(table: Mapping[str, type[T]], text: str, what: str, **defaults: Any) -> T:
    """Builds the row that a text spells.

    Args:
        table: name → dataclass.
        text: `name` or `name(option=value, …)`, values being numbers, strings or tuples of them.
        what: the field or argument that holds the text, for messages: "ig_rule".
        **defaults: options that apply where the row has them and the text does not give them.

    Returns:
        The row. Raises `InputError` naming the known rows, or the row's options.
    """
    name, options = parse(text, what)
    check_choice(what, name, table, shown=text)
    problem, row = f"{what} is {text!r}: ", table[name]
    fields = [field for field in dataclasses.fields(row) if field.init]
    known = tuple(field.name for field in fields)
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise InputError(
                f"{problem}{name} has no option {option!r}, {has}{suggest(option, known)}"
            )
    options = {k: v for k, v in defaults.items() if k in known} | options
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in options:
            raise InputError(f"{problem}{name} needs its option {field.name!r}")
    try:
        return row(**options)
    except (InputError, TypeError) as error:
        raise InputError(f"{problem}{error}") from None


def parse(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """Splits `name(option=value, …)`; raises `InputError` for any other text."""
    problem = InputError(f"{what} is {text!r}: expected a name, or name(option=value, …)")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise problem from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise problem
    try:
        return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except ValueError:
        raise problem from None


def spell(table: Mapping[str, type], row: Any) -> str:
    """The text from which `make` builds a row: its name, and the options that are not defaults."""
    names = (name for name, kind in table.items() if kind is type(row))
    name = next(names, type(row).__name__)
    options = [
        f"{field.name}={getattr(row, field.name)!r}"
        for field in dataclasses.fields(row)
        if field.init and getattr(row, field.name) != field.default
    ]
    return f"{name}({', '.join(options)})" if options else name


def spell_options(name: str, row: type) -> str:
    """A row's name and all options that a text can give it, with their defaults, for `--help`."""
    options = ", ".join(
        f"{field.name}={field.default!r}"
        for field in dataclasses.fields(row)
        if field.init and isinstance(field.default, int | float | str | tuple)
    )
    return f"{name}({options})" if options else name
