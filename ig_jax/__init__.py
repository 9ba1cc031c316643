"""Internal Guidance for diffusion transformers, in JAX and Flax NNX."""
