"""What few numbers can say of pictures: the quality of reconstructions, beside JPEG and principal components."""

import io

import jax
import jax.numpy as jnp
import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean squared difference) of bytes, in decibels, pooled over all that is given."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def jpeg_psnr(images: np.ndarray, num_bytes: float) -> float | None:
    """Of JPEG at the best quality whose files take `num_bytes` each on average; None where the worst takes more."""
    from PIL import Image

    def compressed(quality):
        sizes, again = [], []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.squeeze()).save(buffer, 'JPEG', quality=quality, optimize=True)
            sizes.append(buffer.tell())
            again.append(np.asarray(Image.open(buffer)).reshape(image.shape))
        return np.mean(sizes), np.stack(again)

    low, high = 0, 95  # the best quality that fits lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if compressed(middle)[0] <= num_bytes else (low, middle - 1)
    return psnr(images, compressed(low)[1]) if low else None


def pca_psnr(train: np.ndarray | None, images: np.ndarray, num_components: int) -> float | None:
    """Of the images' projections on the first principal components of `train`, each coefficient rounded to a byte.

    None without training images, or with fewer of them or of values than components.
    """
    from sklearn.utils.extmath import randomized_svd

    if train is None or not 0 < num_components <= min(len(train), train[0].size):
        return None
    x, y = (a.reshape(len(a), -1).astype(np.float32) for a in (train, images))
    mean = x.mean(0)
    components = randomized_svd(x - mean, num_components, n_iter=4, random_state=0)[2]
    again = np.asarray(as_bytes((y - mean) @ components.T)) @ components + mean
    return psnr(images.reshape(y.shape), np.clip(np.round(again), 0, 255))


def as_bytes(z: jax.Array) -> jax.Array:
    """`[B, ..., C]` rounded to 256 levels between the least and the largest value of each channel."""
    axes = tuple(range(z.ndim - 1))
    low, high = z.min(axes), z.max(axes)
    step = jnp.maximum(high - low, 1e-12) / 255
    return low + jnp.round((z - low) / step) * step
