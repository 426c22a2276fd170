"""ImageNet at 512x512 as latents: `imagenet256_latents` at twice the size, from shards of `[N, 64, 64, 4]`."""

import tensorflow_datasets as tfds

from diffjax.data.imagenet256_latents import imagenet256_latents_dataset_builder as smaller

LATENT_SHAPE = (64, 64, 4)
INSTRUCTIONS = smaller.INSTRUCTIONS.replace('32, 32, 4', '64, 64, 4')


class Builder(smaller.Builder):
    """Writes `mean` and `std`, float16 `[64, 64, 4]`, and `label` 0..999: 84 GB for 1.28 M images."""

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = INSTRUCTIONS
    LATENT_SHAPE = LATENT_SHAPE
