"""What the rest of the house knows of a network: the heads it returns, and what it declares of its
parameters beyond their shapes. Nothing outside a network's own file asks for a parameter's name."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from ig_jax.models.functional import Params

# A nested dict like the parameters, with a `Parameter` for each array.
Layout = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of one parameter: its shape, and what its network declares of it.

    A parameter of two or more axes (beside that of the layers) is a matrix: a kernel, whose last
    axes are (in, out), or a table. Attributes:
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


def declare(part: nnx.Module | nnx.Variable, **facts: Any) -> None:
    """Declares facts (fields of `Parameter`) of a parameter, or of all parameters of a module."""
    for _, node in nnx.iter_graph(part):
        if isinstance(node, nnx.Variable):
            node.set_metadata(declared=dataclasses.replace(_declared(node), **facts))


def _declared(variable: nnx.Variable) -> Parameter:
    return variable.get_metadata().get("declared", Parameter())


def layout(graphdef: nnx.GraphDef, params: Params) -> Layout:
    """What a network knows of its parameters.

    Args:
        graphdef: of the network.
        params: nested dict of its arrays, or of their shapes.

    Returns:
        The nested dict with a `Parameter` in place of each array.
    """
    state = nnx.state(nnx.merge(graphdef, params))
    return nnx.to_pure_dict(state, lambda v: dataclasses.replace(_declared(v), shape=v.shape))
