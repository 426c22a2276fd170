"""A small network that recognises what a picture shows: labels for classifying, features for measuring.

Residual stages of two 3x3 convolutions, each stage at half the size of the one before, then the mean over positions and
a linear layer. With `coordinates` each pixel says where it is (Liu et al. 2018, arXiv:1807.03247), which a mean over
positions would not know otherwise. Its feature maps serve as a perceptual distance (`perceptual_distance`) where
published ones are not at hand, and the mean of the last as features for a Frechet distance.

    d(a, b) = sum over layers l of the mean over positions of |w_l (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)|^2        (1)

is LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1), with w = 1 for each layer divided by their number here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import check_rank

__all__ = ['Recognizer']


class Recognizer(nn.Module, kw_only=True):
    """`x: [B, H, W, C] in [-1, 1] -> logits [B, num_outputs]`; `features` gives the map of each stage.

    channels: of each stage; H and W are multiples of 2^(stages - 1), times first_stride.
    first_stride: 2 halves the size in the first stage already, whose full size costs most.
    coordinates: whether two channels of the input say where it is: y and x, -1 to 1 from the first pixel to the last.
    """

    num_outputs: int
    channels: Sequence[int] = (16, 32, 64, 96)
    num_groups: int = 8
    first_stride: int = 1
    coordinates: bool = False

    def __post_init__(self):
        if self.first_stride not in (1, 2) or not self.channels or any(c % self.num_groups for c in self.channels):
            raise ValueError(
                'first_stride is 1 or 2, and channels are those of at least one stage, multiples of num_groups; got '
                f'first_stride={self.first_stride}, channels={tuple(self.channels)}, num_groups={self.num_groups}'
            )
        super().__post_init__()

    def setup(self):
        strides = [self.first_stride, *[2] * (len(self.channels) - 1)]
        self.stages = [Stage(width, self.num_groups, stride) for width, stride in zip(self.channels, strides)]
        self.head = nn.Dense(self.num_outputs)

    def __call__(self, x: Array) -> jax.Array:
        return self.head(self.embed(x))

    def embed(self, x: Array) -> jax.Array:
        """The mean over positions of the last feature map: [B, channels[-1]]."""
        return self.features(x)[-1].mean((1, 2))

    def features(self, x: Array) -> list[jax.Array]:
        """The map after each stage, [B, H / (first_stride 2^i), W / (first_stride 2^i), channels[i]]."""
        check_rank('Recognizer', x, '[B, H, W, C]')
        maps, h = [], jnp.asarray(x)
        if self.coordinates:
            y, x = jnp.meshgrid(*(jnp.linspace(-1, 1, size, dtype=h.dtype) for size in h.shape[1:3]), indexing='ij')
            h = jnp.concatenate([h, jnp.broadcast_to(jnp.stack([y, x], -1), (*h.shape[:3], 2))], -1)
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps


class Stage(nn.Module):
    """Two convolutions, the second around a shortcut: `[B, H, W, C] -> [B, H / stride, W / stride, features]`."""

    features: int
    num_groups: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Conv(self.features, (3, 3), self.stride, padding=((1, 1), (1, 1)), name='conv_in')(x)
        h = nn.silu(nn.GroupNorm(self.num_groups, use_fast_variance=False, name='norm_in')(h))
        y = nn.Conv(self.features, (3, 3), padding=((1, 1), (1, 1)), name='conv_out')(h)
        return h + nn.silu(nn.GroupNorm(self.num_groups, use_fast_variance=False, name='norm_out')(y))


def perceptual_distance(
    a: Sequence[jax.Array], b: Sequence[jax.Array], weights: Sequence[Array] | None = None
) -> jax.Array:
    """Equation (1) of two lists of feature maps: [B], in float32. weights: w_l^2, [C_l] for each; None: 1 / layers."""

    def direction(f: jax.Array) -> jax.Array:
        f = f.astype(jnp.float32)
        return f / (jnp.sqrt(jnp.sum(f**2, axis=-1, keepdims=True) + 1e-20) + 1e-10)

    weights = weights if weights is not None else [jnp.ones(f.shape[-1]) / len(a) for f in a]
    each = [((direction(f) - direction(g)) ** 2 @ w).mean((1, 2)) for f, g, w in zip(a, b, weights, strict=True)]
    return sum(each)
