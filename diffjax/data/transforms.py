"""What happens to a batch on the device: bytes to [-1, 1] (and into bins), random flips, draws from latent posteriors.

x0 = byte / 127.5 - 1                           (1)  images, clips
x0 = scale * (mean + std * eps - shift), eps ~ N(0, I)  (2)  latents; Rombach et al. 2022, appendix G
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.data.sources import DELIVERED

STABLE_DIFFUSION_SCALE = 0.18215
BYTE_WIDTH = 1 / 127.5  # the distance between bytes after (1)


class FrameChoice(NamedTuple):
    """How a clip to learn from is cut out of a longer one."""

    num_frames: int
    strides: Sequence[int] = (1,)  # one of which is drawn for each example, all alike likely
    frame_rate: float = 0.0  # of the whole clip, in frames per second


def _example_keys(key: jax.Array, num_examples: int) -> jax.Array:
    """A key for each example that depends on its index alone, so that batch size and sharding change no draw."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_examples))


def prepare(
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    flip: bool,
    scale: float | np.ndarray = STABLE_DIFFUSION_SCALE,
    shift: float | np.ndarray = 0.0,
    frames: FrameChoice | None = None,
) -> dict[str, jax.Array]:
    """A batch as delivered -> `x0` float32 `[B, ..., C]` and `label` int32 `[B]`, zeros where there are no labels.

    Of clips whose `frames` are chosen also `frame_rate` float32 `[B]`.
    Annotations pass through as they are. Raises ValueError for a flip beside them: they would be those of the original.

    Args:
      batch: `image` uint8 `[B, H, W, C]` or `video` `[B, T, H, W, C]`, by (1), or `mean` and `std`
        `[B, (T,) H, W, C]`, by (2); and perhaps `label`, and annotations under names of their own.
      key: of the flips and of the latents' draws; with images and flip=False nothing is drawn.
      flip: mirror each example left to right with probability 1/2, all frames of a clip alike. A mirrored latent only
        approximates the latent of the mirrored image: for exactness write both into the dataset.
      scale, shift: of latents, one number or one for each channel. The default brings Stable Diffusion's to unit
        variance.
      frames: of clips; None: all.
    """
    annotations = {name: a for name, a in batch.items() if name not in DELIVERED}
    if flip and annotations:
        raise ValueError(f'dataset.flip mirrors images and not what is known of them ({", ".join(annotations)})')
    flip_key, noise_key = jax.random.split(key)
    rates = {}
    if frames is not None:
        video, stride = choose_frames(batch['video'], jax.random.fold_in(noise_key, 0), frames)
        batch, rates = {**batch, 'video': video}, {'frame_rate': frames.frame_rate / stride.astype(jnp.float32)}
    if pixels := [batch[name] for name in ('image', 'video') if name in batch]:
        x0 = from_uint8(pixels[0])
    else:
        mean, std = batch['mean'].astype(jnp.float32), batch['std'].astype(jnp.float32)
        keys = _example_keys(noise_key, len(mean))
        x0 = scale * (mean + std * jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys) - shift)
    if flip:
        flipped = jax.vmap(jax.random.bernoulli)(_example_keys(flip_key, len(x0)))
        x0 = jnp.where(flipped.reshape(-1, *[1] * (x0.ndim - 1)), x0[..., ::-1, :], x0)
    label = batch['label'].astype(jnp.int32) if 'label' in batch else jnp.zeros(len(x0), jnp.int32)
    return {'x0': x0, 'label': label, **rates, **annotations}


def choose_frames(video: jax.Array, key: jax.Array, frames: FrameChoice) -> tuple[jax.Array, jax.Array]:
    """Frames a, a + s, a + 2 s, ... of each clip `[B, T, H, W, C]`: (`[B, num_frames, H, W, C]`, the strides s `[B]`).

    s is one of the strides, a any frame with which they all lie inside.
    """
    num_frames, whole = frames.num_frames, video.shape[1]

    def choose(clip, key):
        which, where = jax.random.split(key)
        stride = jax.random.choice(which, jnp.asarray(frames.strides))
        start = jax.random.randint(where, (), 0, whole - (num_frames - 1) * stride)
        return clip[start + stride * jnp.arange(num_frames)], stride

    return jax.vmap(choose)(video, _example_keys(key, len(video)))


def dequantize(images: jax.Array, keys: jax.Array) -> jax.Array:
    """A uniform draw from each byte's bin, x0 = (byte + u - 1/2) / 127.5 - 1 with u in [0, 1): float32 `[B, H, W, C]`.

    A bin is `BYTE_WIDTH` wide and has in its middle what (1) trains on. (Scaled by 256, as elsewhere, byte 0 would lie
    on its bin's edge.) A model's mass of a bin is BYTE_WIDTH^D times its mean density there.

    Args:
      keys: `[B]`, one for each image.
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
    return (images.astype(jnp.float32) + (u - 0.5)) / 127.5 - 1


def from_uint8(pixels: jax.Array) -> jax.Array:
    """Bytes -> [-1, 1], by (1): float32."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array) -> jax.Array:
    """[-1, 1] -> bytes, rounded and clipped: the inverse of (1), exact on images."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
