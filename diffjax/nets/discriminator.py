"""A discriminator of patches: does each part of a picture look real? (Isola et al. 2017, arXiv:1611.07004, 6.1.2)

Convolutions of 4x4, all but the last two with stride 2, so that each number of the output sees one patch (70 pixels
wide with three strides, as published). Normalisation is by groups where the paper's is by batches: a picture's verdict
does not depend on its neighbours in the batch, nor on how the batch is spread over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import COMPUTE_DTYPES, check_choice, check_rank

__all__ = ['PatchDiscriminator']

GROUPS = 8  # at most, of each normalisation
SLOPE = 0.2  # of the leaky ReLU


class PatchDiscriminator(nn.Module, kw_only=True):
    """`x: [B, H, W, C] -> [B, h, w, 1]`: scores, positive for real.

    base_channels: of the first layer, doubled by each of the `depth` strides up to eightfold. H and W should be 2^depth
    times 4 at least.
    """

    base_channels: int = 64
    depth: int = 3
    compute_dtype: str = 'float32'

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        if self.base_channels < 1 or self.depth < 1:
            raise ValueError(
                f'base_channels and depth of a discriminator are at least 1, got {self.base_channels} and {self.depth}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        check_rank('PatchDiscriminator', x, '[B, H, W, C]')
        least = 2 ** (self.depth + 2)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f'a discriminator of depth {self.depth} needs pictures of {least}x{least} at least, got '
                f'{x.shape[1]}x{x.shape[2]}: lower its depth'
            )
        h = nn.leaky_relu(self._conv(self.base_channels, 2, self.compute_dtype, 'conv_0')(jnp.asarray(x)), SLOPE)
        for i in range(1, self.depth + 1):
            features = self.base_channels * min(2**i, 8)
            h = self._conv(features, 2 if i < self.depth else 1, self.compute_dtype, f'conv_{i}')(h)
            groups = next(n for n in range(GROUPS, 0, -1) if features % n == 0)
            h = nn.GroupNorm(groups, dtype=jnp.float32, use_fast_variance=False, name=f'norm_{i}')(h)
            h = nn.leaky_relu(h, SLOPE)
        return self._conv(1, 1, jnp.float32, 'conv_out')(h)

    def _conv(self, features: int, stride: int, dtype: Any, name: str) -> nn.Conv:
        init = nn.initializers.normal(0.02)
        return nn.Conv(features, (4, 4), stride, padding=((1, 1), (1, 1)), dtype=dtype, kernel_init=init, name=name)
