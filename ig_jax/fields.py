"""Fields of config sections: a section is a frozen dataclass, beside the code it configures, whose
fields say what they mean, what they may be, and whether a resumed run may change them. Validation,
`--help` and the rules of resuming are read from here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ig_jax import tables
from ig_jax.checks import Limits
from ig_jax.errors import InputError, check_choice, suggest

_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_LISTS = {str: "a list of strings", dict: "a list of dicts"}
_TYPES = {int: numbers.Integral, float: numbers.Real, str: str, dict: dict}


@dataclasses.dataclass(frozen=True)
class Field:
    """What a section declares of a field.

    Attributes:
        default: its value, and where a saved config has no such field, being older, what was done
            before there was one.
        help: what it means, in a line.
        limits: what a number may be.
        choices: what a string may be: names, or a table with these names.
        table: rows that a string may spell, with their options; the default need not be one.
        resume: "fixed", or "free" for what a resumed run may change.
        path: whether it is a path, which is made absolute.
        kind: its type, as annotated.
    """

    default: Any
    help: str
    limits: Limits | None = None
    choices: Collection[str] | None = None
    table: Mapping[str, type] | None = None
    resume: str = "fixed"
    path: bool = False
    kind: Any = None

    def check(self, name: str, value: Any) -> None:
        """Raises `InputError`, a line that starts with `name`, unless `value` is one.

        Tables are read now, so that rows count which were added after the section was declared.
        """
        if not _fits(value, self.kind):
            raise InputError(f"{name} is {value!r}: expected {_noun(self.kind)}")
        listed = value if isinstance(value, tuple | list) else (value,)
        if not all(math.isfinite(v) for v in listed if isinstance(v, numbers.Real)):
            wanted = "a finite number" if listed is not value else "finite numbers"
            raise InputError(f"{name} is {value}: expected {wanted}")
        if self.limits is not None:
            self.limits.check(name, value)
        if self.choices is not None:
            check_choice(name, value, self.choices)
        for text in listed if self.table is not None and value != self.default else ():
            tables.make(self.table, text, name)

    @property
    def expected(self) -> str:
        """What it may be, in words."""
        if self.choices is not None:
            return ", ".join(self.choices)
        if self.table is not None:
            return ", ".join(tables.spell_options(*row) for row in self.table.items())
        if self.path:
            return "a path"
        noun = _noun(self.kind)
        return noun if self.limits in (None, Limits()) else f"{noun}, {self.limits}"


def field(default: Any, help: str, **rules: Any) -> Any:
    """Declares a field of a section, in the place of `dataclasses.field`; see `Field`."""
    return dataclasses.field(default=default, metadata={"field": Field(default, help, **rules)})


@functools.cache
def declared(section: type) -> dict[str, Field]:
    """The fields that a section declares; those of a plain dataclass field are no config's."""
    kinds = typing.get_type_hints(section)
    return {
        f.name: dataclasses.replace(f.metadata["field"], kind=kinds[f.name])
        for f in dataclasses.fields(section)
        if "field" in f.metadata
    }


def sections(root: type) -> dict[str, type]:
    """The sections of a whole config: its fields that are sections themselves."""
    kinds = typing.get_type_hints(root)
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


def every(root: type) -> dict[str, Field]:
    """All fields of a whole config, by path: "seed", "guidance.ig_scale"."""
    inside = {
        f"{name}.{field}": facts
        for name, section in sections(root).items()
        for field, facts in declared(section).items()
    }
    return declared(root) | inside


def check(options: Any) -> None:
    """Raises `InputError`, naming the field, unless a section's own values are what they may be."""
    for name, facts in declared(type(options)).items():
        facts.check(name, getattr(options, name))


def check_values(section: type, values: Mapping[str, Any], prefix: str) -> None:
    """Raises `InputError` unless `values` has every field of a section, and nothing else.

    Args:
        section: a section, or a whole config.
        values: by field; those of a section inside are a mapping.
        prefix: its path, such as "config.guidance".
    """
    fields, inside = declared(section), sections(section)
    known = (*fields, *inside)
    for name in values:
        if name not in known:
            raise InputError(f"unknown config field {prefix}.{name}{suggest(name, known)}")
    for name in known:
        noun = "a section with fields" if name in inside else _noun(fields[name].kind)
        if name not in values:
            raise InputError(f"missing config field {prefix}.{name}: expected {noun}")
        if name in fields:
            fields[name].check(f"{prefix}.{name}", values[name])
        elif not hasattr(values[name], "keys"):
            raise InputError(f"{prefix}.{name} is {values[name]!r}: expected {noun}")
        else:
            check_values(inside[name], values[name], f"{prefix}.{name}")


def summary(section: type) -> str:
    """What a section is, in a line."""
    return inspect.getdoc(section).splitlines()[0]


def describe(section: type, prefix: str, known: Mapping[str, Collection[str]]) -> str:
    """Every field of a section, for `--help`: default, what it means, what it may be.

    Args:
        section: a section.
        prefix: its path, such as "config.guidance".
        known: names that a field may be, by path, where the section itself cannot know them.
    """
    lines = [f"{prefix}: {summary(section)}"]
    for name, facts in declared(section).items():
        path = f"{prefix}.{name}"
        default = facts.default if isinstance(facts.default, str) else repr(facts.default)
        expected = ", ".join(known[path]) if path in known else facts.expected
        resumed = "may change" if facts.resume == "free" else "stays"
        lines += [f"\n  --{path}={default}", f"      {facts.help}"]
        lines += [f"      {expected}; {resumed} when a run is resumed"]
    return "\n".join(lines)


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _noun(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return f"{_noun(typing.get_args(kind)[0])}, or a list of them"
    if _is_list(kind):
        return _LISTS.get(typing.get_args(kind)[0], "a list of numbers")
    return _NOUNS[kind]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if _is_list(kind):
        of = typing.get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_fits(v, of) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, _TYPES[kind])
