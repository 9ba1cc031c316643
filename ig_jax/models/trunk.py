"""Blocks in stacks, with an auxiliary head after all stacks but the last: what the networks here
share. A stack is scanned, so that it compiles as one block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ig_jax.errors import InputError
from ig_jax.models import functional, layers
from ig_jax.models.functional import Params
from ig_jax.models.network import Spec, declare

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(layers.ATTENDED),
    ),
}

# gather(stack, layer): makes whole what is stored in pieces of one block of the named stack.
Gather = Callable[[str, Params], Params]


def whole(stack: str, layer: Params) -> Params:
    """The `Gather` of parameters that are whole already."""
    del stack
    return layer


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy for `gather`: without it the backward pass would keep all blocks gathered.

    Casts are repeated too, since matrix products keep their operands as cast copies.
    """
    return primitive.name not in ("all_gather", "convert_element_type")


class TrunkSpec(Spec):
    """Base of the architecture of a `Trunk`: `depth` blocks, cut where auxiliary heads read."""

    width: int
    depth: int

    def check_depths(self) -> None:
        """Raises `InputError` unless the heads' depths increase within 1…depth − 1."""
        if not isinstance(self.auxiliary_depths, tuple):
            raise InputError(f"auxiliary_depths is {self.auxiliary_depths!r}: expected a tuple")
        bounds = (0, *self.auxiliary_depths, self.depth)
        if not all(low < high for low, high in itertools.pairwise(bounds)):
            raise InputError(
                f"auxiliary_depths is {self.auxiliary_depths}: expected increasing numbers in "
                f"1…{self.depth - 1} for {self.depth} blocks (or none, for no auxiliary head)"
            )

    @property
    def summary(self) -> str:
        """Name and size."""
        return f"{self.family} {self.depth}x{self.width}"

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


class Trunk(nnx.Module):
    """Base of networks of stacked blocks; a subclass embeds inputs and has the final head.

    Args:
        spec: the architecture.
        dtype: dtype of matrix products; parameters are float32 always.
        scan_blocks: compile one block of a stack and scan it (fast compiles) or unroll all blocks.
        remat: "none", "full" (recompute whole blocks) or "dots" (keep matrix products).
    """

    def __init__(self, spec: TrunkSpec, *, dtype: jnp.dtype, scan_blocks: bool, remat: str):
        self.spec = spec
        self.dtype = dtype
        self.scan_blocks = scan_blocks
        self.remat = remat
        # What a converted checkpoint held beside parameters, for the way back; static.
        self.carried: tuple[Any, ...] = ()

    def add_conditioning(self, rngs: nnx.Rngs) -> None:
        """Makes the embeddings of times and labels."""
        spec = self.spec
        self.time_embed = layers.TimeEmbedding(spec.width, rngs=rngs)
        self.label_embed = nnx.Embed(
            spec.num_classes + 1, spec.width, embedding_init=layers.normal(0.02), rngs=rngs
        )
        declare(self.label_embed, table=True)

    def condition(self, t: jax.Array, y: jax.Array) -> jax.Array:
        """What every block and head is conditioned on, (B, D), from times (B,) and labels (B,)."""
        return self.time_embed(t) + self.label_embed(y)

    def add_stacks(self, make_block: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> None:
        """Makes the stacks: modules of one block whose parameters have a leading layer axis."""
        for name, depth in self.spec.stacks:
            make = nnx.vmap(make_block, in_axes=(0,), out_axes=0)
            stack = nnx.split_rngs(splits=depth)(make)(rngs)
            declare(stack, stacked=True)
            setattr(self, name, stack)

    def make_auxiliary_head(self, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh auxiliary head, a function of the stream and the condition."""
        raise NotImplementedError

    def add_auxiliary_heads(self, rngs: nnx.Rngs) -> None:
        """Makes all auxiliary heads."""
        for index, name in enumerate(self.spec.auxiliary_heads):
            head = self.make_auxiliary_head(rngs)
            declare(head, head=index)
            setattr(self, name, head)

    def run(
        self, x: jax.Array, c: jax.Array, *constants: Any, upto: int | None, gather: Gather
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Runs all blocks, or those up to an auxiliary head.

        Args:
            x: (B, N, D) tokens.
            c: (B, D) conditions.
            *constants: further arguments of every block.
            upto: index of the auxiliary head to stop after, or None. Raises `InputError` if there
                is no such head.
            gather: called inside the scan, and again in the backward pass, so that the whole
                parameters of one block at a time are in memory.

        Returns:
            The auxiliary heads' outputs, and the stream after the last block (None if stopped).
        """
        count = len(self.spec.auxiliary_heads)
        if upto is not None and not 0 <= upto < count:
            raise InputError(
                f"upto is {upto}: expected the index of one of {count} auxiliary heads, or None"
            )
        outputs: tuple[jax.Array, ...] = ()
        for (stack, _), head in zip(self.spec.stacks, self.spec.auxiliary_heads, strict=False):
            x = self._run_stack(stack, x, c, constants, gather)
            outputs += (getattr(self, head)(x, c),)
            if len(outputs) - 1 == upto:
                return outputs, None
        return outputs, self._run_stack(self.spec.stacks[-1][0], x, c, constants, gather)

    def _run_stack(
        self, name: str, x: jax.Array, c: jax.Array, constants: tuple[Any, ...], gather: Gather
    ) -> jax.Array:
        # Scanned as pure functions of the layers' parameters: unlike `nnx.scan`, this also works
        # where the model was built outside the trace, such as inside a sampler's own `lax.scan`.
        graphdef, parameters = functional.split(getattr(self, name))

        def body(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
            return functional.merge(graphdef, gather(name, layer))(x, c, *constants), None

        if self.remat != "none" or gather is not whole:
            policy = _save_all_but_gathered if self.remat == "none" else REMAT_POLICIES[self.remat]
            # Unrolled blocks, and a single one, are within reach of XLA's search for common
            # subexpressions, which would undo the recomputation; a loop's two bodies are not.
            looped = self.scan_blocks and dict(self.spec.stacks)[name] > 1
            body = jax.checkpoint(body, policy=policy, prevent_cse=not looped)
        return jax.lax.scan(body, x, parameters, unroll=1 if self.scan_blocks else True)[0]


def add_heads(params: Params, spec: TrunkSpec, wanted: TrunkSpec, fresh: Params) -> Params:
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
