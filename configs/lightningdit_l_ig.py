"""LightningDiT-L/1 + internal guidance on ImageNet 256×256 latents (VA-VAE f16d32).

The recipe of `configs/lightningdit_xl_ig.py` at a smaller size, head after block 8 of 24. The paper
reports no FID for this size.

Baseline without internal guidance: --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1
"""

from ig_jax.config import published_config


def get_config():
    """Returns the published recipe at this size."""
    return published_config("lightningdit-l-1-ig")
