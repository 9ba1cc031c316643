"""DINOv2 (Oquab et al. 2024), the vision transformer whose class token defines FD-DINOv2.

Pictures are prepared as EDM2's metrics do it (Karras et al. 2024, `calculate_metrics.py`): bicubic
to 224×224 with antialias, neither rounded nor clipped, then ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ig_jax.models import functional
from ig_jax.models.layers import patchify

INPUT_SIZE = 224
PATCH = 14
GRID = INPUT_SIZE // PATCH
# Patches a side where the position table was trained (518 pixels).
TRAINED_GRID = 37

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# Full float32 everywhere: the accelerators' default (TF32, bfloat16) moves features by 1e-3.
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class DinoV2Spec:
    """The architecture: features, blocks and attention heads (ViT-L: 1024, 24, 16)."""

    width: int
    depth: int
    heads: int


class Block(nnx.Module):
    """Pre-norm attention and MLP (exact GELU), each scaled channel by channel before it is added.

    Weights start at zero and come from a file.
    """

    def __init__(self, spec: DinoV2Spec, rngs: nnx.Rngs):
        width, self.heads = spec.width, spec.heads
        self.norm1, self.norm2 = (_norm(width, rngs) for _ in range(2))
        self.qkv, self.proj = _linear(width, 3 * width, rngs), _linear(width, width, rngs)
        self.fc1, self.fc2 = _linear(width, 4 * width, rngs), _linear(4 * width, width, rngs)
        self.gamma1, self.gamma2 = (nnx.Param(jnp.zeros(width, jnp.float32)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.gamma1[...] * self.proj(self._attention(self.qkv(self.norm1(x))))
        h = nnx.gelu(self.fc1(self.norm2(x)), approximate=False)
        return x + self.gamma2[...] * self.fc2(h)

    def _attention(self, qkv: jax.Array) -> jax.Array:
        batch, tokens, _ = qkv.shape
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        products = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=HIGHEST) * q.shape[-1] ** -0.5
        shares = jax.nn.softmax(products)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, v, precision=HIGHEST)
        return mixed.reshape(batch, tokens, -1)


class DinoV2(nnx.Module):
    """Pictures to the normed class token; `convert.dinov2` supplies the weights."""

    def __init__(self, spec: DinoV2Spec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.patch_embed = _linear(3 * PATCH**2, spec.width, rngs)
        self.class_token = nnx.Param(jnp.zeros(spec.width, jnp.float32))
        self.position = nnx.Param(jnp.zeros((1 + GRID**2, spec.width), jnp.float32))
        make = nnx.vmap(functools.partial(Block, spec), in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=spec.depth)(make)(rngs)
        self.norm = _norm(spec.width, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (N, H, W, 3) images with values 0…255 (uint8 or float) to (N, width) features."""
        x = (resize_bicubic(images.astype(jnp.float32)) / 255 - MEAN) / STD
        x = self.patch_embed(patchify(x, PATCH))
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, self.spec.width))
        x = jnp.concatenate([first, x], axis=1) + self.position[...]
        graphdef, layers = functional.split(self.blocks)  # each parameter has a leading layer axis

        def body(x: jax.Array, layer: functional.Params) -> tuple[jax.Array, None]:
            return functional.merge(graphdef, layer)(x), None

        x, _ = jax.lax.scan(body, x, layers)
        features: jax.Array = self.norm(x[:, 0])
        return features


def abstract(spec: DinoV2Spec) -> tuple[nnx.GraphDef[Any], functional.Params]:
    """Returns the graph definition, and shapes in place of parameters (nothing is allocated)."""
    return functional.split(nnx.eval_shape(lambda: DinoV2(spec, rngs=nnx.Rngs(0))))


def resize_bicubic(images: jax.Array, size: int = INPUT_SIZE) -> jax.Array:
    """Resizes (N, H, W, C) float32 to (N, size, size, C), bicubic with antialias.

    Keys' kernel with a = −0.5, stretched where pictures shrink; weights outside the picture are
    left out. That is PyTorch's `interpolate(mode="bicubic", antialias=True)`.
    """
    shape = (images.shape[0], size, size, images.shape[3])
    resized: jax.Array = jax.image.resize(images, shape, "cubic", antialias=True, precision=HIGHEST)
    return resized


def interpolate_positions(table: np.ndarray) -> np.ndarray:
    """Brings a position table (1 + 37², D), the class token's first, to (1 + 16², D) float32.

    Bicubic without antialias, a = −0.75, the border repeated, at a scale of (16 + 0.1)/37: the
    release adds 0.1 against rounding (`interpolate_offset`), and the published features have it.
    """
    centres = (np.arange(GRID) + 0.5) * TRAINED_GRID / (GRID + 0.1) - 0.5
    low = np.floor(centres).astype(int)
    weights = np.zeros((GRID, TRAINED_GRID))
    for tap in range(-1, 3):
        index = np.clip(low + tap, 0, TRAINED_GRID - 1)
        np.add.at(weights, (np.arange(GRID), index), _cubic(centres - (low + tap), -0.75))
    grid = table[1:].astype(np.float64).reshape(TRAINED_GRID, TRAINED_GRID, -1)
    small = np.einsum("ij,kl,jld->ikd", weights, weights, grid, optimize=True)
    patches = small.reshape(GRID**2, -1)
    return np.concatenate([table[:1], patches]).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (1981), which is zero beyond 2."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.select([d <= 1, d < 2], [near, far], 0.0)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(inputs, outputs, kernel_init=zeros, precision=HIGHEST, rngs=rngs)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
