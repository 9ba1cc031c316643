"""Loads the FID Inception from the PyTorch port of its 2015-12-05 weights.

Batch norms are folded into the convolutions in float64, and kernels are turned from (out, in, h, w)
to (h, w, in, out).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from ig_jax.errors import InputError
from ig_jax.models import functional
from ig_jax.models.inception import Inception
from ig_jax.paths import resolve
from ig_jax.storage import weight_files
from ig_jax.storage.files import file_digest

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256_PREFIX = "6726825d"

# TensorFlow's value for this network; torch's default is 1e-5.
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def abstract_inception() -> tuple[nnx.GraphDef, functional.Params]:
    """Returns the graph definition, and shapes in place of parameters (nothing is allocated)."""
    return functional.split(nnx.eval_shape(Inception))


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight that the PyTorch file must hold, by name."""
    _, params = abstract_inception()
    shapes = {"fc.weight": params["fc"].shape[::-1], "fc.bias": params["fc"].shape[1:]}
    for path, conv in _convolutions(params):
        height, width, inputs, outputs = conv["kernel"].shape
        name = _torch_name(path)
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{name}.bn.{part}": (outputs,) for part in BATCH_NORM_PARTS}
    return shapes


def inception_params(weights: Mapping[str, np.ndarray], where: str) -> functional.Params:
    """Turns a PyTorch state dict into our parameters.

    Args:
        weights: arrays under the names of torchvision's `Inception3` (no auxiliary classifier).
        where: the file, for messages.

    Returns:
        The nested dict of `Inception`'s parameters, float32.

    Raises:
        InputError: if weights are missing, unexpected, of another shape, or not finite.
    """
    weights = {n: w for n, w in weights.items() if not n.endswith("num_batches_tracked")}
    weight_files.match_keys(expected_shapes(), weights, where)
    weight_files.check_finite(weights, where)
    _, params = abstract_inception()
    for path, conv in _convolutions(params):
        conv["kernel"], conv["bias"] = _fold(weights, _torch_name(path))
    # The bias of `fc` is left out on purpose: the Inception Score is defined without it.
    params["fc"] = np.ascontiguousarray(weights["fc.weight"].T.astype(np.float32))
    return params


def load_inception(
    path: os.PathLike | str, sha256_prefix: str = SHA256_PREFIX
) -> tuple[functional.Params, str]:
    """Reads, checks and converts the weight file.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth`, local or gs://.
        sha256_prefix: what the file's SHA-256 must start with.

    Returns:
        The parameters of `Inception` and the file's SHA-256 in hex.

    Raises:
        InputError: if the file is missing (the line says where to get it), has another hash, or
            does not hold these weights.
    """
    file = resolve(path)
    if not file.exists() or file.is_dir():
        raise InputError(
            f"{path}: Inception weights not found; download {URL} "
            f"(its SHA-256 starts with {SHA256_PREFIX})"
        )
    digest = file_digest(file)
    if not digest.startswith(sha256_prefix):
        raise InputError(
            f"{path}: SHA-256 starts with {digest[:8]}, expected {sha256_prefix}; "
            f"damaged or another file, download {URL}"
        )
    return inception_params(weight_files.read_weights(path), str(path)), digest


def _convolutions(
    params: functional.Params, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], functional.Params]]:
    for name, value in params.items():
        if isinstance(value, dict):
            if "kernel" in value:
                yield (*prefix, name), value
            else:
                yield from _convolutions(value, (*prefix, name))


def _torch_name(path: tuple[str, ...]) -> str:
    return ".".join((path[0].capitalize(), *path[1:]))


def _fold(weights: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel (h, w, in, out) and bias of the convolution followed by its batch norm."""
    kernel = weights[f"{name}.conv.weight"].astype(np.float64)
    gain, bias, mean, variance = (
        weights[f"{name}.bn.{part}"].astype(np.float64) for part in BATCH_NORM_PARTS
    )
    gain = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
    kernel = (kernel * gain[:, None, None, None]).transpose(2, 3, 1, 0)
    return np.ascontiguousarray(kernel, np.float32), (bias - mean * gain).astype(np.float32)
