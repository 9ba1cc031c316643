"""Between floats in [−1, 1] and pixels 0…255: one rounding rule, and no pixel of what is NaN.

Whatever becomes a picture (samples on disk, grids of training, the library's decoder, the data set
as a reference) passes through `to_uint8`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.errors import InputError, NotFiniteError

_NAMED = 5

Array = jax.Array | np.ndarray


class Pixels(NamedTuple):
    """Rounded pictures, to be taken out by `checked` on the host.

    Attributes:
        values: (B, H, W, C) uint8.
        finite: (B,) booleans: whether each picture was finite throughout before it was rounded.
    """

    values: Any
    finite: Any

    def checked(self, indices: np.ndarray | None = None, where: str = "") -> Any:
        """Returns the pictures.

        Args:
            indices: (B,) numbers by which the pictures are known; their positions if None.
            where: what the message says of them, such as " at IG 1.4".

        Raises:
            NotFiniteError: if any is not finite; the line names the first of them.
        """
        finite = np.asarray(self.finite)
        if finite.all():
            return self.values
        bad = np.flatnonzero(~finite) if indices is None else np.asarray(indices)[~finite]
        named = ", ".join(map(str, bad[:_NAMED])) + ", …" * (len(bad) > _NAMED)
        raise NotFiniteError(
            f"{len(bad)} of {len(finite)} pictures{where} are not finite ({named}): expected "
            "finite numbers, from a trained model at moderate guidance scales"
        )


def to_uint8(images: Array) -> Pixels:
    """Turns [−1, 1] into 0…255: 127.5·x + 128, clipped, the fraction dropped.

    The rule of the DiT, SiT and IG releases (`sample_ddp.py`). Runs on the host or inside `jit`.

    Args:
        images: (B, H, W, C) floats.

    Raises:
        InputError: if they are not floats.
    """
    xp: Any = jnp if isinstance(images, jax.Array) else np
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"pictures are {images.dtype}: expected floats in [-1, 1]")
    finite = xp.isfinite(images)
    known = xp.where(finite, images, 0).astype(np.float32)
    scaled = xp.clip(127.5 * known + 128.0, 0.0, 255.0)
    return Pixels(scaled.astype(np.uint8), finite.all(tuple(range(1, images.ndim))))


def unchanged(x: Array) -> Pixels:
    """Vectors (B, D), which are shown as the floats that they are: float32, and checked alike."""
    return Pixels(np.asarray(x, np.float32), np.isfinite(x).all(1))


def from_uint8(images: jax.Array) -> jax.Array:
    """Maps pixels 0…255 to float32 in [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0
