"""A person's own Python files: `--import=FILE` adds rows to the tables, `--config=FILE` is an
experiment.

A file of rows is imported before the config is read; what it puts into a table is then known to
every flag, record and search, like a row of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType

from etils import epath
from ml_collections import ConfigDict

from ig_jax import tables
from ig_jax.errors import InputError, suggest
from ig_jax.paths import resolve

# What the rows are → where they are.
TABLES: dict[str, tuple[str, str]] = {
    "weak source": ("ig_jax.diffusion.guidance", "SOURCES"),
    "guidance rule": ("ig_jax.diffusion.guidance", "RULES"),
    "guidance schedule": ("ig_jax.diffusion.guidance", "SCHEDULES"),
    "training target": ("ig_jax.diffusion.loss", "TARGETS"),
    "error": ("ig_jax.diffusion.loss", "ERRORS"),
    "loss weight": ("ig_jax.diffusion.loss", "WEIGHTS"),
    "training time": ("ig_jax.diffusion.interpolant", "TIMES"),
    "data set": ("ig_jax.data.sets", "DATA_SETS"),
    "sampler": ("ig_jax.diffusion.samplers", "SAMPLERS"),
    "metric": ("ig_jax.evaluation.metrics", "METRICS"),
    "feature extractor": ("ig_jax.evaluation.extractors", "EXTRACTORS"),
    "network": ("ig_jax.models.families", "NETWORKS"),
}


def load(files: Iterable[str]) -> tuple[str, ...]:
    """Imports files that add rows to the tables.

    Returns:
        Their absolute paths, for the config.

    Raises:
        InputError: for a file that is not there, fails to import (after its own traceback), or
            takes a name that is taken.
    """
    loaded = []
    for file in files:
        path = resolve(file)
        if not path.is_file():
            raise InputError(f"--import is {file!r}: expected an existing Python file")
        before = {what: dict(table(what)) for what in TABLES}
        try:
            _execute(path)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise InputError(f"--import is {file!r}: it failed with the error above") from error
        for what, rows in before.items():
            for name, row in rows.items():
                if table(what).get(name) is not row:
                    table(what)[name] = row
                    raise InputError(
                        f"--import is {file!r}: it registers the {what} {name!r}, a name that is "
                        "taken: expected another"
                    )
        loaded.append(os.fspath(path))
    tables.IMPORTED.extend(loaded)
    return tuple(loaded)


def built_in_configs() -> dict[str, epath.Path]:
    """Name → file of the configs that come along: inside an installed package, or in a checkout."""
    package = resolve(os.path.dirname(__file__))
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def read_config(text: str) -> ConfigDict:
    """The config of `--config=FILE`: what the file's `get_config()` returns.

    Args:
        text: a path, or the name of a built-in config; path:argument for a `get_config(argument)`.

    Raises:
        InputError: for what is no such file; the line names the file, and its line that failed.
    """
    file, colon, argument = text.partition(":")
    path, names = resolve(file or text or "."), built_in_configs()
    if not path.is_file():
        if file not in names:
            found = "a folder, expected" if path.is_dir() else "expected"
            raise InputError(
                f"--config is {text!r}: {found} an existing file, or one of {', '.join(names)}"
                f"{suggest(path.stem, list(names))}"
            )
        path = names[file]
    arguments = (argument,) if colon else ()
    try:
        get_config = getattr(_execute(path), "get_config", None)
        if not callable(get_config):
            raise InputError(f"{path}: no function get_config(), expected one as in configs/")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            expected = f"--config={file}" + ("" if colon else ":ARGUMENT")
            raise InputError(
                f"--config is {text!r}: its get_config has {error}, expected {expected}"
            ) from None
        config = get_config(*arguments)
    except (Exception, SystemExit) as error:
        raise InputError(_blame(error, os.fspath(path))) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: get_config() returned {type(config).__name__}, expected a ConfigDict "
            "(ig_jax.config.default_config() and changes to it)"
        )
    return config


def _blame(error: BaseException, path: str) -> str:
    """One line on an error in a config file: where, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    what = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, SyntaxError):
        lines, what = [error.lineno] if error.filename else [], error.msg
        path = error.filename or path
    elif isinstance(error, InputError) and not lines:
        return what
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{path}, line {lines[-1]}: {kind}{what}" if lines else f"{path}: {kind}{what}"


def _execute(path: epath.Path) -> ModuleType:
    """Runs a Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"ig_jax_import_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(what: str) -> dict:
    """The table of rows of a kind (a name of `TABLES`)."""
    module, name = TABLES[what]
    return getattr(importlib.import_module(module), name)
