"""The diffusion transformer with auxiliary heads: SiT, DiT and LightningDiT as options of one
network. Pure: a latent, a time and a label in, all heads' predictions out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ig_jax import recipes
from ig_jax.errors import InputError, look_up
from ig_jax.models import layers
from ig_jax.models.network import Heads, declare
from ig_jax.models.trunk import Gather, Trunk, TrunkSpec, whole

PUBLISHED_FAMILIES = ("sit", "dit", "lightningdit")


@dataclasses.dataclass(frozen=True)
class DiTSpec(TrunkSpec):
    """Everything that fixes the architecture (not its weights, precision or compilation).

    Attributes:
        input_size: height and width of the input, in latent pixels.
        channels: input (and output) channels.
        patch_size: side of a token, in latent pixels.
        width, depth, heads: transformer size.
        num_classes: number of labels; label `num_classes` is the null label ∅.
        auxiliary_depths: number of blocks before each auxiliary head, increasing, 1…depth−1; empty
            for no such head.
        norm: "layer" (no affine) or "rms" (with weight).
        mlp: "gelu" (tanh approximation) or "swiglu".
        rope: whether queries and keys are rotated by the 2-D token position.
        qk_norm: RMS norm on queries and keys.
        shift: whether adaLN has shifts (6 chunks) or not (4).
        learned_sigma: whether the final head also predicts a variance (DiT, old SiT).
        zero_auxiliary: whether the auxiliary head is initialised to zero.
        family: the network's name, which says on what path it was trained and what it predicts; it
            changes nothing in the network itself.
    """

    input_size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    heads: int
    num_classes: int
    auxiliary_depths: tuple[int, ...]
    norm: str = "layer"
    mlp: str = "gelu"
    rope: bool = False
    qk_norm: bool = False
    shift: bool = True
    learned_sigma: bool = False
    zero_auxiliary: bool = True
    family: str = "sit"

    def __post_init__(self) -> None:
        for field in ("input_size", "channels", "patch_size", "width", "depth", "heads"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}: expected at least 1")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise InputError(f"width {self.width} is not divisible by 4 (2-D sin-cos positions)")
        if self.rope and (self.width // self.heads) % 4:
            raise InputError(
                f"head width {self.width // self.heads} is not divisible by 4 (2-D rotary)"
            )
        if self.input_size % self.patch_size:
            raise InputError(
                f"image size {self.input_size} is not divisible by patch size {self.patch_size}"
            )
        self.check_depths()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one input."""
        return (self.input_size, self.input_size, self.channels)

    @property
    def summary(self) -> str:
        """Name, size and patch, as papers write them."""
        return f"{super().summary}/{self.patch_size}"

    @property
    def tokens(self) -> int:
        """Number of tokens, (input_size / patch_size)²."""
        return (self.input_size // self.patch_size) ** 2

    def forward_flops(self) -> int:
        """FLOPs of one forward pass of one image, two per multiply-add, matrix products only.

        Per block: qkv and output projections 4·N·D², attention 2·N²·D, MLP 8·N·D² (GELU) or 3·N·D·H
        (SwiGLU), adaLN 6·D² (or 4·D²); plus embeddings and heads.
        """
        n, d = self.tokens, self.width
        hidden = int(2 / 3 * int(4 * d))
        mlp = 3 * n * d * hidden if self.mlp == "swiglu" else 8 * n * d * d
        block = 4 * n * d * d + 2 * n * n * d + mlp + (6 if self.shift else 4) * d * d
        out = self.patch_size**2 * self.channels
        heads = 2 * d * d + n * d * out * (1 + self.learned_sigma)
        heads += len(self.auxiliary_depths) * (2 * d * d + n * d * out)
        return 2 * (self.depth * block + heads + n * d * out + 256 * d + d * d)

    @classmethod
    def of(cls, family: str, size: str, **changes: Any) -> DiTSpec:
        """Builds a published architecture, e.g. `DiTSpec.of("sit", "xl", num_classes=10)`.

        Args:
            family: "sit", "dit" or "lightningdit".
            size: a name of `recipes.SIZES`.
            **changes: fields to set instead of the published ImageNet 256×256 values.

        Returns:
            The spec. Raises `InputError` for unknown names or impossible combinations.
        """
        row, named = published_family(family), recipes.size(size)
        fields: dict[str, Any] = dict(
            width=named.width,
            depth=named.depth,
            heads=named.heads,
            num_classes=1000,
            auxiliary_depths=(named.auxiliary_depth,),
            family=family,
        )
        return cls(**{**fields, **row.config["model"], **row.network, **changes})


def published_family(name: str) -> recipes.Family:
    """The recipe of a family of transformers; raises `InputError` naming the known ones."""
    return look_up({k: recipes.FAMILIES[k] for k in PUBLISHED_FAMILIES}, name, "model")


class DiT(Trunk):
    """Diffusion transformer with adaLN-zero blocks (DiT paper, §3.2), a final head and any number
    of auxiliary heads between blocks (IG paper, §3.1).

    Args:
        spec: the architecture.
        dtype: dtype of matrix products; parameters are float32 always.
        scan_blocks, remat: see `Trunk`.
        rngs: random stream of the initialisation.
    """

    spec: DiTSpec

    def __init__(
        self,
        spec: DiTSpec,
        *,
        dtype: jnp.dtype = jnp.float32,
        scan_blocks: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        super().__init__(spec, dtype=dtype, scan_blocks=scan_blocks, remat=remat)
        patch = spec.patch_size**2
        self.patch_embed = layers.Linear(
            patch * spec.channels, spec.width, kernel_init=layers.xavier, dtype=dtype, rngs=rngs
        )
        convolution = (spec.patch_size, spec.patch_size, spec.channels, spec.width)
        declare(self.patch_embed.kernel, unflattened=convolution)
        self.add_conditioning(rngs)
        # A parameter that gets no gradient: published LightningDiT checkpoints carry a table that
        # weight decay has shrunk, so it must be stored with the weights rather than recomputed.
        side = spec.input_size // spec.patch_size
        self.position = nnx.Param(jnp.asarray(layers.position_table(side, spec.width)))
        declare(self.position, fixed=True)
        block: dict[str, Any] = dict(
            norm=spec.norm, mlp=spec.mlp, qk_norm=spec.qk_norm, shift=spec.shift
        )
        self.add_stacks(
            lambda rngs: layers.Block(spec.width, spec.heads, **block, dtype=dtype, rngs=rngs), rngs
        )
        self.add_auxiliary_heads(rngs)
        self.final_head = self._head(1 + spec.learned_sigma, True, rngs)

    def _head(self, times: int, zero: bool, rngs: nnx.Rngs) -> layers.Head:
        spec = self.spec
        out = spec.patch_size**2 * spec.channels * times
        return layers.Head(spec.width, out, norm=spec.norm, zero=zero, dtype=self.dtype, rngs=rngs)

    def make_auxiliary_head(self, rngs: nnx.Rngs) -> layers.Head:
        """A fresh auxiliary head, initialised from `rngs`."""
        return self._head(1, self.spec.zero_auxiliary, rngs)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        *,
        upto: int | None = None,
        gather: Gather = whole,
    ) -> Heads:
        """Predicts from noisy inputs; see `network.Network`.

        Args:
            x: (B, H, W, C) noisy latents.
            t: (B,) times as the network expects them: [0, 1] for SiT and LightningDiT, integer
                steps 0…999 for DiT (`Interpolant.network_time` converts).
            y: (B,) int32 labels; `num_classes` is the null label.
            upto: None for all heads, or the index of the auxiliary head to stop after.
            gather: see `Trunk.run`.

        Returns:
            `Heads` of float32 arrays shaped like x. Raises `InputError` for a wrong shape, or if
            there is no such auxiliary head.
        """
        spec = self.spec
        if x.shape[1:] != spec.shape:
            raise InputError(
                f"input has shape {x.shape[1:]}: this model expects {spec.shape} (HWC)"
            )
        c = self.condition(t, y)
        tokens = self.patch_embed(layers.patchify(x, spec.patch_size)).astype(jnp.float32)
        tokens = tokens + jax.lax.stop_gradient(self.position[...])
        tables = None
        if spec.rope:
            side = spec.input_size // spec.patch_size
            tables = layers.rotary_tables(side, spec.width // spec.heads)
        outputs, last = self.run(tokens, c, tables, upto=upto, gather=gather)
        auxiliary = tuple(layers.unpatchify(output, spec.patch_size) for output in outputs)
        if last is None:
            return Heads(None, auxiliary)
        final = layers.unpatchify(self.final_head(last, c), spec.patch_size)
        variance = None
        if spec.learned_sigma:
            final, variance = jnp.split(final, 2, axis=-1)
        return Heads(final, auxiliary, variance)
