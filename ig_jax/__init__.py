"""Internal Guidance for diffusion transformers, in JAX and Flax NNX.

The names below are what a program that uses the library needs. Each is imported when it is first
used, so that `import ig_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the table below stands for, where editors and type checkers look
    from ig_jax.convert.pytorch import from_pytorch, to_pytorch
    from ig_jax.convert.workdir import load_workdir
    from ig_jax.diffusion.guidance import Guidance
    from ig_jax.errors import InputError, NotFiniteError
    from ig_jax.hub import Pretrained, from_pretrained, load_decoder
    from ig_jax.models.dit import DiT, DiTSpec
    from ig_jax.models.families import add_auxiliary_head
    from ig_jax.models.network import Heads
    from ig_jax.publish import push_to_hub
    from ig_jax.sampling.sample import Decoder, Samples, sample
    from ig_jax.storage.autoencoders import autoencoder_from_pytorch

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "DiT",
    "DiTSpec",
    "Guidance",
    "Heads",
    "InputError",
    "NotFiniteError",
    "Pretrained",
    "Samples",
    "add_auxiliary_head",
    "autoencoder_from_pytorch",
    "from_pretrained",
    "from_pytorch",
    "load_decoder",
    "load_workdir",
    "push_to_hub",
    "sample",
    "to_pytorch",
]

_MODULES = {
    "storage.autoencoders": ("autoencoder_from_pytorch",),
    "convert.pytorch": ("from_pytorch", "to_pytorch"),
    "convert.workdir": ("load_workdir",),
    "diffusion.guidance": ("Guidance",),
    "errors": ("InputError", "NotFiniteError"),
    "hub": ("Pretrained", "from_pretrained", "load_decoder"),
    "models.dit": ("DiT", "DiTSpec"),
    "models.families": ("add_auxiliary_head",),
    "models.network": ("Heads",),
    "publish": ("push_to_hub",),
    "sampling.sample": ("Decoder", "Samples", "sample"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"ig_jax.{module}"), name)
    raise AttributeError(f"module 'ig_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
