"""SiT-XL/2 + internal guidance on ImageNet 256×256 latents (SD-VAE): the paper's main recipe.

What the paper reports (FID-50K, random labels; IG paper, main table):
    80 epochs (400,000 steps)                                    FID 5.31, IS 147.7
    800 epochs (4,000,000 steps)                                 FID 1.75, IS 228.6
    800 epochs, ig_scale 1.4, cfg_scale 1.35 on [0, 0.7]         FID 1.46, sFID 4.79, IS 265.7

Baseline without internal guidance (SiT-XL/2, 1400 epochs: FID 8.61, IS 131.7):
    --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1
"""

from ig_jax.config import published_config


def get_config():
    """Returns the published recipe."""
    return published_config("sit-xl-2-ig")
