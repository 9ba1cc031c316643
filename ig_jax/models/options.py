"""What a config says of a network: `config.model`."""

from __future__ import annotations

import dataclasses

from ig_jax import recipes
from ig_jax.checks import Limits
from ig_jax.fields import field
from ig_jax.models import families, trunk

DTYPES = ("auto", "float32", "bfloat16")
_SIDE = Limits(1, 2**12, whole=True)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The network: a published family and size, and what differs from it."""

    family: str = field(
        "sit", "published family, which fixes what the others leave open", choices=families.NETWORKS
    )
    size: str = field("xl", "published size", choices=recipes.SIZES)
    width: int = field(
        0, "width of the tokens; 0 for the size's own", limits=Limits(0, 2**16, whole=True)
    )
    depth: int = field(
        0, "number of blocks; 0 for the size's own", limits=Limits(0, 2**12, whole=True)
    )
    heads: int = field(
        0, "attention heads; 0 for the size's own", limits=Limits(0, 2**12, whole=True)
    )
    auxiliary_depth: int | tuple[int, ...] = field(
        -1,
        "blocks before the auxiliary head, or before each of several, as in 4,8; 0 for no head, "
        "-1 for the published place",
    )
    input_size: int = field(32, "height and width of what it sees, in latent pixels", limits=_SIDE)
    channels: int = field(4, "channels of what it sees", limits=_SIDE)
    patch_size: int = field(2, "side of a token, in latent pixels", limits=_SIDE)
    num_classes: int = field(
        1000, "number of labels; 0 for a model without labels", limits=Limits(0, 2**24, whole=True)
    )
    qk_norm: bool = field(False, "RMS norm on queries and keys")
    adaln_shift: bool = field(True, "whether adaLN shifts as well as scales")
    learned_sigma: bool = field(
        False, "twice-wide final heads of published DiT and early SiT checkpoints"
    )
    dtype: str = field(
        "auto", "of matrix products; auto: bfloat16 on accelerators, float32 on CPU", choices=DTYPES
    )
    scan_blocks: bool = field(True, "compile one block and scan it, or unroll all", resume="free")
    remat: str = field(
        "none",
        "what the backward pass recomputes, to save memory",
        choices=trunk.REMAT_POLICIES,
        resume="free",
    )
