"""The parts of a diffusion transformer: norms, embeddings, attention, MLPs, a block, a head.

Everything is NHWC / (batch, tokens, width). Parameters are float32; matrix products run in `dtype`;
norms, softmax, modulation and the residual stream stay in float32.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# XLA's attention replaces cuDNN's where it takes less than this share of its time: a tie is none,
# so that a run which continues rarely gets another program.
_CLEARLY_FASTER = 0.95

# What attention's output is called in policies of what to save for the backward pass.
ATTENDED = "attended"

log = logging.getLogger("ig_jax")

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


def normal(stddev: float) -> nnx.Initializer:
    return nnx.initializers.normal(stddev)


class LayerNorm(nnx.Module):
    """LayerNorm without learned affine (DiT's adaLN supplies it), computed in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned weight, computed in float32 (LightningDiT)."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * self.weight[...]


def make_norm(kind: str, width: int) -> LayerNorm | RMSNorm:
    return RMSNorm(width) if kind == "rms" else LayerNorm()


class Linear(nnx.Linear):
    """`nnx.Linear` as one product of two matrices, whatever axes precede the features.

    Of (B, N, D) inputs the weight's gradient would sum over two axes, for which XLA on CPU first
    copies both operands transposed.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        *batch, features = inputs.shape
        out = super().__call__(inputs.reshape(math.prod(batch), features), out_sharding)
        return out.reshape(*batch, out.shape[-1])


def modulate(h: jax.Array, shift: jax.Array | None, scale: jax.Array) -> jax.Array:
    """adaLN: `h·(1 + scale) + shift`, with (B, D) conditions broadcast over (B, N, D) tokens."""
    h = h * (1 + scale[:, None])
    return h if shift is None else h + shift[:, None]


def position_table(grid: int, width: int) -> np.ndarray:
    """Fixed 2-D sin-cos table, (grid², width) float32, tokens in raster order.

    As the release has it, the *first* half of the channels encodes the column and the second half
    the row; each half is `[sin, cos]` with `ω_j = 10000^(−j/(width/4))`.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    halves = [[np.sin(np.outer(p, omega)), np.cos(np.outer(p, omega))] for p in (column, row)]
    return np.concatenate([*halves[0], *halves[1]], axis=1).astype(np.float32)


def rotary_tables(grid: int, head_width: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the 2-D rotary embedding, each (grid², head_width) float32.

    With head width d, `f_j = 10000^(−2j/(d/2))` for j < d/4, every frequency used by one
    interleaved pair; the first d/2 channels rotate by the row index, the last d/2 by the column.
    """
    frequency = np.repeat(10000.0 ** (-2 * np.arange(head_width // 4) / (head_width / 2)), 2)
    row, column = np.divmod(np.arange(grid * grid), grid)
    angle = np.concatenate([np.outer(row, frequency), np.outer(column, frequency)], axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, tables: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotates interleaved channel pairs `(a, b) → (−b, a)` of (B, N, heads, d) in float32."""
    cos, sin = (table[None, :, None] for table in tables)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x.astype(jnp.float32) * cos + turned * sin


def time_frequencies(t: jax.Array, count: int = 256, scale: float = 10000.0) -> jax.Array:
    """Features `[cos, sin]` of (B,) unscaled times, `freq_j = scale^(−j/(count/2))`."""
    half = count // 2
    frequency = np.exp(-np.log(scale) * np.arange(half) / half).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@jax.custom_jvp
def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Of (B, N, d) queries and keys, (B, N, N) float32; derivatives in the inputs' dtype.

    Left to JAX, those of 16-bit inputs would be products of float32 matrices.
    """
    return jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32)


@_products.defjvp
def _products_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (q, k), (dq, dk) = primals, tangents
    change = jnp.einsum("bnd,bmd->bnm", dq, k) + jnp.einsum("bnd,bmd->bnm", q, dk)
    return _products(q, k), change.astype(jnp.float32)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    scores: jax.Array = _products(q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    return scores


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bnm,bmd->bnd", weights, v)


def _fold(x: jax.Array) -> jax.Array:
    """(B, N, heads, d) → (B·heads, N, d), of which products are contiguous."""
    batch, tokens, heads, width = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, tokens, width)


def _unfold(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(-1, heads, *x.shape[1:]).swapaxes(1, 2)


def _attended(x: jax.Array) -> jax.Array:
    # Named, and so kept, with heads side by side: TPUs would pad each head to 128 numbers.
    batch, tokens, heads, width = x.shape
    named: jax.Array = checkpoint_name(x.reshape(batch, tokens, heads * width), ATTENDED)
    return named.reshape(x.shape)


def _undivided(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What attention divides, (B·heads, N, d), and by what, (B·heads, N, 1), in float32."""
    scores = _scores(_fold(q), _fold(k))
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return _weighted(weights, _fold(v)), weights.sum(axis=-1, keepdims=True)


def _divided(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    products, sums = _undivided(q, k, v)
    return _attended(_unfold(products / sums, q.shape[2]))


_attend_32_bits = jax.custom_jvp(_divided)


@_attend_32_bits.defjvp
def _attend_32_bits_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Takes the output, which is kept; left to JAX, it would take the products, made once more."""

    @jax.checkpoint
    def change(out: jax.Array, *tangents: jax.Array) -> jax.Array:
        (_, sums), (d_products, d_sums) = jax.jvp(_undivided, primals, tangents)
        return _unfold((d_products - _fold(out) * d_sums) / sums, out.shape[2])

    out = _divided(*primals)
    return out, change(out, *tangents)


@jax.checkpoint
def _attend_16_bits(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(_scores(_fold(q), _fold(k))).astype(v.dtype)
    return _unfold(_weighted(weights, _fold(v)), v.shape[2])


# The backward pass computes the (tokens, tokens) weights anew: that costs less than to keep them in
# memory and read them.
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of (B, N, heads, d) queries, keys and values; weights are float32."""
    if v.dtype == jnp.float32:
        # Divided by their sum only after the product, weights stay in a core's cache: two thirds
        # of the time on CPU. In 16 bits gradients would be less precise.
        out: jax.Array = _attend_32_bits(q, k, v)
        return out
    return _attended(_attend_16_bits(q, k, v))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attended(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))


# Each takes and returns (B, N, heads, d), and names what it returns `ATTENDED`.
ATTENTIONS: dict[str, Callable[..., jax.Array]] = {"xla": attend, "cudnn": _cudnn}


def choose_attention(shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """The row of `ATTENTIONS` for (B, N, heads, d) of `dtype`.

    cuDNN's fused kernel applies on GPUs, to 16 bits and head widths that are multiples of 8 up to
    128; there the two race once for each shape. It is taken without a race where the GPU is not
    this machine's, and by a run of several processes, which must all compile the same program.
    """
    # The mesh being compiled for, if any, may be of other devices than this machine's.
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform != "gpu" or jnp.dtype(dtype).itemsize != 2 or shape[3] % 8 or shape[3] > 128:
        return "xla"
    if jax.default_backend() != "gpu" or jax.process_count() > 1:
        return "cudnn"
    devices = jax.device_count() if mesh.empty else mesh.size
    return race((max(1, shape[0] // devices), *shape[1:]), jnp.dtype(dtype))


@functools.cache
def race(shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """Which of `ATTENTIONS` is faster forward and backward on one device; logs what it found."""
    try:
        times = {name: _seconds(attention, shape, dtype) for name, attention in ATTENTIONS.items()}
    except (RuntimeError, ValueError, NotImplementedError) as error:  # old cards and libraries
        log.info("attention by XLA: cuDNN's does not run here (%s)", str(error).split("\n")[0])
        return "xla"
    chosen = "xla" if times["xla"] < _CLEARLY_FASTER * times["cudnn"] else "cudnn"
    found = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    log.info("attention of %s %s: %s, so %s", "×".join(map(str, shape)), dtype.name, found, chosen)
    return chosen


def _seconds(
    attention: Callable[..., jax.Array], shape: tuple[int, ...], dtype: jnp.dtype
) -> float:
    """The shortest of some runs, in the midst of tracing another program or not."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v).astype(jnp.float32).sum()

    with jax.ensure_compile_time_eval():
        run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        inputs = [jnp.ones(shape, dtype)] * 3
        jax.block_until_ready(run(*inputs))
        times = []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            times.append(time.perf_counter() - began)
    return min(times)


class Attention(nnx.Module):
    """Multi-head self-attention with optional RMS q/k norm and rotary embedding."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.dtype = dtype
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None

    def __call__(self, x: jax.Array, tables: tuple[np.ndarray, np.ndarray] | None) -> jax.Array:
        batch, tokens, width = x.shape
        # Split, not sliced: the derivative of slices is a sum of arrays that are zero elsewhere.
        q, k, v = (
            part.reshape(batch, tokens, self.heads, width // self.heads)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        q, k, v = (h.astype(self.dtype) for h in (q, k, v))
        out = ATTENTIONS[choose_attention(q.shape, self.dtype)](q, k, v)
        return self.out(out.reshape(batch, tokens, width))


# Their derivatives are computed from the input: left to JAX, that of GELU alone would keep four
# more arrays as large as it, and reading those takes longer. Where XLA sees both passes at once (in
# unrolled blocks, or under another checkpoint) it may keep what it likes.
_from_input = functools.partial(jax.checkpoint, prevent_cse=False)


@_from_input
def _gelu(x: jax.Array) -> jax.Array:
    return nnx.gelu(x, approximate=True)


@_from_input
def _gated(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return nnx.silu(a) * b


class GeluMlp(nnx.Module):
    """Linear → GELU (tanh) → Linear, hidden width 4·D."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, 4 * width)
        self.fc2 = linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_gelu(self.fc1(x)))


class SwiGlu(nnx.Module):
    """`W3(silu(a)·b)` with `[a, b] = W12 x`, hidden width int(2/3·4·D) (LightningDiT)."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = int(2 / 3 * int(4 * width))
        linear = functools.partial(Linear, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.w12 = linear(width, 2 * hidden)
        self.w3 = linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w3(_gated(self.w12(x)))


class Block(nnx.Module):
    """One adaLN-zero transformer block: gated attention, then gated MLP (DiT, Fig. 3)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        norm: str,
        mlp: str,
        qk_norm: bool,
        shift: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.shift = shift
        self.norm1 = make_norm(norm, width)
        self.attention = Attention(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.norm2 = make_norm(norm, width)
        self.mlp = (SwiGlu if mlp == "swiglu" else GeluMlp)(width, dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(
            width, (6 if shift else 4) * width, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, c: jax.Array, tables: tuple[np.ndarray, np.ndarray] | None
    ) -> jax.Array:
        m = self.modulation(nnx.silu(c)).astype(jnp.float32)
        shift1: jax.Array | None = None
        shift2: jax.Array | None = None
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(m, 6, axis=-1)
        else:
            scale1, gate1, scale2, gate2 = jnp.split(m, 4, axis=-1)
        h = self.attention(modulate(self.norm1(x), shift1, scale1), tables)
        x = x + gate1[:, None] * h.astype(jnp.float32)
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2[:, None] * h.astype(jnp.float32)


class Head(nnx.Module):
    """Norm, modulate and project tokens to patches: the "final layer" of DiT, used twice in IG."""

    def __init__(
        self, width: int, out: int, *, norm: str, zero: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        init = zeros if zero else xavier
        self.norm = make_norm(norm, width)
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.linear = Linear(width, out, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.modulation(nnx.silu(c)).astype(jnp.float32), 2, axis=-1)
        return self.linear(modulate(self.norm(x), shift, scale)).astype(jnp.float32)


class TimeEmbedding(nnx.Module):
    """256 sinusoidal features → Linear → SiLU → Linear, kept in float32 throughout."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, kernel_init=normal(0.02), rngs=rngs)
        self.hidden = linear(256, width)
        self.out = linear(width, width)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.out(nnx.silu(self.hidden(time_frequencies(t))))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) → (B, H/p·W/p, p·p·C): raster order, (p_row, p_col, channel) inside."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(tokens: jax.Array, patch: int) -> jax.Array:
    """Inverse of `patchify` for square inputs."""
    batch, count, features = tokens.shape
    side, channels = round(count**0.5), features // patch**2
    x = tokens.reshape(batch, side, side, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * patch, side * patch, channels)
