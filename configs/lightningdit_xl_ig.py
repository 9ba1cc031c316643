"""LightningDiT-XL/1 + internal guidance on ImageNet 256×256 latents (VA-VAE f16d32).

What the paper reports (FID-50K, random labels):
    60 epochs (300,000 steps)                                    FID 2.42, IS 173.7
    680 epochs (3,400,000 steps), ig_scale 1.7                   FID 1.34, IS 229.3
    680 epochs, ig_scale 1.4, cfg_scale 1.45 on [0.19, 1]        FID 1.19, sFID 4.11, IS 269.0
    the same with --config.sampler.labels=balanced               FID 1.07 (1.24 without CFG)

Baseline without internal guidance (LightningDiT-XL/1, 800 epochs: FID 2.17, IS 205.6):
    --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1

Upstream LightningDiT's own cfg_scale (6.7 to 10) does not carry over: its sampler guides the first
three of the 32 latent channels only, where IG's release, and this code, guide all.

The EMA decay is the paper's 0.9995; the authors' published config has 0.9999.
"""

from ig_jax.config import published_config


def get_config():
    """Returns the published recipe."""
    return published_config("lightningdit-xl-1-ig")
