"""Small networks between a latent vector and a picture, for models that draw in one step: decoders and generators,
encoders and critics.

    h <- Linear(input beside the class's embedding)                                                                 (1)
    h <- h + Linear(a(Linear(a(h)))),    a a leaky ReLU, the second linear layer 0 at first       `depth` times     (2)
    y  = Linear(a(h))                                                                                               (3)

There is no normalisation, as in R3GAN (Huang et al. 2024, arXiv:2501.05441, section 3.2), and each picture's output
depends on nothing else in its batch, as penalties on a critic's gradient want it. All layers are dense: on pictures of
8x8, a step takes a tenth of what convolutions take.

What stands in `__all__` is what a config can choose by name.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import check_rank

__all__ = ['PictureEncoder', 'PictureGenerator']

SLOPE = 0.2  # of the leaky ReLU
LABEL_SIZE = 32  # of a class's embedding


class PictureGenerator(nn.Module, kw_only=True):
    """`z: [B, latent_size], label: int32 [B] or None -> [B, *shape]`, unbounded, float32.

    num_classes: 0 for a generator without labels.
    """

    num_classes: int = 0
    latent_size: int = 32
    hidden_size: int = 256
    depth: int = 2

    def __post_init__(self):
        _check_sizes(self, 'latent_size', 'hidden_size')
        super().__post_init__()

    @nn.compact
    def __call__(self, z: Array, label: Array | None, shape: tuple[int, ...]) -> jax.Array:
        check_rank('PictureGenerator', z, '[B, L]')
        trunk = Trunk(math.prod(shape), self.num_classes, self.hidden_size, self.depth, name='trunk')
        return trunk(jnp.asarray(z), label).reshape(-1, *shape)


class PictureEncoder(nn.Module, kw_only=True):
    """`x: [B, H, W, C], label: int32 [B] or None -> [B, out_features]`, float32."""

    out_features: int
    num_classes: int = 0
    hidden_size: int = 256
    depth: int = 2

    def __post_init__(self):
        _check_sizes(self, 'hidden_size')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> jax.Array:
        check_rank('PictureEncoder', x, '[B, H, W, C]')
        trunk = Trunk(self.out_features, self.num_classes, self.hidden_size, self.depth, name='trunk')
        return trunk(jnp.asarray(x).reshape(len(x), -1), label)


class Trunk(nn.Module):
    """Equations (1) to (3): `[B, D], label -> [B, out_features]`."""

    out_features: int
    num_classes: int
    hidden_size: int
    depth: int

    @nn.compact
    def __call__(self, h: jax.Array, label: Array | None) -> jax.Array:
        if self.num_classes:
            embed = nn.Embed(self.num_classes, LABEL_SIZE, embedding_init=nn.initializers.normal(1.0), name='label')
            h = jnp.concatenate([h, embed(label)], -1)
        h = nn.Dense(self.hidden_size, name='in')(h)
        for i in range(self.depth):
            f = nn.Dense(self.hidden_size, name=f'block_in_{i}')(nn.leaky_relu(h, SLOPE))
            last = nn.Dense(self.hidden_size, kernel_init=nn.initializers.zeros, name=f'block_out_{i}')
            h = h + last(nn.leaky_relu(f, SLOPE))
        return nn.Dense(self.out_features, name='out')(nn.leaky_relu(h, SLOPE))


def _check_sizes(module: nn.Module, *names: str) -> None:
    for name in names:
        if getattr(module, name) < 1:
            raise ValueError(f'{name} is at least 1, got {getattr(module, name)}')
    if module.depth < 0:
        raise ValueError(f'depth is at least 0, got {module.depth}')
