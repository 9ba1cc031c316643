"""SiT-B/2 + internal guidance on ImageNet 256×256 latents (SD-VAE): the paper's ablations.

What the paper reports (80 epochs = 400,000 steps, FID-50K, no CFG):
    --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1                      33.02
    --config.model.auxiliary_depth=2 --config.guidance.ig_scale=1                      30.45
    --config.model.auxiliary_depth=4 --config.guidance.ig_scale=1                      30.60
    --config.model.auxiliary_depth=8 --config.guidance.ig_scale=1                      38.05
    --config.guidance.ig_scale=1.5 --config.guidance.ig_interval="(0.0,1.0)"           19.02
    --config.guidance.ig_scale=1.9 --config.guidance.ig_interval="(0.0,1.0)"           17.38
    (as it stands: ig_scale 2.3 on (0.3, 1))                                           16.19
"""

from ig_jax.config import published_config


def get_config():
    """Returns the best setting of the paper's ablations."""
    return published_config("sit-b-2-ig")
