"""The published recipes as plain data, once: what a family of networks fixes, its sizes, and every
published network with its training, its guidance, its reported figures and its weights.

Configs, the library and the hub read these tables; names in them are those of `ig_jax.config`. The
CFG scales that DiT, SiT and LightningDiT publish themselves are of samplers that guide the first
three latent channels only (`forward_with_cfg` in their releases); IG's release guides all, so they
do not carry over and are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ig_jax.errors import look_up

# Fields of a config by section: {"loss": {"path": "linear"}}.
Sections = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """What all networks of a family have in common.

    Attributes:
        config: the fields in which a config of the family differs from others.
        network: fields of its architecture that no config sets (those of `DiTSpec`).
    """

    config: Sections
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_SD_LATENTS = dict(input_size=32, channels=4, patch_size=2)

FAMILIES: dict[str, Family] = {
    # Ma et al. 2024, https://github.com/willisma/SiT.
    "sit": Family(
        config=dict(
            model=_SD_LATENTS,
            data=dict(autoencoder="sd-vae-ft-ema"),
            loss=dict(path="linear", prediction="velocity"),
            sampler=dict(name="euler_maruyama", num_steps=250, time_shift=1.0),
        ),
    ),
    # Peebles & Xie 2023, https://github.com/facebookresearch/DiT.
    "dit": Family(
        config=dict(
            model=_SD_LATENTS,
            data=dict(autoencoder="sd-vae-ft-ema"),
            loss=dict(path="vp", prediction="noise"),
            sampler=dict(name="ddpm", num_steps=250, time_shift=1.0),
        ),
    ),
    # Yao et al. 2025, https://github.com/hustvl/LightningDiT, with the optimiser of IG's release.
    "lightningdit": Family(
        config=dict(
            model=dict(input_size=16, channels=32, patch_size=1),
            data=dict(autoencoder="va-vae-f16d32"),
            loss=dict(path="linear_reversed", prediction="velocity", cosine_weight=1.0),
            optimizer=dict(name="muon", learning_rate=2e-4, b2=0.95),
            sampler=dict(name="heun2", num_steps=125, time_shift=0.3),
            # Of the same noise levels as the default's, in this path's own time.
            sweep=dict(ig_intervals=(0.0, 1.0, 0.0, 0.7)),
        ),
        # The release forgets to start the auxiliary head at zero.
        network=dict(norm="rms", mlp="swiglu", rope=True, zero_auxiliary=False),
    ),
    # Vectors, such as points of the plane: nothing is published.
    "mlp": Family(
        config=dict(
            model=dict(channels=2, width=64, depth=4, auxiliary_depth=1, num_classes=2),
            data=dict(autoencoder=""),
            loss=dict(path="linear", prediction="velocity"),
            sampler=dict(name="heun", num_steps=50, time_shift=1.0),
        ),
    ),
}

# Of a network that somebody added: a config says what is different.
OTHER = Family(
    config=dict(
        loss=dict(path="linear", prediction="velocity"),
        sampler=dict(name="heun", num_steps=50, time_shift=1.0),
    )
)


def family(name: str) -> Family:
    """The recipe of a family, or the one of all others."""
    return FAMILIES.get(name, OTHER)


@dataclasses.dataclass(frozen=True)
class Size:
    """A published size of a transformer.

    Attributes:
        depth, width, heads: number of blocks, width of the stream, attention heads.
        auxiliary_depth: where the paper puts the auxiliary head.
    """

    depth: int
    width: int
    heads: int
    auxiliary_depth: int


SIZES: dict[str, Size] = {
    "s": Size(12, 384, 6, 4),
    "b": Size(12, 768, 12, 4),
    "l": Size(24, 1024, 16, 8),
    "xl": Size(28, 1152, 16, 8),
    "1p0b": Size(24, 1536, 24, 8),
    "1p6b": Size(28, 1792, 28, 8),
}


def size(name: str) -> Size:
    """The size of this name; raises `InputError` naming the known ones."""
    return look_up(SIZES, name, "model size")


@dataclasses.dataclass(frozen=True)
class Result:
    """What is reported for a setting: ImageNet 256×256, 50,000 samples, random labels.

    Attributes:
        epochs: length of the training.
        fid: Fréchet Inception distance.
        sfid, inception_score: where they are reported too.
        changes: the fields, "section.field", in which the setting differs from the recipe.
    """

    epochs: int
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published network: a family at a size, and what is its own.

    Attributes:
        family, size: names of `FAMILIES` and `SIZES`.
        config: the fields in which it differs from its family; guidance is of all latent channels.
        results: what is reported (IG paper, main tables).
        repository, file: its weights on the Hugging Face hub; a folder, ending in "/", holds one
            weight file. Empty where none are published.
        epochs: how long these weights were trained.
    """

    family: str
    size: str
    config: Sections = dataclasses.field(default_factory=dict)
    results: tuple[Result, ...] = ()
    repository: str = ""
    file: str = ""
    epochs: int = 0


# On 16 GiB chips (TPU v5e) with mesh.fsdp=4, 16 images a chip fit so.
_XL_MODEL = dict(remat="dots")
# A multiple of the devices of a pod of 256.
_XL_SAMPLER = dict(batch_size=256)
_HEADLESS = {"model.auxiliary_depth": 0, "guidance.ig_scale": 1.0}
_PLAIN = {"guidance.ig_scale": 1.0}
_EVERYWHERE = (0.0, 1.0)

RECIPES: dict[str, Recipe] = {
    "sit-xl-2-ig": Recipe(
        "sit",
        "xl",
        config=dict(
            model=_XL_MODEL,
            train=dict(num_steps=4_000_000),
            sampler=_XL_SAMPLER,
            guidance=dict(ig_scale=1.4),
        ),
        results=(
            Result(80, 5.31, inception_score=147.7),
            Result(800, 1.75, inception_score=228.6),
            Result(
                800,
                1.46,
                sfid=4.79,
                inception_score=265.7,
                changes={"guidance.cfg_scale": 1.35, "guidance.cfg_interval": (0.0, 0.7)},
            ),
        ),
        repository="CVLUESTC/Internal-Guidance",
        file="SiT/",
        epochs=800,
    ),
    "sit-l-2-ig": Recipe(
        "sit", "l", config=dict(train=dict(num_steps=400_000), guidance=dict(ig_scale=1.4))
    ),
    "sit-b-2-ig": Recipe(
        "sit",
        "b",
        config=dict(
            train=dict(num_steps=400_000), guidance=dict(ig_scale=2.3, ig_interval=(0.3, 1.0))
        ),
        results=(
            Result(80, 33.02, changes=_HEADLESS),
            Result(80, 30.45, changes={"model.auxiliary_depth": 2, **_PLAIN}),
            Result(80, 30.60, changes={"model.auxiliary_depth": 4, **_PLAIN}),
            Result(80, 38.05, changes={"model.auxiliary_depth": 8, **_PLAIN}),
            Result(
                80,
                19.02,
                changes={"guidance.ig_scale": 1.5, "guidance.ig_interval": _EVERYWHERE},
            ),
            Result(
                80,
                17.38,
                changes={"guidance.ig_scale": 1.9, "guidance.ig_interval": _EVERYWHERE},
            ),
            Result(80, 16.19),
        ),
    ),
    # The paper names DiT among the networks that IG applies to, and reports nothing for it.
    "dit-xl-2-ig": Recipe(
        "dit", "xl", config=dict(train=dict(num_steps=400_000), guidance=dict(ig_scale=1.4))
    ),
    "lightningdit-xl-1-ig": Recipe(
        "lightningdit",
        "xl",
        config=dict(
            model=_XL_MODEL,
            # The paper's decay; the release's config has 0.9999.
            train=dict(num_steps=3_400_000, ema_decay=0.9995),
            sampler=_XL_SAMPLER,
            guidance=dict(ig_scale=1.7),
        ),
        results=(
            Result(60, 2.42, inception_score=173.7),
            Result(680, 1.34, inception_score=229.3),
            Result(680, 1.24, changes={"sampler.labels": "balanced"}),
            Result(
                680,
                1.19,
                sfid=4.11,
                inception_score=269.0,
                changes={
                    "guidance.ig_scale": 1.4,
                    "guidance.cfg_scale": 1.45,
                    "guidance.cfg_interval": (0.19, 1.0),
                },
            ),
            Result(
                680,
                1.07,
                changes={
                    "guidance.ig_scale": 1.4,
                    "guidance.cfg_scale": 1.45,
                    "guidance.cfg_interval": (0.19, 1.0),
                    "sampler.labels": "balanced",
                },
            ),
        ),
        repository="CVLUESTC/Internal-Guidance",
        file="Lightningdit/",
        epochs=680,
    ),
    "lightningdit-l-1-ig": Recipe(
        "lightningdit",
        "l",
        config=dict(train=dict(num_steps=300_000, ema_decay=0.9995), guidance=dict(ig_scale=1.7)),
    ),
    "lightningdit-b-1-ig": Recipe(
        "lightningdit",
        "b",
        config=dict(train=dict(num_steps=300_000, ema_decay=0.9995), guidance=dict(ig_scale=1.7)),
    ),
    # The paper's baselines, by their own authors: no auxiliary head.
    "sit-xl-2": Recipe(
        "sit",
        "xl",
        config=dict(model=dict(_XL_MODEL, auxiliary_depth=0), sampler=_XL_SAMPLER),
        results=(Result(1400, 8.61, inception_score=131.7),),
        repository="nyu-visionx/SiT-collections",
        file="SiT-XL-2-256.pt",
        epochs=1400,
    ),
    "lightningdit-xl-1": Recipe(
        "lightningdit",
        "xl",
        config=dict(model=dict(_XL_MODEL, auxiliary_depth=0), sampler=_XL_SAMPLER),
        results=(Result(800, 2.17, inception_score=205.6),),
        repository="hustvl/lightningdit-xl-imagenet256-800ep",
        file="lightningdit-xl-imagenet256-800ep.pt",
        epochs=800,
    ),
}
