"""Weight files: reading safetensors and PyTorch checkpoints as NumPy arrays, finding a network's
weights in them, and checking them.

Every model family's converter starts here, so that a damaged, foreign or unsafe file is refused in
the same words, with the name of the file and of the weight at fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ig_jax.errors import InputError, reading, suggest
from ig_jax.paths import existing_file, resolve
from ig_jax.storage import pickles
from ig_jax.storage.files import write_atomically

PYTORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PYTORCH_SUFFIXES)

# What wraps a whole network, as an entry of a checkpoint or in front of its weights' names.
_EMA_WRAPPERS = frozenset(("ema", "ema_model", "model_ema", "state_dict_ema"))
_WRAPPERS = _EMA_WRAPPERS | {
    "model",
    "module",
    "model_state_dict",
    "state_dict",
    "net",
    "first_stage_model",
}
# What torch.compile, FSDP and activation checkpointing put around any part of a network.
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


def read_checkpoint(path: os.PathLike | str) -> Mapping[str, Any]:
    """Reads a whole weight file with NumPy arrays in place of tensors.

    Args:
        path: `.safetensors`, or PyTorch's `.pt`, `.pth`, `.ckpt`, `.bin`; local or gs://.

    Returns:
        The file's content: a flat dict for safetensors, whatever nesting a PyTorch file has
        (`{"model": {...}, "ema": {...}, "steps": 1000}`; an argparse.Namespace becomes a dict).
        float16 and bfloat16 tensors are widened to float32, other types are kept.

    Raises:
        InputError: if the file is missing, of another type, damaged, or a pickle carrying code; or
            if a PyTorch file is read where PyTorch is not installed.
    """
    file = resolve(path)
    if file.suffix not in SUFFIXES:
        raise InputError(f"{path}: found a {file.suffix or 'suffixless'} file, expected weights "
                         f"as one of {', '.join(SUFFIXES)}")  # fmt: skip
    existing_file(path, "a weight file")
    content = (
        _read_safetensors(file) if file.suffix == ".safetensors" else pickles.read_pytorch(file)
    )
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: found a {type(content).__name__}, expected a dict of weights")
    return content


def read_weights(path: os.PathLike | str) -> dict[str, np.ndarray]:
    """Reads the arrays of a weight file, as `read_checkpoint` does, by dotted name.

    Nested dicts are joined with dots; lists, numbers and texts are left out. Raises `InputError` as
    `read_checkpoint` does, and if there is no array at all.
    """
    content = read_checkpoint(path)
    weights = dict(_arrays(content, ""))
    if not weights:
        raise InputError(
            f"{path}: found no arrays, only {_some(list(content))}; expected a dict of weights"
        )
    return weights


def network_weights(
    content: Mapping[Any, Any], landmarks: Sequence[str], kind: str, where: str
) -> dict[str, np.ndarray]:
    """Finds a network's weights in a checkpoint, whatever it wraps them in.

    Containers (`{"ema": …}`), wrapper prefixes (`module.`, `model.`) and what PyTorch puts between
    (`_orig_mod.`) are taken off in any order and number, and what stands beside the weights is left
    out. Of several networks that fit, an EMA comes first, since published figures are the EMA's.

    Args:
        content: arrays or tensors by name, nested or not, as `read_checkpoint` returns them.
        landmarks: names of the network's weights; one fits if it has at least half of them.
        kind: what is looked for, such as "an autoencoder", for the message.
        where: the file, for the message.

    Returns:
        The arrays by the network's own names, in the checkpoint's order.

    Raises:
        InputError: if no network fits; the line names the top-level keys.
    """
    networks: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in _leaves(content):
        wrappers, name = _unwrapped(name)
        networks.setdefault(wrappers, {})[name] = value
    fitting = [
        wrappers
        for wrappers, found in networks.items()
        if 2 * sum(name in found for name in landmarks) >= len(landmarks)
    ]
    if not fitting:
        raise InputError(
            f"{where}: found no weights of {kind}, such as {landmarks[0]}; "
            f"top-level keys: {_top_level(content)}"
        )
    chosen = min(fitting, key=_EMA_WRAPPERS.isdisjoint)
    return {name: pickles.as_array(value) for name, value in networks[chosen].items()}


def write_safetensors(
    path: os.PathLike | str,
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays by name to a `.safetensors` file, whole or not at all.

    Raises:
        InputError: if `path` has another suffix or cannot be written.
    """
    import safetensors.numpy

    file = resolve(path)
    if file.suffix != ".safetensors":
        raise InputError(f"{path}: found suffix {file.suffix!r}, expected .safetensors")
    # safetensors writes the underlying buffer, which for a transposed view is in another order.
    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    with write_atomically(file) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, dict(metadata) if metadata else None))


def check_finite(weights: Mapping[str, np.ndarray], where: str) -> None:
    """Raises InputError naming the first weight with NaN or infinite values, if there is one."""
    bad = [name for name, array in weights.items() if not np.all(np.isfinite(array))]
    if bad:
        array = weights[bad[0]]
        count = int(array.size - np.isfinite(array).sum())
        others = f" (and {len(bad) - 1} other weights)" if len(bad) > 1 else ""
        raise InputError(
            f"{where}: weight {bad[0]} has {count} NaN or infinite of {array.size} values{others}"
        )


def match_keys(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, np.ndarray], where: str
) -> None:
    """Checks that `found` has exactly the names and shapes of `expected`.

    Args:
        expected: shape by name.
        found: array (anything with a `shape`) by name.
        where: the file, for the message.

    Raises:
        InputError: one line naming up to three weights that are missing, unexpected or of another
            shape, with the counts, both shapes, and the closest name on the other side.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = {name: tuple(found[name].shape) for name in expected if name in found}
    wrong = [name for name, shape in shapes.items() if shape != tuple(expected[name])]
    parts = []
    if missing:
        closest = suggest(missing[0], extra, limit=1)
        parts.append(
            f"{len(missing)} missing of {len(expected)} weights: {_some(missing)}{closest}"
        )
    if extra:
        closest = suggest(extra[0], missing or list(expected), limit=1)
        parts.append(f"{len(extra)} unexpected: {_some(extra)}{closest}")
    if wrong:
        described = [f"{n} has {shapes[n]}, expected {tuple(expected[n])}" for n in wrong]
        parts.append(f"{len(wrong)} of another shape: {_some(described)}")
    if parts:
        raise InputError(f"{where}: " + "; ".join(parts))


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(map(str, names[:limit])) + (", …" if len(names) > limit else "")


def _arrays(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _arrays(value, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value


def _leaves(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays and tensors by dotted name, of the dicts whose names wrap networks (no optimiser's).

    NumPy scalars are no weights.
    """
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if not _unwrapped(name)[1]:
                yield from _leaves(value, f"{name}.")
        elif hasattr(value, "shape") and not isinstance(value, np.generic):
            yield name, value


def _unwrapped(name: str) -> tuple[tuple[str, ...], str]:
    """Splits a name into the wrappers in front and the network's own name (or nothing)."""
    parts = [part for part in name.split(".") if part not in _TRANSPARENT]
    own = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), len(parts))
    return tuple(parts[:own]), ".".join(parts[own:])


def _top_level(content: Mapping[Any, Any], limit: int = 8) -> str:
    keys = [
        f"{key} ({_some(list(value))})" if isinstance(value, Mapping) and value else str(key)
        for key, value in list(content.items())[:limit]
    ]
    return (", ".join(keys) or "none") + (f", … ({len(content)})" if len(content) > limit else "")


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    import safetensors

    with reading(file, "a safetensors file"):
        entries = safetensors.deserialize(file.read_bytes())
        return {name: _from_buffer(file, name, entry) for name, entry in entries}


def _from_buffer(file: epath.Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    kind, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if kind == "BF16":  # the upper half of a float32
        halves = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(shape)
    if kind not in _SAFETENSORS_DTYPES:
        raise InputError(f"{file}: weight {name} is of type {kind}, expected a plain number type")
    array = np.frombuffer(data, _SAFETENSORS_DTYPES[kind]).reshape(shape)
    return array.astype(np.float32) if kind == "F16" else array
