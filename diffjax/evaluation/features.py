"""Features in which distances between images are measured: `uint8 [N, H, W, C] -> float64 [N, D]`, chosen by name.

A network's features (Inception, CLIP, DINO) are one more function here and one more name in `__all__`.
"""

import numpy as np

__all__ = ['pixels']


def pixels(images: np.ndarray) -> np.ndarray:
    """The raw pixels, flattened and scaled: uint8 `[N, H, W, C]` -> float64 `[N, H W C]` in [-1, 1].

    Raises ValueError for anything but uint8: images that are already scaled would pass silently otherwise.
    """
    if images.dtype != np.uint8:
        raise ValueError(f'Features are taken of uint8 images, not of {images.dtype}.')
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1
