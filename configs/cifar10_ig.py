"""SiT in pixel space on a small TFDS image set (CIFAR-10, 32×32): how other labelled sets come in.

Any TFDS name works the same way: --config.data.tfds_name=… --config.model.num_classes=…
"""

from ig_jax.config import default_config


def get_config():
    """Returns a recipe for one GPU and some hours."""
    config = default_config("sit", "s")
    config.model.update(input_size=32, channels=3, patch_size=2, num_classes=10)
    config.data.update(
        name="tfds",
        tfds_name="cifar10",
        image_size=32,
        flip=True,
        num_validation=1000,
        autoencoder="",
    )
    config.train.update(batch_size=256, num_steps=200_000)
    config.guidance.update(ig_scale=1.5, ig_interval=(0.3, 1.0))
    config.sampler.update(name="heun", num_steps=50)
    return config
