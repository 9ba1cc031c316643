"""Internal guidance on scikit-learn's 8×8 digits: the whole path in minutes on two CPU cores."""

from ig_jax.config import default_config


def get_config():
    """Returns the config of the default run: train, then score a range of IG scales."""
    config = default_config("sit", "s")
    config.model.update(
        width=64,
        depth=4,
        heads=4,
        auxiliary_depth=1,
        input_size=8,
        channels=1,
        patch_size=2,
        num_classes=10,
    )
    config.data.update(name="digits", image_size=8, num_validation=180, autoencoder="")
    config.optimizer.update(learning_rate=2e-3, warmup_steps=50)
    config.train.update(
        batch_size=32,
        num_steps=1000,
        ema_decay=0.99,
        log_every=50,
        validate_every=500,
        sample_every=500,
        checkpoint_every=500,
    )
    config.guidance.ig_scale = 2.0
    config.sampler.update(name="ab2", num_steps=10, num_samples=100, batch_size=128)
    # The real digits are balanced; random labels would add their own noise to the distances.
    config.sampler.labels = "balanced"
    config.evaluation.update(
        num_samples=1797, ig_scales=(0.0, 1.0, 1.5, 2.0, 2.5, 3.0), at_end=True
    )
    config.sweep.update(
        ig_scales=(1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75),
        ig_intervals=(0.0, 1.0, 0.3, 1.0, 0.0, 0.7),
        num_samples=2048,
        bootstrap=200,
    )
    return config
