"""Between modules and pure functions: an NNX module is split once into a graph definition and a
plain nested dict of arrays, and merged again inside jitted functions."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Params]:
    """Splits a module into its graph definition and a nested dict of arrays (its parameters)."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef[Any], params: Params) -> Any:
    """Rebuilds the module of `graphdef` around a nested dict of arrays, as `split` returned it."""
    return nnx.merge(graphdef, params)


def parameter_count(params: Any) -> int:
    """Number of scalars in a pytree of arrays or shape structs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
