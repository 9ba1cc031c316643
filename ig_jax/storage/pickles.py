"""PyTorch's weight files, which are pickles, read without ever running what a pickle asks for."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ig_jax.errors import InputError, reading, reason


def read_pytorch(file: epath.Path) -> Any:
    """Reads a `.pt` file with NumPy arrays in place of tensors and dicts in place of namespaces.

    Raises `InputError` if it is damaged or carries code, or if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{file}: reading a PyTorch file needs PyTorch: pip install "ig_jax[convert]", or give '
            "a .safetensors file of the same arrays, which needs nothing"
        ) from error
    # Training scripts of the DiT family store their flags as an argparse.Namespace, which is plain
    # data, and others NumPy's scalars and arrays.
    data = [argparse.Namespace, *_NUMPY_PICKLES]
    try:
        with torch.serialization.safe_globals(data):
            content = _load_pytorch(file)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(_pytorch_failure(file, error)) from error
    with reading(file, "plain arrays"):
        return _to_numpy(content)


def as_array(value: Any) -> np.ndarray:
    """A NumPy array of an array or a PyTorch tensor, sharing memory if possible.

    16-bit tensors are widened to float32: NumPy has no bfloat16 to share with PyTorch.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        narrow = value.is_floating_point() and value.element_size() < 4
        value = (value.float() if narrow else value).numpy()
    return np.asarray(value)


class _PickledType:
    """Stands for `numpy.dtype` in a pickle: numbers and texts, nothing that points elsewhere."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands for `numpy.ndarray` in a pickle; `value` is the array."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.value = np.ndarray(shape, kind.dtype, data, order="F" if fortran else "C")


def _pickled_array(*_: Any) -> _PickledArray:
    return _PickledArray()


def _pickled_scalar(kind: _PickledType, data: bytes) -> np.generic:
    return np.ndarray((), kind.dtype, data)[()]


def _empty_bytes() -> bytes:
    return b""


# NumPy's own functions trust the types that a pickle describes, up to pointers in its bytes. These
# read the same pickles (the older names are NumPy 1's) and make nothing but plain values.
_NUMPY_PICKLES = [
    (_PickledType, "numpy.dtype"),
    (_PickledArray, "numpy.ndarray"),
    *((_pickled_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *((_pickled_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    (_empty_bytes, "builtins.bytes"),  # an empty array's content
]

# Keeps tensors in dicts; a network gives its state dict, and all else becomes None.
_RESAVE = (
    'import sys, torch; w = lambda v: w(v.state_dict()) if hasattr(v, "state_dict") else '
    '{str(k): w(x) for k, x in v.items()} if hasattr(v, "items") else '
    "v if torch.is_tensor(v) else None; "
    'torch.save(w(torch.load(sys.argv[1], map_location="cpu", weights_only=False)), sys.argv[2])'
)


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
        command = shlex.join(["python", "-c", _RESAVE, str(file), f"{file.stem}_weights.pt"])
        return (
            f"{file}: the pickle carries code ({code[1]}), which is never run; if you trust the "
            f"file, re-save its weights alone: {command}"
        )
    # PyTorch's own line on a pickle is advice to run it.
    why = "" if isinstance(error, pickle.UnpicklingError) else f" ({reason(error)})"
    return f"{file}: damaged, truncated, or not a PyTorch weight file{why}"


def _to_numpy(value: Any) -> Any:
    """Turns tensors inside dicts, lists and namespaces into arrays, sharing memory if possible."""
    import torch

    if isinstance(value, torch.Tensor):
        return as_array(value)
    if isinstance(value, _PickledArray):
        return value.value
    if isinstance(value, argparse.Namespace):
        return _to_numpy(vars(value))
    if isinstance(value, Mapping):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(item) for item in value]
    return value
