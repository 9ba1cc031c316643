"""Internal guidance on points of the plane: a fractal tree of two classes, as in the IG paper's
Fig. 2, where every sample can be seen and the density is known. A minute on two CPU cores."""

from ig_jax.config import default_config


def get_config():
    """Returns the config of the toy: a residual MLP with an auxiliary head, SiT's loss."""
    config = default_config("mlp", "s")
    config.model.update(width=48, depth=5, auxiliary_depth=1, channels=2, num_classes=2)
    config.data.update(name="toy2d", num_validation=1024, autoencoder="")
    config.optimizer.update(learning_rate=1e-2, schedule="cosine", warmup_steps=50)
    config.train.update(
        batch_size=256,
        num_steps=1200,
        ema_decay=0.99,
        log_every=100,
        validate_every=1200,
        sample_every=1200,
        checkpoint_every=1200,
    )
    config.guidance.update(ig_scale=3.0, cfg_scale=1.5)
    config.sampler.update(
        name="heun", num_steps=16, time_shift=0.4, num_samples=4096, batch_size=4096
    )
    config.sampler.labels = "balanced"
    config.evaluation.update(num_samples=4096, ig_scales=(0.0, 1.0, 1.5, 2.0, 2.5, 3.0))
    return config
