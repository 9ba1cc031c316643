"""What the rest of the house knows of a network: the heads it returns, and what it declares of its
parameters beyond their shapes. Nothing outside a network's own file asks for a parameter's name."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
from flax import nnx

from ig_jax.models.functional import Params


@flax.struct.dataclass
class Heads:
    """What one forward pass predicts; every array is float32 and shaped like the input, (B, …).

    Attributes:
        final: the final head's output, `D_f`; None where the pass stopped before it.
        auxiliary: the intermediate heads' outputs, `D_i`, in the order of their depth; empty for a
            network without such heads.
        variance: the learned-sigma channels of DiT checkpoints (interpolation weight in [−1, 1]
            between the two variance bounds of Nichol & Dhariwal 2021, eq. 15); None otherwise.
    """

    final: jax.Array | None
    auxiliary: tuple[jax.Array, ...] = ()
    variance: jax.Array | None = None

    @property
    def strong(self) -> jax.Array:
        """`final`, of a pass that did not stop before it."""
        assert self.final is not None, "this forward pass stopped at an auxiliary head"
        return self.final


class Spec:
    """Base of what fixes a network's architecture: subclasses are frozen dataclasses.

    Their fields are named as in `config.model` where they mean the same.

    Attributes:
        family: the network's name (a row of `families.NETWORKS`).
        num_classes: number of labels; label `num_classes` is the null label ∅.
        auxiliary_depths: where the auxiliary heads are, one number for each; empty for none.
        shape: of one input: (H, W, C), or (D,) for vectors.
    """

    family: str
    num_classes: int
    auxiliary_depths: tuple[int, ...]
    # Of every dataclass; declared for those who read a spec's fields without knowing its class.
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" (∅)."""
        return self.num_classes

    @property
    def summary(self) -> str:
        """The network in a few words, for records."""
        return self.family

    def forward_flops(self) -> int:
        """FLOPs of one forward pass of one input, two per multiply-add; 0 if nobody counted."""
        return 0


def difference(found: Spec, expected: Spec) -> tuple[str, Any, Any] | None:
    """The name of the first field in which two architectures differ, and what each has there."""
    for name in ("family", *(field.name for field in dataclasses.fields(found))):
        pair = getattr(found, name, None), getattr(expected, name, None)
        if pair[0] != pair[1]:
            return name, *pair
    return None


class Network(Protocol):
    """A network with its parameters, as losses, guidance and samplers call it."""

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array, *, upto: int | None = None
    ) -> Heads:
        """Predicts from noisy inputs.

        Args:
            x: (B, …) noisy inputs: latents or pixels (B, H, W, C), or vectors (B, D).
            t: (B,) times as the network expects them (`Interpolant.network_time` converts).
            y: (B,) int32 labels; `num_classes` is the null label.
            upto: None for all heads; k to stop after `Heads.auxiliary[k]`, so that `final` is None
                and what lies deeper is not computed.
        """
        ...


# A nested dict like the parameters, with a `Parameter` for each array.
Layout = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of one parameter: its shape, and what its network declares of it.

    A parameter of two or more axes (beside that of the layers) is a matrix: a kernel, whose last
    axes are (in, out), or a table.

    Attributes:
        shape: as it is stored.
        stacked: whether its first axis counts layers, which are scanned.
        fixed: whether it gets no gradient; it is stored since published weights differ in it.
        table: whether its rows are outputs, as in PyTorch, and not its columns.
        unflattened: the shape (…, in, out) of the convolution kernel that this matrix is, flattened
            to (… · in, out); None if it is no convolution.
        head: the auxiliary head it belongs to (its index in `Heads.auxiliary`); None for all else.
    """

    shape: tuple[int, ...] = ()
    stacked: bool = False
    fixed: bool = False
    table: bool = False
    unflattened: tuple[int, ...] | None = None
    head: int | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it has two or more axes beside that of the layers."""
        return len(self.shape) - self.stacked >= 2


def declare(part: nnx.Module | nnx.Variable[Any], **facts: Any) -> None:
    """Declares facts (fields of `Parameter`) of a parameter, or of all parameters of a module."""
    for _, node in nnx.iter_graph(part):
        if isinstance(node, nnx.Variable):
            node.set_metadata(declared=dataclasses.replace(_declared(node), **facts))


def _declared(variable: nnx.Variable[Any]) -> Parameter:
    declared: Parameter = variable.get_metadata().get("declared", Parameter())
    return declared


def layout(graphdef: nnx.GraphDef[Any], params: Params) -> Layout:
    """What a network knows of its parameters.

    Args:
        graphdef: of the network.
        params: nested dict of its arrays, or of their shapes.

    Returns:
        The nested dict with a `Parameter` in place of each array.
    """
    state = nnx.state(nnx.merge(graphdef, params))
    return nnx.to_pure_dict(state, lambda v: dataclasses.replace(_declared(v), shape=v.shape))
