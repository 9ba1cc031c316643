"""The published families and sizes, as one table (DiT: arXiv 2212.09748, SiT: 2401.08740,
LightningDiT: 2501.01423).

A family is a set of options of the one transformer in `dit.py`; a size is (depth, width, heads).
The CFG scales that these papers publish are of samplers that guide the first three latent channels
only (`forward_with_cfg` in their releases); IG's release guides all, so they do not carry over.
"""

from __future__ import annotations

import dataclasses

from ig_jax.errors import look_up


@dataclasses.dataclass(frozen=True)
class Family:
    """Options shared by every size of a published family, and what its networks predict.

    Attributes:
        norm: "layer" (no affine) or "rms" (with weight).
        mlp: "gelu" (tanh approximation) or "swiglu".
        rope: whether queries and keys are rotated by the 2-D token position.
        path: name of the interpolant the family was trained on (`diffusion.interpolant`).
        prediction: "velocity", "noise" or "data".
        patch_size, channels, input_size: defaults of the published ImageNet 256×256 models.
        zero_auxiliary: whether the auxiliary head starts at zero (the LightningDiT release forgets
            to, so its heads start Xavier-uniform).
    """

    norm: str
    mlp: str
    rope: bool
    path: str
    prediction: str
    patch_size: int
    channels: int
    input_size: int
    zero_auxiliary: bool


FAMILIES: dict[str, Family] = {
    "sit": Family("layer", "gelu", False, "linear", "velocity", 2, 4, 32, True),
    "dit": Family("layer", "gelu", False, "vp", "noise", 2, 4, 32, True),
    "lightningdit": Family("rms", "swiglu", True, "linear_reversed", "velocity", 1, 32, 16, False),
}

# name → (depth, width, heads, published auxiliary depth)
SIZES: dict[str, tuple[int, int, int, int]] = {
    "s": (12, 384, 6, 4),
    "b": (12, 768, 12, 4),
    "l": (24, 1024, 16, 8),
    "xl": (28, 1152, 16, 8),
    "1p0b": (24, 1536, 24, 8),
    "1p6b": (28, 1792, 28, 8),
}


def family(name: str) -> Family:
    """Returns the family called `name`; raises `InputError` naming the known ones."""
    return look_up(FAMILIES, name, "model")


def size(name: str) -> tuple[int, int, int, int]:
    """Returns (depth, width, heads, auxiliary depth) of a named size; raises `InputError`."""
    return look_up(SIZES, name, "model size")
