"""Squares of pixels as channels, and back."""

import jax
import jax.numpy as jnp


def to_patches(x: jax.Array, size: int) -> jax.Array:
    """Squares of pixels become channels: `[..., H, W, C] -> [..., H / size, W / size, size^2 C]`."""
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height // size, size, width // size, size, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, height // size, width // size, size**2 * channels)


def from_patches(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `to_patches`."""
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height, width, size, size, channels // size**2)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, height * size, width * size, channels // size**2)
