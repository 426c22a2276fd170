"""Spaces in which distances between images are measured, chosen by name; beside points they may give more.

What stands in `__all__` is what `evaluation.features` can name.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.core.types import PyTree
from diffjax.evaluation import features
from diffjax.nets.inception import Inception
from diffjax.weights.inception import open_weights
from diffjax.weights.recognizer import open_recognizer

__all__ = ['pixels', 'inception', 'shapes']


class Features(NamedTuple):
    """Of one part of a set, `[B, ...]`; rows beyond the part's are padding."""

    points: Any  # [B, D] of all distances and neighbours
    spatial: Any = None  # [B, S] of sFID
    logits: Any = None  # [B, K] of the Inception Score


class Space(NamedTuple):
    """`extract(images)`: uint8 `[B, H, W, C]` -> `Features` of NumPy or of JAX arrays that may still be computed."""

    name: str  # for a report
    extract: Callable[[np.ndarray], Features]
    dimensions: Callable[[tuple[int, ...]], tuple[int, int]]  # image shape [H, W, C] -> D, S (0: no spatial features)
    batch_size: int


def pixels(*, batch_size: int = 1024) -> Space:
    """The raw pixels in [-1, 1]."""
    return Space(
        'pixels',
        lambda images: Features(features.pixels(images)),
        lambda shape: (int(np.prod(shape)), 0),
        _checked(batch_size),
    )


def inception(*, weights: str | os.PathLike = '', resize: str = 'tensorflow', batch_size: int = 64) -> Space:
    """Inception-v3 of 2015, `nets.Inception`: 2048 averages, 2023 spatial features, 1008 classes.

    Args:
      weights: a safetensors file, see `weights/inception.py`. Its names and shapes are checked now; values are read
        when the first images come.
      resize: of `nets.Inception`; 'tensorflow' for ADM's figures.
      batch_size: images at once, over all devices of this process.

    Grey images are taken as RGB with three equal channels. Raises ValueError for a file that is not there or not this.
    """
    network = Inception(resize=resize)
    if not weights:
        raise ValueError(
            'Inception needs its weights (evaluation.inception_weights, --weights): a safetensors file made of '
            'pt_inception-2015-12-05-6726825d.pth by two lines that stand in diffjax/weights/inception.py; got none'
        )

    def apply(params, x):
        out = network.apply({'params': params}, jnp.broadcast_to(x, (*x.shape[:3], 3)))
        return Features(out.pool, out.spatial, out.logits_unbiased)

    name = f'Inception-v3 (2015), images resized as by {resize}'
    return network_space(name, apply, open_weights(weights), lambda shape: (2048, 2023), batch_size)


def shapes(*, batch_size: int = 64) -> Space:
    """The recogniser of the embedded shapes that comes with the package: what its last feature map holds on average.

    Made for pictures of 64 x 64; it takes any size. Grey ones are taken as RGB with three equal channels.
    """
    opened = open_recognizer()

    def apply(params, images):
        x = jnp.broadcast_to(images, (*images.shape[:3], opened.in_channels)) / 127.5 - 1
        return Features(opened.network.apply({'params': params}, x, method='embed'))

    size = opened.network.channels[-1]
    return network_space('the recogniser of shapes', apply, opened.load, lambda shape: (size, 0), batch_size)


def network_space(
    name: str,
    apply: Callable[[PyTree, jax.Array], PyTree],
    load: Callable[[], PyTree],
    dimensions: Callable[[tuple[int, ...]], tuple[int, int]],
    batch_size: int,
) -> Space:
    """A network as a space: each part of a set is split over the devices of this process.

    Args:
      apply: (params, uint8 images `[B, H, W, C]`, or clips) -> features, arrays `[B, ...]`; one program is compiled for
        each size.
      load: the parameters; called when the first images come.
      batch_size: rounded up to what the devices share evenly.
    """
    mesh = Mesh(np.array(jax.local_devices()), ('images',))
    split, everywhere = NamedSharding(mesh, P('images')), NamedSharding(mesh, P())
    size = -(-_checked(batch_size) // mesh.size) * mesh.size
    program = jax.jit(apply, in_shardings=(everywhere, split), out_shardings=split)
    params = functools.cache(lambda: jax.device_put(load(), everywhere))

    def extract(images):
        padding = np.zeros((size - len(images), *images.shape[1:]), np.uint8)  # one program for all parts
        return program(params(), jax.device_put(np.concatenate([images, padding]), split))

    return Space(name, extract, dimensions, size)


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f'batch_size is at least 1, got {batch_size}')
    return batch_size
