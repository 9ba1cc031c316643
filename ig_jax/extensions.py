"""`--import=FILE`: a person's own rows in the tables, from a file outside the package.

The file is imported before the config is read; whatever it puts into a table is then known to every
flag, record and search, like a row of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable

from ig_jax.errors import InputError
from ig_jax.paths import resolve

# What the rows are → where they are.
TABLES: dict[str, tuple[str, str]] = {
    "weak source": ("ig_jax.diffusion.guidance", "SOURCES"),
    "guidance rule": ("ig_jax.diffusion.guidance", "RULES"),
    "guidance schedule": ("ig_jax.diffusion.guidance", "SCHEDULES"),
    "training target": ("ig_jax.diffusion.loss", "TARGETS"),
    "error": ("ig_jax.diffusion.loss", "ERRORS"),
    "data set": ("ig_jax.data.sets", "DATA_SETS"),
    "sampler": ("ig_jax.diffusion.samplers", "SAMPLERS"),
    "network": ("ig_jax.models.families", "NETWORKS"),
}


def load(files: Iterable[str]) -> None:
    """Imports files that add rows to the tables.

    Raises:
        InputError: for a file that is not there, fails to import (after its own traceback), or
            takes a name that is taken.
    """
    for file in files:
        path = resolve(file)
        if not path.is_file():
            raise InputError(f"--import is {file!r}: expected an existing Python file")
        before = {what: dict(table(what)) for what in TABLES}
        spec = importlib.util.spec_from_file_location(f"ig_jax_import_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
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


def table(what: str) -> dict:
    """The table of rows of a kind (a name of `TABLES`)."""
    module, name = TABLES[what]
    return getattr(importlib.import_module(module), name)
