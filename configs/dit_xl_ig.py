"""DiT-XL/2 + internal guidance on ImageNet 256×256 latents (SD-VAE): noise prediction, VP schedule.

The paper names DiT among the networks that IG applies to and reports no FID for it in its main
table. Sampled with ancestral DDPM, 250 respaced steps; --config.sampler.name=heun or euler_maruyama
integrate the same network as an ODE or SDE.

A cfg_scale from DiT's own tables does not carry over: its sampler guides three of the four latent
channels only. Its authors give FID 2.27 for 1.5 on three channels, and 2.23 for 1.375 on all.

Baseline without internal guidance: --config.model.auxiliary_depth=0 --config.guidance.ig_scale=1
"""

from ig_jax.config import published_config


def get_config():
    """Returns DiT's recipe with the auxiliary head of SiT-XL/2."""
    return published_config("dit-xl-2-ig")
