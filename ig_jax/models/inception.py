"""The Inception-v3 of 2015-12-05 whose features define FID, sFID and Inception Score.

Batch norms are folded into the convolutions, so the network is convolutions, ReLUs and pools; its
quirks (TF-1 resize, average pools that skip padding, one max pool) are those of the original.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

INPUT_SIZE = 299
POOL_WIDTH = 2048
SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008

# Full float32 everywhere: the accelerators' default (TF32, bfloat16) moves features by 1e-3.
HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class InceptionOutput:
    """What the metrics need of one forward pass, all float32.

    Attributes:
        pool3: (N, 2048), mean over the last 8×8 map; FID, precision and recall.
        spatial: (N, 17, 17, 7), the map whose row-major flattening gives sFID's 2023 numbers.
        logits: (N, 1008), `pool3 · fc.weight` without the bias; Inception Score.
    """

    pool3: jax.Array
    spatial: jax.Array
    logits: jax.Array


class ConvReLU(nnx.Module):
    """Convolution, bias (a folded batch norm), ReLU. Weights start at zero and come from a file."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        padding: str = "SAME",
    ):
        self.kernel = nnx.Param(jnp.zeros((*kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.stride, self.padding, self.outputs = stride, padding, outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=HIGHEST,
        )
        return jax.nn.relu(x + self.bias[...])


def max_pool(x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """3×3 maximum over (N, H, W, C)."""
    found: jax.Array = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding
    )
    return found


def average_pool(x: jax.Array) -> jax.Array:
    """3×3 mean over (N, H, W, C), stride 1; padding counts neither in the sum nor in the count."""
    total: jax.Array = jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    )
    per_axis = [np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]]
    return total / np.outer(*per_axis).astype(np.float32)[None, :, :, None]


def resize_bilinear_tf1(images: jax.Array, size: int = INPUT_SIZE) -> jax.Array:
    """Resizes (N, H, W, C) float32 to (N, size, size, C) as TF-1's `ResizeBilinear` does.

    Output pixel i reads input position `i·H/size` (corners not aligned, no half-pixel centres).
    """
    for axis in (2, 1):
        length = images.shape[axis]
        position = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = np.minimum(np.floor(position).astype(np.int32), length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = (position - low).reshape(-1, *[1] * (3 - axis))
        near, far = (jnp.take(images, index, axis=axis) for index in (low, high))
        images = near + (far - near) * weight
    return images


class InceptionA(nnx.Module):
    """35×35 blocks: 1×1, 5×5, double 3×3 and pooled branches."""

    def __init__(self, inputs: int, pool_outputs: int):
        self.branch1x1 = ConvReLU(inputs, 64)
        self.branch5x5_1 = ConvReLU(inputs, 48)
        self.branch5x5_2 = ConvReLU(48, 64, (5, 5))
        self.branch3x3dbl_1 = ConvReLU(inputs, 64)
        self.branch3x3dbl_2 = ConvReLU(64, 96, (3, 3))
        self.branch3x3dbl_3 = ConvReLU(96, 96, (3, 3))
        self.branch_pool = ConvReLU(inputs, pool_outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(average_pool(x)),
            ],
            axis=-1,
        )


class InceptionB(nnx.Module):
    """35×35 → 17×17 by strided convolutions and a max pool."""

    def __init__(self, inputs: int):
        self.branch3x3 = ConvReLU(inputs, 384, (3, 3), stride=2, padding="VALID")
        self.branch3x3dbl_1 = ConvReLU(inputs, 64)
        self.branch3x3dbl_2 = ConvReLU(64, 96, (3, 3))
        self.branch3x3dbl_3 = ConvReLU(96, 96, (3, 3), stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, max_pool(x, 2, "VALID")], axis=-1)


class InceptionC(nnx.Module):
    """17×17 blocks: 1×1, factorised 7×7, double 7×7 and pooled branches."""

    def __init__(self, inputs: int, width: int):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvReLU(inputs, 192)
        self.branch7x7_1 = ConvReLU(inputs, width)
        self.branch7x7_2 = ConvReLU(width, width, row)
        self.branch7x7_3 = ConvReLU(width, 192, column)
        self.branch7x7dbl_1 = ConvReLU(inputs, width)
        self.branch7x7dbl_2 = ConvReLU(width, width, column)
        self.branch7x7dbl_3 = ConvReLU(width, width, row)
        self.branch7x7dbl_4 = ConvReLU(width, width, column)
        self.branch7x7dbl_5 = ConvReLU(width, 192, row)
        self.branch_pool = ConvReLU(inputs, 192)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                self.branch_pool(average_pool(x)),
            ],
            axis=-1,
        )


class InceptionD(nnx.Module):
    """17×17 → 8×8 by strided convolutions and a max pool."""

    def __init__(self, inputs: int):
        self.branch3x3_1 = ConvReLU(inputs, 192)
        self.branch3x3_2 = ConvReLU(192, 320, (3, 3), stride=2, padding="VALID")
        self.branch7x7x3_1 = ConvReLU(inputs, 192)
        self.branch7x7x3_2 = ConvReLU(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvReLU(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvReLU(192, 192, (3, 3), stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return jnp.concatenate(
            [
                self.branch3x3_2(self.branch3x3_1(x)),
                self.branch7x7x3_4(seven),
                max_pool(x, 2, "VALID"),
            ],
            axis=-1,
        )


class InceptionE(nnx.Module):
    """8×8 blocks with fanned-out 3×3 branches."""

    def __init__(self, inputs: int, pool: str):
        row, column = (1, 3), (3, 1)
        self.branch1x1 = ConvReLU(inputs, 320)
        self.branch3x3_1 = ConvReLU(inputs, 384)
        self.branch3x3_2a = ConvReLU(384, 384, row)
        self.branch3x3_2b = ConvReLU(384, 384, column)
        self.branch3x3dbl_1 = ConvReLU(inputs, 448)
        self.branch3x3dbl_2 = ConvReLU(448, 384, (3, 3))
        self.branch3x3dbl_3a = ConvReLU(384, 384, row)
        self.branch3x3dbl_3b = ConvReLU(384, 384, column)
        self.branch_pool = ConvReLU(inputs, 192)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x) if self.pool == "max" else average_pool(x)
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            axis=-1,
        )


class Inception(nnx.Module):
    """Images to `InceptionOutput`; attribute names are those of the PyTorch file, lower-cased.

    Built with zero weights (`convert.inception` supplies the real ones).
    """

    def __init__(self) -> None:
        self.conv2d_1a_3x3 = ConvReLU(3, 32, (3, 3), stride=2, padding="VALID")
        self.conv2d_2a_3x3 = ConvReLU(32, 32, (3, 3), padding="VALID")
        self.conv2d_2b_3x3 = ConvReLU(32, 64, (3, 3))
        self.conv2d_3b_1x1 = ConvReLU(64, 80)
        self.conv2d_4a_3x3 = ConvReLU(80, 192, (3, 3), padding="VALID")
        self.mixed_5b = InceptionA(192, 32)
        self.mixed_5c = InceptionA(256, 64)
        self.mixed_5d = InceptionA(288, 64)
        self.mixed_6a = InceptionB(288)
        self.mixed_6b = InceptionC(768, 128)
        self.mixed_6c = InceptionC(768, 160)
        self.mixed_6d = InceptionC(768, 160)
        self.mixed_6e = InceptionC(768, 192)
        self.mixed_7a = InceptionD(768)
        self.mixed_7b = InceptionE(1280, pool="average")
        self.mixed_7c = InceptionE(POOL_WIDTH, pool="max")  # so it is in the 2015 graph
        self.fc = nnx.Param(jnp.zeros((POOL_WIDTH, NUM_LOGITS), jnp.float32))

    def __call__(self, images: jax.Array) -> InceptionOutput:
        """Maps (N, H, W, 3) images with values 0…255 (uint8 or float) to their features."""
        x = (resize_bilinear_tf1(images.astype(jnp.float32)) - 128) / 128
        x = self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x)))
        x = self.conv2d_4a_3x3(self.conv2d_3b_1x1(max_pool(x, 2, "VALID")))
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(max_pool(x, 2, "VALID"))))
        x = self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))
        x = self.mixed_6d(x)
        spatial = x[..., :SPATIAL_CHANNELS]  # the 1×1 branch comes first in the concatenation
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(self.mixed_6e(x))))
        pool3 = x.mean((1, 2))
        return InceptionOutput(pool3, spatial, jnp.dot(pool3, self.fc[...], precision=HIGHEST))
