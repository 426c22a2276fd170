"""The features of VGG-16 and the weights of LPIPS upon them (Zhang et al. 2018, arXiv:1801.03924).

Thirteen 3x3 convolutions (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1, D) in five groups, 2x2 maxima between;
the last ReLU of each group is a feature map, and LPIPS weighs its channels with numbers fitted to people's judgement.
14.7 M parameters, of which LPIPS adds 1,472. Published weights come from a local file: `diffjax.weights.lpips`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import check_rank
from diffjax.nets.recognizer import perceptual_distance

GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# The mean and deviation that LPIPS takes from images in [-1, 1], which are those of ImageNet in [0, 1].
SHIFT, SCALE = np.float32([-0.030, -0.088, -0.188]), np.float32([0.458, 0.448, 0.450])
MIN_SIZE = 16


class LPIPS(nn.Module):
    """`a, b: [B, H, W, 3] in [-1, 1] -> [B]`, the perceptual distance of each pair; H and W at least 16."""

    @nn.compact
    def __call__(self, a: Array, b: Array) -> jax.Array:
        check_rank('LPIPS', a, '[B, H, W, C]')
        if a.shape != b.shape or a.shape[-1] != 3 or min(a.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f'LPIPS takes two batches [B, H, W, 3], H and W at least {MIN_SIZE}; got {a.shape} and {b.shape}'
            )
        maps = VGGFeatures(name='vgg')(jnp.concatenate([a, b]))
        init = nn.initializers.ones
        weights = [self.param(f'weight_{i}', init, (f.shape[-1],)) for i, f in enumerate(maps)]
        return perceptual_distance([f[: len(a)] for f in maps], [f[len(a) :] for f in maps], weights)


class VGGFeatures(nn.Module):
    """`[B, H, W, 3] -> five maps [B, H / 2^i, W / 2^i, C_i]`."""

    @nn.compact
    def __call__(self, x: Array) -> list[jax.Array]:
        h, maps, number = (x - SHIFT) / SCALE, [], 0
        for i, group in enumerate(GROUPS):
            if i:
                h = nn.max_pool(h, (2, 2), (2, 2))
            for features in group:
                h = nn.relu(nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), name=f'conv_{number}')(h))
                number += 1
            maps.append(h)
        return maps
