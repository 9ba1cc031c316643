"""SiT, DiT and LightningDiT weights between PyTorch's names and layouts and ours, both ways.

The architecture is read off names and shapes, so a checkpoint loads without its config file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ig_jax import recipes
from ig_jax.errors import InputError, suggest
from ig_jax.models import functional, layers, network
from ig_jax.models.dit import DiT, DiTSpec, published_family
from ig_jax.models.families import abstract
from ig_jax.models.network import Layout, Parameter
from ig_jax.storage import weight_files

# Heads that only training needs: REPA's, onto the features of a pretrained encoder.
_TRAINING_HEADS = ("projectors.",)
ROPE_BUFFERS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")

# Our module → the release's, in the release's order.
_EMBEDDINGS = {
    "position": "pos_embed",
    "patch_embed": "x_embedder.proj",
    "time_embed.hidden": "t_embedder.mlp.0",
    "time_embed.out": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "attention.out": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.w12",
    "mlp.w3": "mlp.w3",
    "modulation": "adaLN_modulation.1",
}
_HEAD = {"norm": "norm_final", "linear": "linear", "modulation": "adaLN_modulation.1"}
_LEAVES = {"kernel": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}

# Without these nothing can be said about a network; most of them missing means another family.
_LANDMARKS = (
    "x_embedder.proj.weight",
    "pos_embed",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.linear.weight",
)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One PyTorch tensor and where it lives among our parameters.

    Attributes:
        name: as PyTorch has it.
        path: of the parameter in our nested dict.
        parameter: what the network declares of it, which says how PyTorch lays it out.
        layer: row of a stacked parameter, or None where the parameter is not stacked.
    """

    name: str
    path: tuple[str, ...]
    parameter: Parameter
    layer: int | None = None

    @property
    def _transposed(self) -> bool:
        return self.parameter.is_matrix and not self.parameter.table

    @property
    def shape(self) -> tuple[int, ...]:
        """As PyTorch has it."""
        shape = self.parameter.shape[int(self.parameter.stacked) :]
        if self.parameter.fixed:
            return (1, *shape)
        if self.parameter.unflattened:
            *positions, inputs, outputs = self.parameter.unflattened
            return (outputs, inputs, *positions)
        return shape[::-1] if self._transposed else shape

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view of a PyTorch array in our layout (a stacked parameter's row)."""
        if self.parameter.fixed:
            return array[0]
        if self.parameter.unflattened:  # (D, C, p, p) → (p_row · p_col · C, D)
            return array.transpose(2, 3, 1, 0).reshape(self.parameter.shape)
        return array.T if self._transposed else array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.parameter.fixed:
            return array[None]
        if self.parameter.unflattened:
            return array.reshape(self.parameter.unflattened).transpose(3, 2, 0, 1)
        return array.T if self._transposed else array


def from_pytorch(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    family: str | None = None,
    heads: int | None = None,
    auxiliary_depth: int | Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    scan_blocks: bool = True,
    remat: str = "none",
) -> DiT:
    """Loads a SiT, DiT or LightningDiT checkpoint, with or without an auxiliary head.

    Sizes, patch, channels, classes and options are found from names and shapes, and the position
    table is the checkpoint's own. EMA weights are preferred over raw ones; what wraps the weights
    in a checkpoint or their names (`ema`, `module.`, …) is ignored, and heads that only training
    needs are left out with a warning. What cannot be seen has the paper's values as defaults:

    - The family of a DiT or SiT, which have the same names and shapes. A final head twice as wide
      (learned sigma) without an auxiliary head is taken for a DiT, with a warning since early SiTs
      had one too; all else for a SiT. A LightningDiT always rotates its queries and keys.
    - The number of attention heads, unless q/k norm or rotary buffers show the head width.
    - The depths of auxiliary heads. The release has one, `final_layer_xr`; further ones, which
      `to_pytorch` names `final_layer_xr_2` and so on, are ours.

    Args:
        source: a file (`.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin`, which need PyTorch and
            are read without running code), or its content: arrays or tensors by the release's
            names, as a training checkpoint has them or bare.
        family: "sit", "dit" or "lightningdit".
        heads: number of attention heads; needed for widths outside `recipes.SIZES`.
        auxiliary_depth: number of blocks before the auxiliary head, or before each of several;
            needed where there are several, or (depth, width) are outside `recipes.SIZES`.
        dtype: dtype of matrix products. Parameters are float32: narrower ones are widened exactly.
        scan_blocks, remat: see `DiT`.

    Returns:
        A model ready to call, `model(x, t, y) -> Heads`, whose `model.spec` says what was found.
        Without an auxiliary head in the checkpoint `spec.auxiliary_depths` and `Heads.auxiliary`
        are empty; `add_auxiliary_head` adds a fresh one.

    Raises:
        InputError: if the file cannot be read; if the family, the heads or the auxiliary depth
            cannot be told or contradict the weights; if a weight is missing, unexpected, of
            another shape, not floating-point, NaN or infinite.
    """
    weights, where = _read(source)
    spec = _find_spec(weights, where, family, heads, auxiliary_depth)
    graphdef, shapes = functional.split(
        abstract(spec, dtype=dtype, scan_blocks=scan_blocks, remat=remat)
    )
    _check_rope(weights, spec, where)
    buffers = [name for name in ROPE_BUFFERS if name in weights]
    stored = {name: np.asarray(weights.pop(name), np.float32) for name in buffers}
    table = list(_weights(spec, network.layout(graphdef, shapes)))
    weight_files.match_keys({weight.name: weight.shape for weight in table}, weights, where)
    weight_files.check_finite(weights, where)
    model = functional.merge(graphdef, _fill(table, shapes, weights))
    # No parameters, so static and hashable; only `to_pytorch` reads them.
    model.carried = tuple((name, a.shape, a.tobytes()) for name, a in stored.items())
    return model


def to_pytorch(model: DiT, *, rope_buffers: bool = False) -> dict[str, np.ndarray]:
    """Returns a model's weights under the release's names and shapes, in float32.

    `to_pytorch(from_pytorch(weights))` has the names, shapes and bits of `weights`: the parameters,
    the position table, and LightningDiT's rotary buffers if and only if `weights` had them. (Those
    are constants of the architecture; ours differ from PyTorch's float32 cosines by up to 2e-6.)

    Args:
        model: from `from_pytorch`, or trained here.
        rope_buffers: whether to make `feat_rope.freqs_{cos,sin}` where the model came without them,
            which LightningDiT's `load_state_dict(strict=True)` asks for.

    Returns:
        Arrays by name. They are read-only views of the parameters, so that a large model is not
        held twice; copy one before changing it.
    """
    graphdef, params = functional.split(model)
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    weights = {}
    for weight in _weights(model.spec, network.layout(graphdef, params)):
        array = flat[weight.path]
        weights[weight.name] = weight.to_theirs(
            array if weight.layer is None else array[weight.layer]
        )
    if rope_buffers and model.spec.rope:
        weights |= dict(zip(ROPE_BUFFERS, _rope_tables(model.spec), strict=True))
    for name, shape, data in model.carried:
        weights[name] = np.frombuffer(data, np.float32).reshape(shape)
    return weights


def _read(source: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Returns the weights by bare name, and how to call their source in a message."""
    if isinstance(source, Mapping):
        where, content = "weights", source
    else:
        where, content = str(source), weight_files.read_checkpoint(source)
    weights = weight_files.network_weights(content, _LANDMARKS, "a SiT, DiT or LightningDiT", where)
    unused = [name for name in weights if name.startswith(_TRAINING_HEADS)]
    if unused:
        head = unused[0].partition(".")[0]
        warnings.warn(
            f"{where}: left out {head}.* ({len(unused)} weights), a head that only training needs",
            stacklevel=3,
        )
        weights = {name: array for name, array in weights.items() if name not in unused}
    for name, array in weights.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{where}: weight {name} is {array.dtype}, expected floating point")
    return weights, where


def _find_spec(
    weights: Mapping[str, np.ndarray],
    where: str,
    family: str | None,
    heads: int | None,
    auxiliary_depth: int | Sequence[int] | None,
) -> DiTSpec:
    """Finds the architecture from names and shapes, and from the arguments of `from_pytorch`."""
    _check_landmarks(weights, where)
    kernel = _shape(weights, "x_embedder.proj.weight", "(width, channels, patch, patch)", where)
    position = _shape(weights, "pos_embed", "(1, side², width)", where)
    labels = _shape(weights, "y_embedder.embedding_table.weight", "(classes + 1, width)", where)
    modulation = _shape(weights, "blocks.0.adaLN_modulation.1.weight", "(6·width, width)", where)
    head = _shape(weights, "final_layer.linear.weight", "(patch²·channels, width)", where)
    # The one that most weights agree on, so that the odd one out is blamed and not all the others.
    width = statistics.mode([labels[1], position[2], modulation[1], head[1], kernel[0]])
    _, channels, patch, _ = kernel
    side = math.isqrt(position[1])
    if side**2 != position[1]:
        raise InputError(f"{where}: pos_embed has {position}, expected a square number of tokens")
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in weights]
    # A stray huge number must not ask for a huge network: every block has a weight at least.
    depth = min(1 + max(int(match[1]) for match in blocks if match), len(weights))
    learned_sigma = head[0] == 2 * patch**2 * channels
    auxiliary_depths = _find_auxiliary_depths(weights, where, depth, width, auxiliary_depth)
    family = _find_family(weights, where, family, learned_sigma, bool(auxiliary_depths))
    # Rotary embeddings do not show, so the family says; norms and MLPs do.
    seen = dict(
        norm="rms" if "blocks.0.norm1.weight" in weights else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in weights else "gelu",
    )
    return DiTSpec(
        input_size=side * patch,
        channels=channels,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=_find_heads(weights, where, width, heads),
        num_classes=labels[0] - 1,
        auxiliary_depths=auxiliary_depths,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        shift=modulation[0] != 4 * width,
        learned_sigma=learned_sigma,
        family=family,
        **(published_family(family).network | seen),
    )


def _check_landmarks(weights: Mapping[str, np.ndarray], where: str) -> None:
    """Refuses weights without what the architecture is read off."""
    missing = [name for name in _LANDMARKS if name not in weights]
    if missing:
        raise InputError(
            f"{where}: weight {missing[0]} is missing{suggest(missing[0], list(weights), limit=1)}"
        )
    if not {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight"} & set(weights):
        raise InputError(
            f"{where}: the family cannot be told: expected a weight blocks.0.mlp.fc1.weight "
            "(SiT, DiT) or blocks.0.mlp.w12.weight (LightningDiT), found neither"
        )
    if "blocks.0.attn.q_norm.bias" in weights:
        raise InputError(
            f"{where}: unexpected weight blocks.0.attn.q_norm.bias: q/k norm is an RMSNorm here "
            "(blocks.0.attn.q_norm.weight alone), a LayerNorm on queries and keys is not supported"
        )


def _shape(
    weights: Mapping[str, np.ndarray], name: str, expected: str, where: str
) -> tuple[int, ...]:
    """The shape of a weight; raises `InputError` if it has another number of axes, or if a
    convolution's kernel is not square."""
    shape = weights[name].shape
    if len(shape) != expected.count(",") + 1 or shape[2:3] != shape[3:4] and len(shape) == 4:
        raise InputError(f"{where}: weight {name} has shape {shape}, expected {expected}")
    return shape


def _find_family(
    weights: Mapping[str, np.ndarray],
    where: str,
    family: str | None,
    learned_sigma: bool,
    auxiliary: bool,
) -> str:
    """The family; raises `InputError` if the one asked for contradicts the names."""
    signs = ("blocks.0.mlp.w12.weight", "blocks.0.norm1.weight", *ROPE_BUFFERS)
    sign = next((name for name in signs if name in weights), None)
    if family is not None:
        published_family(family)
        if (family == "lightningdit") != (sign is not None):
            found = f"only LightningDiT has {sign}" if sign else f"it has no weight {signs[0]}"
            raise InputError(f"{where}: not a {family} checkpoint: {found}")
        return family
    if sign is not None:
        return "lightningdit"
    if not learned_sigma:
        return "sit"
    # Learned sigma was DiT's and early SiT's; auxiliary heads were published on SiTs alone.
    guess = "sit" if auxiliary else "dit"
    name, predicts = ("SiT", "velocity") if auxiliary else ("DiT", "noise")
    warnings.warn(
        f"{where}: a final head twice as wide (learned sigma) is DiT's or an early SiT's: taken "
        f'for a {name}, which predicts {predicts}; pass family="dit" or family="sit" to decide',
        stacklevel=4,
    )
    return guess


def _find_heads(
    weights: Mapping[str, np.ndarray], where: str, width: int, heads: int | None
) -> int:
    """The number of attention heads, seen, given, or the published one of this width."""
    for name in ("blocks.0.attn.q_norm.weight", *ROPE_BUFFERS):
        if name not in weights:
            continue
        shape = weights[name].shape
        seen, rest = divmod(width, shape[-1] if shape else width + 1)
        if rest:
            raise InputError(
                f"{where}: weight {name} has shape {shape}, which does not divide width {width} "
                "into heads"
            )
        if heads not in (None, seen):
            raise InputError(
                f"{where}: heads is {heads}, but weight {name} of shape {shape} and width {width} "
                f"make {seen}"
            )
        return seen
    published = {size.width: size.heads for size in recipes.SIZES.values()}
    if heads is None and width not in published:
        raise InputError(
            f"{where}: the number of attention heads cannot be told for width {width} "
            f"(published widths: {', '.join(map(str, published))}): give heads"
        )
    return published[width] if heads is None else heads


def _find_auxiliary_depths(
    weights: Mapping[str, np.ndarray],
    where: str,
    depth: int,
    width: int,
    given: int | Sequence[int] | None,
) -> tuple[int, ...]:
    """The depths of the auxiliary heads: given, or the published one of this size."""
    if isinstance(given, int):
        given = (given,)
    found = {match[0] for name in weights if (match := re.match(r"final_layer_xr[^.]*", name))}
    if given is not None and len(given) != len(found):
        heads = f"{len(found)} of them" if found else "no auxiliary head (final_layer_xr.…)"
        raise InputError(
            f"{where}: auxiliary_depth is {', '.join(map(str, given))}, but there is {heads}: "
            "load what there is, then give the model a fresh head"
        )
    if given is not None or not found:
        return tuple(given or ())
    published = {(s.depth, s.width): s.auxiliary_depth for s in recipes.SIZES.values()}
    if len(found) > 1 or (depth, width) not in published:
        which = "auxiliary head's depth" if len(found) == 1 else f"{len(found)} heads' depths"
        raise InputError(
            f"{where}: the {which} cannot be told for {depth} blocks of width {width}: give "
            f"auxiliary_depth, 1…{depth - 1}"
        )
    return (published[depth, width],)


def _weights(spec: DiTSpec, layout: Layout) -> Iterator[_Weight]:
    """Yields every weight of a model in the release's order.

    Args:
        spec: the architecture.
        layout: what the network declares of its parameters.
    """
    flat = traverse_util.flatten_dict(layout)

    def of(module: str, theirs: str, layer: int | None = None) -> Iterator[_Weight]:
        path = tuple(module.split("."))
        for leaf, suffix in {"": "", **_LEAVES}.items():
            ours = (*path, leaf) if leaf else path
            if ours in flat:
                name = f"{theirs}.{suffix}" if suffix else theirs
                yield _Weight(name, ours, flat[ours], layer)

    for ours, theirs in _EMBEDDINGS.items():
        yield from of(ours, theirs)
    rows = [(stack, layer) for stack, count in spec.stacks for layer in range(count)]
    for i, (stack, layer) in enumerate(rows):
        for ours, theirs in _BLOCK.items():
            yield from of(f"{stack}.{ours}", f"blocks.{i}.{theirs}", layer)
    # The release has one auxiliary head; the names of more are ours.
    heads = {
        name: f"final_layer_xr_{i}" if i > 1 else "final_layer_xr"
        for i, name in enumerate(spec.auxiliary_heads, start=1)
    }
    for head, theirs_head in (heads | {"final_head": "final_layer"}).items():
        for ours, theirs in _HEAD.items():
            yield from of(f"{head}.{ours}", f"{theirs_head}.{theirs}")


def _fill(
    table: list[_Weight], shapes: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Makes our parameters, one at a time so that at most one is held twice."""
    sources: dict[tuple[str, ...], list[_Weight]] = {}
    for weight in table:
        sources.setdefault(weight.path, []).append(weight)
    params = {}
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        # A fresh array, never a view: JAX on CPU may share memory with what it is given, and the
        # caller may go on to change the weights.
        array = np.empty(leaf.shape, np.float32)
        for weight in sources[path]:
            row = ... if weight.layer is None else weight.layer
            array[row] = weight.to_ours(weights[weight.name])
        params[path] = jnp.asarray(array)
    return traverse_util.unflatten_dict(params)


def _rope_tables(spec: DiTSpec) -> tuple[np.ndarray, np.ndarray]:
    return layers.rotary_tables(spec.input_size // spec.patch_size, spec.width // spec.heads)


def _check_rope(weights: Mapping[str, np.ndarray], spec: DiTSpec, where: str) -> None:
    """Raises `InputError` if stored rotary buffers are not those of our rotary embedding."""
    stored = [name for name in ROPE_BUFFERS if name in weights]
    tables = dict(zip(ROPE_BUFFERS, _rope_tables(spec), strict=True)) if stored else {}
    for name in stored:
        found, table = weights[name], tables[name]
        if found.shape != table.shape:
            raise InputError(f"{where}: {name} has shape {found.shape}, expected {table.shape}")
        error = float(np.abs(found.astype(np.float32) - table).max())
        # PyTorch's float32 buffers differ by up to 2e-6, 16-bit ones by up to 4e-3.
        if not error < 5e-3:
            raise InputError(
                f"{where}: {name} differs by {error:.2g} from the 2-D rotary embedding of base "
                "10000 on this grid: another rotary embedding is not supported"
            )
