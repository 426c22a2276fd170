"""The TFDS dataset `imagenet256_latents`, written from latents that the user computed."""
