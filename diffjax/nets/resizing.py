"""Resizing of images as other programs do it: one matrix for the height, one for the width.

Whatever the interpolation, a row of the result is a weighted mean of rows of the image: y = R_height x R_width^T. So a
method is a table of weights, made once in NumPy; where the sizes are equal it is the identity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ['tensorflow', 'pytorch', 'pillow']


def _bilinear(positions: np.ndarray, size: int) -> np.ndarray:
    """Weights of the two pixels around each position, `[len(positions), size]`; the last pixel continues."""
    low = positions.astype(np.int64)
    weights = np.zeros((len(positions), size), np.float32)
    rows, fraction = np.arange(len(positions)), positions - low
    np.add.at(weights, (rows, low), 1 - fraction)
    np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), fraction)
    return weights


def tensorflow(size: int, new_size: int) -> np.ndarray:
    """Bilinear, pixel i of the result at i size / new_size: `tf.image.resize_bilinear` of TensorFlow 1.

    Positions are float32, as there: in float64 some would fall to the other side of a pixel's centre.
    """
    return _bilinear(np.arange(new_size, dtype=np.float32) * np.float32(size / new_size), size)


def pytorch(size: int, new_size: int) -> np.ndarray:
    """Bilinear, pixel i at (i + 1/2) size / new_size - 1/2: `interpolate(mode='bilinear', align_corners=False)`."""
    positions = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * np.float32(size / new_size)
    return _bilinear(np.maximum(positions - np.float32(0.5), 0), size)


def pillow(size: int, new_size: int) -> np.ndarray:
    """Bicubic with a = -1/2, widened where the image shrinks: `PIL.Image.resize(resample=BICUBIC)` of a float image.

    Keys 1981: w(d) = 1.5 |d|^3 - 2.5 d^2 + 1 up to |d| = 1, and -0.5 |d|^3 + 2.5 d^2 - 4 |d| + 2 up to |d| = 2.
    """
    scale = size / new_size
    width = max(scale, 1.0)
    centres = (np.arange(new_size)[:, None] + 0.5) * scale
    pixels = np.arange(size)[None]
    d = np.abs(pixels + 0.5 - centres) / width
    weights = np.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    first, end = (np.floor(centres + side * 2 * width + 0.5) for side in (-1, 1))
    weights = np.where((d < 2) & (pixels >= first) & (pixels < end), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(x: jax.Array, new_size: int, method: Callable[[int, int], np.ndarray]) -> jax.Array:
    """`x: float32 [B, H, W, C] -> [B, new_size, new_size, C]`. What overshoots 0..255 is cut off."""
    rows, columns = (method(size, new_size) for size in x.shape[1:3])
    x = jnp.einsum('bhwc,vw->bhvc', x, columns, precision='highest')
    return jnp.clip(jnp.einsum('bhvc,uh->buvc', x, rows, precision='highest'), 0, 255)
