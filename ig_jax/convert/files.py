"""Weight files: reading safetensors and PyTorch checkpoints as NumPy arrays, and checking them.

Every model family's converter starts here, so that a damaged, foreign or unsafe file is refused in
the same words, with the name of the file and of the weight at fault.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ig_jax.errors import InputError, suggest
from ig_jax.storage.files import write_atomically

PYTORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PYTORCH_SUFFIXES)

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
    file = epath.Path(path)
    if file.suffix not in SUFFIXES:
        raise InputError(f"{path}: found a {file.suffix or 'suffixless'} file, expected weights "
                         f"as one of {', '.join(SUFFIXES)}")  # fmt: skip
    if file.is_dir() or not file.exists():
        found = "a directory" if file.is_dir() else "no such file"
        raise InputError(f"{path}: found {found}, expected a weight file")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pytorch(file)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: found a {type(content).__name__}, expected a dict of weights")
    return content


def read_weights(path: os.PathLike | str, wrappers: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads one flat `{name: array}` from a weight file, as `read_checkpoint` does.

    Args:
        path: the file.
        wrappers: top-level entries that may hold the weights, the preferred first, such as
            `("ema", "model")`; the whole file where it has none of them.

    Returns:
        The arrays by name; nested dicts are joined with dots, what is not an array is left out.

    Raises:
        InputError: as `read_checkpoint`, and if there is no array at all.
    """
    content = read_checkpoint(path)
    weights = flatten(unwrap(content, wrappers))
    if not weights:
        raise InputError(
            f"{path}: found no arrays, only {_some(list(content))}; expected a dict of weights"
        )
    return weights


def unwrap(content: Mapping[str, Any], wrappers: Sequence[str]) -> Mapping[str, Any]:
    """Returns the first entry named in `wrappers` that is a dict, or `content` itself."""
    for name in wrappers:
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def flatten(content: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of nested dicts by dotted name; lists, numbers and texts are left out."""
    return dict(_arrays(content, ""))


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

    file = epath.Path(path)
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


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    import safetensors

    try:
        entries = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: damaged or truncated safetensors file ({error})") from error
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


def _read_pytorch(file: epath.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{file}: reading a PyTorch file needs PyTorch: pip install "ig_jax[convert]"'
        ) from error
    try:
        # Training scripts of the DiT family store their flags as an argparse.Namespace, which is
        # plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = _load_pytorch(file)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(_pytorch_failure(file, error)) from error
    return _to_numpy(content)


def _load_pytorch(file: epath.Path) -> Any:
    """Reads a PyTorch file; a local one is mapped, so that what nobody uses is never read."""
    import torch

    options: dict[str, Any] = dict(map_location="cpu", weights_only=True)
    path = os.fspath(file)
    if os.path.isfile(path) and zipfile.is_zipfile(path):
        return torch.load(path, mmap=True, **options)
    with file.open("rb") as stream:
        return torch.load(stream, **options)


def _pytorch_failure(file: epath.Path, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"{file}: the pickle carries code ({code[1]}), which is never run; if you trust the "
            'file, re-save its weights alone: python -c "import torch; '
            f"c = torch.load('{file}', weights_only=False); "
            "torch.save({k: c[k] for k in c if k in ('model', 'ema', 'state_dict')}, "
            "'weights.pt')\""
        )
    reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
    return f"{file}: damaged, truncated, or not a PyTorch weight file{reason}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _to_numpy(value: Any) -> Any:
    """Turns tensors inside dicts, lists and namespaces into arrays, sharing memory if possible."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        narrow = value.is_floating_point() and value.element_size() < 4
        return (value.float() if narrow else value).numpy()
    if isinstance(value, argparse.Namespace):
        return _to_numpy(vars(value))
    if isinstance(value, Mapping):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(item) for item in value]
    return value
