"""A network's own samples as a data set: own-sample heads learn from them (SSG, arXiv 2607.29122).

They are stored once (`sampling.own`), as the data that they stand for: latents or pixel values, not
rounded pictures.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ig_jax.data.source import ArraySource, DataSource, hold_out
from ig_jax.errors import InputError, reading
from ig_jax.paths import resolve
from ig_jax.storage import files

INDEX = "samples.json"


def save_piece(path: epath.PathLike, x: np.ndarray, labels: np.ndarray) -> None:
    """Stores some samples, x (n, …) float32 and labels (n,), whole or not at all."""
    with files.write_atomically(path) as partial, partial.open("wb") as stream:
        np.savez(stream, x=x, labels=labels)


def save_index(
    folder: epath.PathLike, pieces: Sequence[str], facts: dict[str, Any], record: dict[str, Any]
) -> None:
    """Says that all pieces are there, by name and in order; facts and record are JSON values."""
    values = {"pieces": list(pieces), "source": facts, "protocol": record}
    with files.write_atomically(resolve(folder) / INDEX) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def open_samples(path: epath.PathLike, num_validation: int = 0) -> DataSource:
    """Opens stored samples.

    Args:
        path: their folder.
        num_validation: number of samples to hold out.

    Returns:
        A source with the facts of the data that the network was trained on. Raises `InputError` if
        there are none, or they are damaged.
    """
    folder = resolve(path)
    if not (folder / INDEX).exists():
        raise InputError(
            f"config.data.path is {str(path)!r}: expected a folder with {INDEX}, a network's own "
            "samples (a training with --config.data.name=samples draws them)"
        )
    with reading(folder / INDEX, "an index of samples"):
        index = json.loads((folder / INDEX).read_text())
        source = DataSource.from_facts(index["source"])
        names = [os.fspath(name) for name in index["pieces"]]
        if outside := [name for name in names if name != os.path.basename(name)]:
            raise InputError(
                f"{folder / INDEX}: names the file {outside[0]!r}, expected one of this folder"
            )
        pieces = [_piece(folder / name, source) for name in names]
        examples = ArraySource(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
    train, validation = hold_out(examples, num_validation)
    return dataclasses.replace(source, train=train, validation=validation)


def _piece(path: epath.Path, source: DataSource) -> tuple[np.ndarray, np.ndarray]:
    with files.open_npz(path, "samples in an .npz file") as arrays:
        x, labels = arrays["x"], arrays["labels"]
        if x.shape != (len(labels), *source.shape) or x.dtype != np.float32:
            raise InputError(
                f"{path}: found {x.dtype} {x.shape} with {len(labels)} labels, expected float32 "
                f"{('N', *source.shape)}"
            )
        if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < max(
            source.num_classes, 1
        ):
            raise InputError(
                f"{path}: found labels {labels.min()}…{labels.max()} of type {labels.dtype}, "
                f"expected 0…{max(source.num_classes, 1) - 1}"
            )
        return x, labels
