"""The TFDS dataset `imagenet512_latents`, written from latents that the user computed."""
