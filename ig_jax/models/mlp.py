"""A small residual network on vectors, with auxiliary heads like the transformer's: internal
guidance where everything can be seen, as on points of the plane (IG paper, Fig. 2)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ig_jax.errors import InputError
from ig_jax.models import layers
from ig_jax.models.network import Heads
from ig_jax.models.trunk import Gather, Trunk, TrunkSpec, whole

# Octaves of the sines that the embedding sees beside the vector itself: without them, and as layer
# norm is blind to length, a small network blurs whatever is finer than the data's spread.
_OCTAVES = 7
# What is fine is learned at little noise, where t hardly changes, but its logarithm does. This near
# to either end all times look alike.
_MARGIN = 1e-3


@dataclasses.dataclass(frozen=True)
class MLPSpec(TrunkSpec):
    """Everything that fixes the architecture.

    Attributes:
        channels: D, the length of a vector.
        width, depth: of the stream, and number of residual blocks.
        num_classes: number of labels; label `num_classes` is the null label ∅.
        auxiliary_depths: number of blocks before each auxiliary head, increasing, 1…depth−1.
        family: the network's name.
    """

    channels: int
    width: int
    depth: int
    num_classes: int
    auxiliary_depths: tuple[int, ...] = ()
    family: str = "mlp"

    def __post_init__(self) -> None:
        for field in ("channels", "width", "depth"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}: expected at least 1")
        self.check_depths()

    @property
    def shape(self) -> tuple[int]:
        """(D,) of one input."""
        return (self.channels,)

    def forward_flops(self) -> int:
        """FLOPs of one forward pass of one vector, two per multiply-add, matrix products only."""
        w, d = self.width, self.channels
        heads = (1 + len(self.auxiliary_depths)) * (2 * w * w + w * d)
        embeddings = w * d * (1 + 2 * _OCTAVES) + 256 * w + w * w
        return 2 * (self.depth * 11 * w * w + heads + embeddings)


class Block(nnx.Module):
    """One residual block, gated and modulated by the condition like a transformer's MLP."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = layers.LayerNorm()
        self.mlp = layers.GeluMlp(width, dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(
            width, 3 * width, kernel_init=layers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        m = self.modulation(nnx.silu(c)).astype(jnp.float32)
        shift, scale, gate = jnp.split(m, 3, axis=-1)
        h = self.mlp(layers.modulate(self.norm(x), shift, scale))
        return x + gate[:, None] * h.astype(jnp.float32)


class MLP(Trunk):
    """Residual network of vectors, which it treats as a transformer would a single token.

    Args:
        spec: the architecture.
        dtype: dtype of matrix products; parameters are float32 always.
        scan_blocks, remat: see `Trunk`.
        rngs: random stream of the initialisation. Blocks start as identities, heads at zero.
    """

    spec: MLPSpec

    def __init__(
        self,
        spec: MLPSpec,
        *,
        dtype: jnp.dtype = jnp.float32,
        scan_blocks: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        super().__init__(spec, dtype=dtype, scan_blocks=scan_blocks, remat=remat)
        width = spec.width
        self.embed = nnx.Linear(
            spec.channels * (1 + 2 * _OCTAVES),
            width,
            kernel_init=layers.xavier,
            dtype=dtype,
            rngs=rngs,
        )
        self.add_conditioning(rngs)
        self.add_stacks(lambda rngs: Block(width, dtype=dtype, rngs=rngs), rngs)
        self.add_auxiliary_heads(rngs)
        self.final_head = self.make_auxiliary_head(rngs)

    def make_auxiliary_head(self, rngs: nnx.Rngs) -> layers.Head:
        """A fresh auxiliary head, initialised from `rngs`."""
        width, channels = self.spec.width, self.spec.channels
        return layers.Head(width, channels, norm="layer", zero=True, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        *,
        upto: int | None = None,
        gather: Gather = whole,
    ) -> Heads:
        """Predicts from noisy vectors x (B, D), times t (B,) and labels y (B,); see `Network`.

        Returns:
            `Heads` of float32 arrays shaped like x. Raises `InputError` for a wrong shape, or if
            there is no such auxiliary head.
        """
        if x.shape[1:] != self.spec.shape:
            raise InputError(
                f"input has shape {x.shape[1:]}: this model expects {self.spec.shape} (vectors)"
            )
        c = self.condition(jnp.log((t + _MARGIN) / (1 - t + _MARGIN)), y)
        angles = x[..., None] * (jnp.pi * 2.0 ** jnp.arange(-1, _OCTAVES - 1))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        seen = jnp.concatenate([x, *jnp.moveaxis(waves, -1, 0)], axis=-1)
        token = self.embed(seen).astype(jnp.float32)[:, None]
        outputs, last = self.run(token, c, upto=upto, gather=gather)
        auxiliary = tuple(output[:, 0] for output in outputs)
        return Heads(None if last is None else self.final_head(last, c)[:, 0], auxiliary)
