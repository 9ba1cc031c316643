"""The networks there are: `NETWORKS`, a row each. A row added from outside is trained, sampled and
converted into workdirs like ours (`config.model.family` names it)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ig_jax import recipes
from ig_jax.errors import InputError, look_up
from ig_jax.models import functional
from ig_jax.models.dit import PUBLISHED_FAMILIES, DiT, DiTSpec
from ig_jax.models.mlp import MLP, MLPSpec
from ig_jax.models.network import Spec
from ig_jax.models.trunk import Trunk, add_heads


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of `NETWORKS`.

    Attributes:
        spec: class of the architectures, a `network.Spec` and frozen dataclass. Its fields are
            taken from the options of the same names; options that it has no field for (`patch_size`
            for a network of vectors) mean nothing to it.
        module: `module(spec, *, dtype, scan_blocks, remat, rngs)`, a `network.Network`. One with
            stacked parameters also takes the argument `gather` (`trunk.Gather`) when it is called.
        fixed: values of fields that are not options, but what sets this family apart.
    """

    spec: type[Spec]
    module: Callable[..., nnx.Module]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NETWORKS: dict[str, Family] = {
    **{name: Family(DiTSpec, DiT, recipes.FAMILIES[name].network) for name in PUBLISHED_FAMILIES},
    "mlp": Family(MLPSpec, MLP),
}


def family(name: str) -> Family:
    """Returns the row called `name`; raises `InputError` naming the known ones."""
    return look_up(NETWORKS, name, "model")


def make_spec(name: str, options: Mapping[str, Any]) -> Spec:
    """The architecture of a family with these options.

    Args:
        name: a name of `NETWORKS`.
        options: values for the fields of `Family.spec`, and others, which are left out.

    Returns:
        The spec. Raises `InputError` for an unknown name or an impossible combination.
    """
    row = family(name)
    fields = {field.name for field in dataclasses.fields(row.spec)}
    chosen = {key: value for key, value in options.items() if key in fields}
    return row.spec(**(chosen | dict(row.fixed) | {"family": name}))


def make(spec: Spec, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """A newly initialised network; options are `dtype`, `scan_blocks` and `remat`."""
    return family(spec.family).module(spec, **options, rngs=rngs)


def abstract(spec: Spec, **options: Any) -> Any:
    """A network of shapes only (no arrays are made), for loading weights or compiling."""
    return functional.merge(*_abstract(family(spec.family).module, spec, tuple(options.items())))


@functools.lru_cache(maxsize=64)
def _abstract(
    module: Callable[..., nnx.Module], spec: Spec, options: tuple[tuple[str, Any], ...]
) -> tuple[nnx.GraphDef[Any], functional.Params]:
    """A network's graph definition and shapes: many configs in a process describe the same one."""
    return functional.split(nnx.eval_shape(lambda: module(spec, **dict(options), rngs=nnx.Rngs(0))))


def add_auxiliary_head(model: Trunk, depth: int, rngs: nnx.Rngs) -> Trunk:
    """Gives a model a fresh auxiliary head: how to add IG to a trained network.

    Args:
        model: a model without a head there; it is left as it is.
        depth: number of blocks before the head, 1…depth−1 (the paper: a third of them).
        rngs: random stream of the head, where its family does not start it at zero.

    Returns:
        A model whose other predictions are the same. Raises `InputError` if the model has an
        auxiliary head there already, or for a depth out of range.
    """
    spec = model.spec
    if depth in spec.auxiliary_depths:
        raise InputError(f"the model has an auxiliary head after block {depth} already")
    depths = tuple(sorted((*spec.auxiliary_depths, depth)))
    wanted = dataclasses.replace(spec, auxiliary_depths=depths)
    options = dict(dtype=model.dtype, scan_blocks=model.scan_blocks, remat=model.remat)
    graphdef, shapes = functional.split(abstract(wanted, **options))
    head = functional.split(model.make_auxiliary_head(rngs))[1]
    fresh = shapes | {wanted.auxiliary_heads[depths.index(depth)]: head}
    params = add_heads(functional.split(model)[1], spec, wanted, fresh)
    extended: Trunk = functional.merge(graphdef, params)
    extended.carried = model.carried
    return extended
