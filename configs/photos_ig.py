"""Internal guidance on 32×32 crops of eight colour photographs that come with scikit-image and
scikit-learn (pip install "ig_jax[photos]"), in colour and without a download: LightningDiT, Muon
and prediction of data, as a network that learns forms from so few steps needs them."""

from ig_jax.config import default_config


def get_config():
    """Returns the config: train, then score a range of IG scales."""
    config = default_config("lightningdit", "s")
    config.model.update(
        width=96,
        depth=6,
        heads=4,
        auxiliary_depth=2,
        input_size=32,
        channels=3,
        patch_size=4,
        num_classes=8,
    )
    config.data.update(name="photos", image_size=32, num_validation=512, autoencoder="")
    config.loss.update(prediction="data", weight="velocity")
    config.optimizer.update(learning_rate=5e-3, schedule="cosine", warmup_steps=50)
    config.train.update(
        batch_size=16,
        num_steps=1800,
        ema_decay=0.99,
        log_every=100,
        validate_every=600,
        sample_every=600,
        checkpoint_every=600,
    )
    config.guidance.ig_scale = 1.5
    config.sampler.update(name="ab2", num_steps=16, num_samples=64, batch_size=64)
    # The crops are balanced; random labels would add their own noise to the distances.
    config.sampler.labels = "balanced"
    config.evaluation.update(num_samples=512, ig_scales=(0.0, 1.0, 1.5, 2.0), at_end=True)
    return config
