"""SiT-L/2 + internal guidance on ImageNet 256×256 latents (SD-VAE), head after block 8 of 24.

The paper's ablations use 80 epochs (400,000 steps). It tabulates no FID for this size on its own;
`configs/sit_b_ig.py` and `configs/sit_xl_ig.py` carry figures to compare with.

Baseline without internal guidance: --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1
"""

from ig_jax.config import published_config


def get_config():
    """Returns the published recipe at this size."""
    return published_config("sit-l-2-ig")
