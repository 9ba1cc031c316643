"""State dicts as the authors' PyTorch code would save them: its names and shapes, spelled out
independently of ours, with random values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def release_shapes(
    *,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    channels: int,
    tokens: int,
    classes: int,
    lightning: bool = False,
    qk_norm: bool = False,
    shift: bool = True,
    learned_sigma: bool = False,
    auxiliary: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Shapes by name of every parameter of a SiT, DiT or LightningDiT."""

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)

    def everything() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "pos_embed", (1, tokens, width)
        yield "x_embedder.proj.weight", (width, channels, patch, patch)
        yield "x_embedder.proj.bias", (width,)
        yield from linear("t_embedder.mlp.0", 256, width)
        yield from linear("t_embedder.mlp.2", width, width)
        yield "y_embedder.embedding_table.weight", (classes + 1, width)
        for i in range(depth):
            block = f"blocks.{i}"
            if lightning:
                yield f"{block}.norm1.weight", (width,)
                yield f"{block}.norm2.weight", (width,)
            yield from linear(f"{block}.attn.qkv", width, 3 * width)
            if qk_norm:
                yield f"{block}.attn.q_norm.weight", (width // heads,)
                yield f"{block}.attn.k_norm.weight", (width // heads,)
            yield from linear(f"{block}.attn.proj", width, width)
            if lightning:
                hidden = int(2 / 3 * 4 * width)
                yield from linear(f"{block}.mlp.w12", width, 2 * hidden)
                yield from linear(f"{block}.mlp.w3", hidden, width)
            else:
                yield from linear(f"{block}.mlp.fc1", width, 4 * width)
                yield from linear(f"{block}.mlp.fc2", 4 * width, width)
            yield from linear(f"{block}.adaLN_modulation.1", width, (6 if shift else 4) * width)
        for head in ["final_layer_xr", "final_layer"] if auxiliary else ["final_layer"]:
            if lightning:
                yield f"{head}.norm_final.weight", (width,)
            wide = learned_sigma and head == "final_layer"
            yield from linear(f"{head}.linear", width, patch**2 * channels * (1 + wide))
            yield from linear(f"{head}.adaLN_modulation.1", width, 2 * width)

    return dict(everything())


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal draws of those shapes, scaled so that activations stay of order one."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32)
        / np.float32(math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 4)
        for name, shape in shapes.items()
    }


def rope_buffers(grid: int, head_width: int) -> dict[str, np.ndarray]:
    """LightningDiT's rotary buffers in float32 arithmetic, as its PyTorch module stores them."""
    half = head_width // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequency = np.float32(1) / np.float32(10000) ** exponent
    angle = np.repeat(np.arange(grid, dtype=np.float32)[:, None] * frequency, 2, axis=1)
    shape = (grid, grid, half)
    by_row = np.broadcast_to(angle[:, None], shape)
    by_column = np.broadcast_to(angle[None], shape)
    angles = np.concatenate([by_row, by_column], -1).reshape(grid * grid, head_width)
    return {"feat_rope.freqs_cos": np.cos(angles), "feat_rope.freqs_sin": np.sin(angles)}
