"""The diffusion transformer with a final and an auxiliary head: SiT, DiT and LightningDiT as
options of one network. Pure: a latent, a time and a label in, both heads' predictions out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ig_jax.errors import InputError
from ig_jax.models import functional, layers, sizes
from ig_jax.models.functional import Params
from ig_jax.models.network import Heads, declare

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _whole(stack: str, layer: Params) -> Params:
    del stack
    return layer


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy for `gather`: without it the backward pass would keep all blocks gathered.

    Casts are repeated too, since matrix products keep their operands as cast copies.
    """
    return primitive.name not in ("all_gather", "convert_element_type")


@dataclasses.dataclass(frozen=True)
class DiTSpec:
    """Everything that fixes the architecture (not its weights, precision or compilation).

    Attributes:
        input_size: height and width of the input, in latent pixels.
        channels: input (and output) channels.
        patch_size: side of a token, in latent pixels.
        width, depth, heads: transformer size.
        num_classes: number of labels; label `num_classes` is the null label ∅.
        auxiliary_depths: number of blocks before each auxiliary head, increasing, 1…depth−1; empty
            for no such head.
        norm, mlp, rope: see `sizes.Family`.
        qk_norm: RMS norm on queries and keys.
        shift: whether adaLN has shifts (6 chunks) or not (4).
        learned_sigma: whether the final head also predicts a variance (DiT, old SiT).
        zero_auxiliary: whether the auxiliary head is initialised to zero.
        family: the published family (`sizes.FAMILIES`), which says on what path the network was
            trained and what it predicts; it changes nothing in the network itself.
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
        sizes.family(self.family)
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
        if not isinstance(self.auxiliary_depths, tuple):
            raise InputError(f"auxiliary_depths is {self.auxiliary_depths!r}: expected a tuple")
        bounds = (0, *self.auxiliary_depths, self.depth)
        if not all(low < high for low, high in itertools.pairwise(bounds)):
            raise InputError(
                f"auxiliary_depths is {self.auxiliary_depths}: expected increasing numbers in "
                f"1…{self.depth - 1} for {self.depth} blocks (or none, for no auxiliary head)"
            )

    @property
    def stacks(self) -> tuple[tuple[str, int], ...]:
        """Name and number of blocks of each stack; an auxiliary head follows all but the last."""
        between = (f"between_{i}" for i in range(1, len(self.auxiliary_depths)))
        names = ("before", *between, "after")[: len(self.auxiliary_depths) + 1]
        bounds = itertools.pairwise((0, *self.auxiliary_depths, self.depth))
        return tuple((name, high - low) for name, (low, high) in zip(names, bounds, strict=True))

    @property
    def auxiliary_heads(self) -> tuple[str, ...]:
        """Name of each auxiliary head; the first one's is that of a network with one head."""
        later = (f"auxiliary_head_{i}" for i in range(2, len(self.auxiliary_depths) + 1))
        return ("auxiliary_head", *later)[: len(self.auxiliary_depths)]

    @property
    def tokens(self) -> int:
        """Number of tokens, (input_size / patch_size)²."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" (∅)."""
        return self.num_classes

    @classmethod
    def of(cls, family: str, size: str, **changes: Any) -> DiTSpec:
        """Builds a published architecture, e.g. `DiTSpec.of("sit", "xl", num_classes=10)`.

        Args:
            family: "sit", "dit" or "lightningdit".
            size: a name of `sizes.SIZES`.
            **changes: fields to set instead of the published ImageNet 256×256 values.

        Returns:
            The spec. Raises `InputError` for unknown names or impossible combinations.
        """
        options = sizes.family(family)
        depth, width, heads, auxiliary_depth = sizes.size(size)
        fields = dict(
            input_size=options.input_size,
            channels=options.channels,
            patch_size=options.patch_size,
            width=width,
            depth=depth,
            heads=heads,
            num_classes=1000,
            auxiliary_depths=(auxiliary_depth,),
            norm=options.norm,
            mlp=options.mlp,
            rope=options.rope,
            zero_auxiliary=options.zero_auxiliary,
            family=family,
        )
        return cls(**(fields | changes))


class DiT(nnx.Module):
    """Diffusion transformer with adaLN-zero blocks and two heads (DiT, arXiv 2212.09748; the second
    head: Internal Guidance, arXiv 2512.24176).

    Args:
        spec: the architecture.
        dtype: dtype of matrix products; parameters are float32 always.
        scan_blocks: compile one block and scan it (fast compiles) or unroll all blocks.
        remat: "none", "full" (recompute whole blocks) or "dots" (keep matrix products).
        rngs: random stream of the initialisation.
    """

    def __init__(
        self,
        spec: DiTSpec,
        *,
        dtype: jnp.dtype = jnp.float32,
        scan_blocks: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        self.scan_blocks = scan_blocks
        self.remat = remat
        patch = spec.patch_size**2
        self.patch_embed = nnx.Linear(
            patch * spec.channels, spec.width, kernel_init=layers.xavier, dtype=dtype, rngs=rngs
        )
        convolution = (spec.patch_size, spec.patch_size, spec.channels, spec.width)
        declare(self.patch_embed.kernel, unflattened=convolution)
        self.time_embed = layers.TimeEmbedding(spec.width, rngs=rngs)
        self.label_embed = nnx.Embed(
            spec.num_classes + 1, spec.width, embedding_init=layers.normal(0.02), rngs=rngs
        )
        declare(self.label_embed, table=True)
        # A parameter that gets no gradient: published LightningDiT checkpoints carry a table that
        # weight decay has shrunk, so it must be stored with the weights rather than recomputed.
        side = spec.input_size // spec.patch_size
        self.position = nnx.Param(jnp.asarray(layers.position_table(side, spec.width)))
        declare(self.position, fixed=True)
        # Cut into stacks, so that the auxiliary heads can read the stream between them.
        for name, depth in spec.stacks:
            setattr(self, name, self._stack(depth, dtype, rngs))
        heads = dict(width=spec.width, norm=spec.norm, dtype=dtype, rngs=rngs)
        out = patch * spec.channels
        for index, name in enumerate(spec.auxiliary_heads):
            head = layers.Head(out=out, zero=spec.zero_auxiliary, **heads)
            declare(head, head=index)
            setattr(self, name, head)
        self.final_head = layers.Head(out=out * (1 + spec.learned_sigma), zero=True, **heads)

    def _stack(self, depth: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> layers.Block:
        """Makes `depth` blocks as one module whose parameters have a leading layer axis."""
        spec = self.spec

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> layers.Block:
            return layers.Block(
                spec.width,
                spec.heads,
                norm=spec.norm,
                mlp=spec.mlp,
                qk_norm=spec.qk_norm,
                shift=spec.shift,
                dtype=dtype,
                rngs=rngs,
            )

        stack = make(rngs)
        declare(stack, stacked=True)
        return stack

    def _run(
        self, name: str, x: jax.Array, c: jax.Array, gather: Callable[[str, Params], Params]
    ) -> jax.Array:
        """Runs the named stack of blocks over tokens x (B, N, D) with condition c (B, D)."""
        spec = self.spec
        tables = None
        if spec.rope:
            side = spec.input_size // spec.patch_size
            tables = layers.rotary_tables(side, spec.width // spec.heads)

        # Scanned as pure functions of the layers' parameters: unlike `nnx.scan`, this also works
        # where the model was built outside the trace, such as inside a sampler's own `lax.scan`.
        graphdef, parameters = functional.split(getattr(self, name))

        def body(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
            return functional.merge(graphdef, gather(name, layer))(x, c, tables), None

        if self.remat != "none" or gather is not _whole:
            policy = _save_all_but_gathered if self.remat == "none" else REMAT_POLICIES[self.remat]
            # Unrolled blocks are within reach of XLA's search for common subexpressions, which
            # would undo the recomputation; a loop's two bodies are not.
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.scan_blocks)
        return jax.lax.scan(body, x, parameters, unroll=1 if self.scan_blocks else True)[0]

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        *,
        upto: int | None = None,
        gather: Callable[[str, Params], Params] = _whole,
    ) -> Heads:
        """Predicts from noisy inputs; see `network.Network`.

        Args:
            x: (B, H, W, C) noisy latents.
            t: (B,) times as the network expects them: [0, 1] for SiT and LightningDiT, integer
                steps 0…999 for DiT (`Interpolant.network_time` converts).
            y: (B,) int32 labels; `num_classes` is the null label.
            upto: None for all heads, or the index of the auxiliary head to stop after.
            gather: `gather(stack, layer)` makes whole what is stored in pieces of one block of the
                named stack. It is called inside the scan, and again in the backward pass, so that
                the whole parameters of one block at a time are in memory.

        Returns:
            `Heads` of float32 arrays shaped like x. Raises `InputError` for a wrong shape, or if
            there is no such auxiliary head.
        """
        spec = self.spec
        self._check(x, upto)
        c = self.time_embed(t) + self.label_embed(y)
        tokens = self.patch_embed(layers.patchify(x, spec.patch_size)).astype(jnp.float32)
        tokens = tokens + jax.lax.stop_gradient(self.position[...])
        auxiliary: tuple[jax.Array, ...] = ()
        for (stack, _), name in zip(spec.stacks, spec.auxiliary_heads, strict=False):
            tokens = self._run(stack, tokens, c, gather)
            head = getattr(self, name)
            auxiliary += (layers.unpatchify(head(tokens, c), spec.patch_size),)
            if len(auxiliary) - 1 == upto:
                return Heads(None, auxiliary)
        tokens = self._run(spec.stacks[-1][0], tokens, c, gather)
        final = layers.unpatchify(self.final_head(tokens, c), spec.patch_size)
        variance = None
        if spec.learned_sigma:
            final, variance = jnp.split(final, 2, axis=-1)
        return Heads(final, auxiliary, variance)

    def _check(self, x: jax.Array, upto: int | None) -> None:
        spec = self.spec
        expected = (spec.input_size, spec.input_size, spec.channels)
        if x.shape[1:] != expected:
            raise InputError(f"input has shape {x.shape[1:]}: this model expects {expected} (HWC)")
        count = len(spec.auxiliary_depths)
        if upto is not None and not 0 <= upto < count:
            raise InputError(
                f"upto is {upto}: expected the index of one of {count} auxiliary heads, or None"
            )


def abstract(spec: DiTSpec, **options: Any) -> DiT:
    """Builds a `DiT` of shapes only (no arrays are made), for loading weights or compiling."""
    return nnx.eval_shape(lambda: DiT(spec, **options, rngs=nnx.Rngs(0)))


def add_heads(params: Params, spec: DiTSpec, wanted: DiTSpec, fresh: Params) -> Params:
    """Gives a network further auxiliary heads; pure, so that a training run can start with it.

    Args:
        params: nested dict of the parameters of a network of `spec`.
        spec: its architecture.
        wanted: the same with more auxiliary heads.
        fresh: nested dict of a newly made network of `wanted`. Only the heads that `spec` lacks are
            taken from it; the rest may be shapes.

    Returns:
        `params` with its blocks cut into stacks anew, and those heads of `fresh`. Raises
        `InputError` if `wanted` lacks a head that `spec` has.
    """
    if wanted.auxiliary_depths == spec.auxiliary_depths:
        return params
    own = dict(zip(spec.auxiliary_depths, spec.auxiliary_heads, strict=True))
    if not set(own) <= set(wanted.auxiliary_depths):
        raise InputError(
            f"auxiliary_depths is {wanted.auxiliary_depths}: expected {spec.auxiliary_depths}, "
            "where the network has heads already, and more"
        )
    names = {*own.values(), *(name for name, _ in spec.stacks)}
    extended = {name: part for name, part in params.items() if name not in names}
    for depth, name in zip(wanted.auxiliary_depths, wanted.auxiliary_heads, strict=True):
        extended[name] = params[own[depth]] if depth in own else fresh[name]
    stacks = [params[name] for name, _ in spec.stacks]
    blocks = stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *stacks)
    first = 0
    for name, count in wanted.stacks:
        extended[name] = jax.tree.map(lambda a, i=first, n=count: a[i : i + n], blocks)
        first += count
    return extended


def forward_flops(spec: DiTSpec) -> int:
    """FLOPs of one forward pass of one image, two per multiply-add, matrix products only.

    Per block: qkv and output projections 4·N·D², attention 2·N²·D, MLP 8·N·D² (GELU) or 3·N·D·H
    (SwiGLU), adaLN 6·D² (or 4·D²); plus embeddings and heads.
    """
    n, d = spec.tokens, spec.width
    hidden = int(2 / 3 * int(4 * d))
    mlp = 3 * n * d * hidden if spec.mlp == "swiglu" else 8 * n * d * d
    block = 4 * n * d * d + 2 * n * n * d + mlp + (6 if spec.shift else 4) * d * d
    out = spec.patch_size**2 * spec.channels
    heads = 2 * d * d + n * d * out * (1 + spec.learned_sigma)
    heads += len(spec.auxiliary_depths) * (2 * d * d + n * d * out)
    return 2 * (spec.depth * block + heads + n * d * out + 256 * d + d * d)


def parameter_count(params: Any) -> int:
    """Number of scalars in a pytree of arrays or shape structs."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)))
