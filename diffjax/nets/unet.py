"""A class-conditional U-Net with attention, in the line of DDPM and ADM.

Residual blocks with group normalisation on the way down, in the middle and on the way up, skip connections across, and
self-attention at chosen sizes (Ho et al. 2020, arXiv:2006.11239, appendix B). Time and label enter each block as a
scale and a shift after its second normalisation (Nichol & Dhariwal 2021, arXiv:2102.09672, appendix A; "AdaGN" in
Dhariwal & Nichol 2021, arXiv:2105.05233, equation 2):

    h <- Conv(SiLU(GN(x)))                                                                                          (1)
    h <- Conv(dropout(SiLU(GN(h) (1 + scale) + shift))),     shift, scale = Linear(SiLU(c))                         (2)
    x <- x + h                             x through a 1x1 convolution where the number of channels changes         (3)

The convolution of (2), the output layer of attention and the last convolution start at zero: blocks start as the
identity (up to the 1x1 convolution) and the network as zero.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    ConditionEmbedding,
    FlatDense,
    Initializer,
    SelfAttention,
    check_choice,
    check_rank,
    modulate,
)

XAVIER = nn.initializers.xavier_uniform()


def num_groups(channels: int) -> int:
    """At most 32 groups of at least 4 channels each: the largest number of such that divides `channels`."""
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def _group_norm(x: jax.Array, name: str) -> jax.Array:
    """Group normalisation with scale and bias: `[B, ..., C] -> [B, ..., C]`, statistics and output in float32."""
    groups = num_groups(x.shape[-1])
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)(x)


def _conv(features: int, dtype: Any, name: str, *, stride: int = 1, kernel_init: Initializer = XAVIER) -> nn.Conv:
    """A 3x3 convolution with one row and column of zeros on each side; with stride 2, pixel i is centred on 2 i."""
    return nn.Conv(
        features, (3, 3), strides=stride, padding=((1, 1), (1, 1)), dtype=dtype, kernel_init=kernel_init, name=name
    )


def upsample(x: jax.Array) -> jax.Array:
    """Every pixel twice in height and width: `[B, H, W, C] -> [B, 2 H, 2 W, C]`."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class ResidualBlock(nn.Module):
    """Equations (1) to (3): `x: [B, H, W, C], c: [B, D] = SiLU(condition) -> [B, H, W, features]`."""

    features: int
    dropout: float
    compute_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, *, deterministic: bool) -> jax.Array:
        dtype = self.compute_dtype
        h = _conv(self.features, dtype, 'conv_in')(nn.silu(_group_norm(x, 'norm_in')))
        modulation = FlatDense(2 * self.features, dtype=dtype, name='modulation')(c)
        h = nn.silu(modulate(_group_norm(h, 'norm_out'), *jnp.split(modulation, 2, axis=-1)))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = _conv(self.features, dtype, 'conv_out', kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.features:
            x = FlatDense(self.features, dtype=dtype, name='skip')(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention among all pixels, added to its input: `[B, H, W, C] -> [B, H, W, C]`."""

    num_heads: int
    compute_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = _group_norm(x, 'norm').reshape(x.shape[0], -1, x.shape[-1])
        zeros = nn.initializers.zeros
        h = SelfAttention(self.num_heads, self.compute_dtype, self.attention, zeros, name='attention')(tokens)
        return x + h.reshape(x.shape)


class UNet(nn.Module, kw_only=True):
    """The U-Net: `x: [B, H, W, C], t: [B], cond: int32 [B] or None -> [B, H, W, out_channels]`.

    Level i has `base_channels * channel_multipliers[i]` channels at 1 / 2^i of the size: H and W must be multiples of
    2^(levels - 1). Attention follows each residual block where the height is one of `attention_resolutions`, and
    always stands in the middle. `dropout` acts only with `deterministic=False` and a 'dropout' key.
    """

    base_channels: int
    channel_multipliers: Sequence[int] = (1, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    num_heads: int = 4
    dropout: float = 0.0
    num_classes: int
    out_channels: int
    compute_dtype: str = 'float32'
    attention: str = 'auto'

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        if not self.channel_multipliers:
            raise ValueError('channel_multipliers is empty; give one multiplier for each level, as in (1, 2, 2)')
        if self.base_channels % 2:
            raise ValueError(f'base_channels={self.base_channels} must be even (it holds pairs of cosine and sine)')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        self._check_size(x)
        base = self.base_channels
        embed = ConditionEmbedding(
            4 * base, self.num_classes, base, XAVIER, label_init=nn.initializers.normal(1.0), name='condition'
        )
        c = nn.silu(embed(t, cond))

        h = _conv(base, self.compute_dtype, 'conv_in')(jnp.asarray(x))
        h, skips = self._down(h, c, deterministic=deterministic)
        h = self._residual(h, c, h.shape[-1], 'middle_in', deterministic=deterministic)
        h = self._attention(h, 'middle_attention')
        h = self._residual(h, c, h.shape[-1], 'middle_out', deterministic=deterministic)
        h = self._up(h, c, skips, deterministic=deterministic)

        h = nn.silu(_group_norm(h, 'norm_out'))
        return _conv(self.out_channels, jnp.float32, 'conv_out', kernel_init=nn.initializers.zeros)(h)

    def _down(self, h: jax.Array, c: jax.Array, *, deterministic: bool) -> tuple[jax.Array, list[jax.Array]]:
        skips = [h]
        for level, multiplier in enumerate(self.channel_multipliers):
            if level > 0:
                h = _conv(h.shape[-1], self.compute_dtype, f'down_{level}', stride=2)(h)
                skips.append(h)
            for i in range(self.num_res_blocks):
                features, name = self.base_channels * multiplier, f'down_{level}_{i}'
                h = self._residual(h, c, features, name, deterministic=deterministic)
                if h.shape[1] in self.attention_resolutions:
                    h = self._attention(h, f'{name}_attention')
                skips.append(h)
        return h, skips

    def _up(self, h: jax.Array, c: jax.Array, skips: list[jax.Array], *, deterministic: bool) -> jax.Array:
        for level in reversed(range(len(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                features, name = self.base_channels * self.channel_multipliers[level], f'up_{level}_{i}'
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._residual(h, c, features, name, deterministic=deterministic)
                if h.shape[1] in self.attention_resolutions:
                    h = self._attention(h, f'{name}_attention')
            if level > 0:
                h = _conv(h.shape[-1], self.compute_dtype, f'up_{level}')(upsample(h))
        return h

    def _residual(self, h: jax.Array, c: jax.Array, features: int, name: str, *, deterministic: bool) -> jax.Array:
        return ResidualBlock(features, self.dropout, self.compute_dtype, name=name)(h, c, deterministic=deterministic)

    def _attention(self, h: jax.Array, name: str) -> jax.Array:
        return AttentionBlock(self.num_heads, self.compute_dtype, self.attention, name=name)(h)

    def _check_size(self, x: Array) -> None:
        check_rank('UNet', x, '[B, H, W, C]')
        levels = len(self.channel_multipliers)
        total = 2 ** (levels - 1)
        if x.shape[1] % total or x.shape[2] % total:
            raise ValueError(
                f'height and width must be multiples of {total} (channel_multipliers has {levels} levels, '
                f'{levels - 1} halvings), got {x.shape[1]}x{x.shape[2]}'
            )
