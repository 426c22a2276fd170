"""EDM2, the magnitude-preserving U-Net in its configuration G (Karras et al. 2024, arXiv:2312.02696, figure 21).

A U-Net of the layers of `diffjax.nets.magnitude`, without biases or group normalisation. With e the embedding of time
and label, and x at unit magnitude for each pixel, a block is

    c <- 1 + gain Linear(e)                                                                                         (1)
    x <- mix(x, Conv(dropout(silu(c Conv(silu(x))))), 0.3)                                                          (2)
    x <- mix(x, Attention(x), 0.3)                                         at chosen sizes                          (3)

where queries, keys and values have unit magnitude (cosine attention). A block of the way down normalises each pixel
before (2); one of the way up first takes in a skip connection at equal weight. `gain` and the gain of the last
convolution start at zero: time and label have no influence and the network is zero at first.

Beside its output the network has the uncertainty u(t) of a noise level, a linear layer on Fourier features (section
2.2, "multi-task"): `log_variance`. It takes part in the loss exp(-u) w |error|^2 + u and is no part of sampling.

Published sizes, on 64x64x4 latents with 1000 classes:

    base_channels   128 XS   192 S    256 M    320 L    384 XL    448 XXL
    parameters      124.7 M  280.2 M  497.8 M  777.5 M  1119.3 M  1523.2 M
    multiply-adds   45.0 G   100.8 G  178.9 G  279.3 G  402.0 G   546.9 G   (half the FLOPs)
    paper, table 2  46       102      181      282      406       552       "Gflops": 1 to 2 % more of the former
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array, OrNone
from diffjax.nets.dit import REMAT_POLICIES
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    attention,
    check_choice,
    check_rank,
)
from diffjax.nets.magnitude import (
    FourierFeatures,
    LabelVector,
    Linear,
    concatenate,
    mix,
    normalize,
    normalize_weights,
    silu,
)
from diffjax.nets.unet import upsample


def downsample(x: jax.Array) -> jax.Array:
    """The mean of each 2 x 2 pixels: `[B, 2 H, 2 W, C] -> [B, H, W, C]`."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


RESAMPLE = {'keep': lambda x: x, 'down': downsample, 'up': upsample}


class Block(nn.Module, kw_only=True):
    """Equations (1) to (3): `x: [B, H, W, C], e: [B, D] -> [B, H', W', features]`, H' as `resample` says.

    side: 'down' where pixels are normalised, 'up' where they are not. num_heads: 0 for no attention.
    """

    features: int
    side: str
    resample: str = 'keep'
    num_heads: int = 0
    dropout: float
    residual_balance: float
    attention_balance: float
    compute_dtype: Any
    attention: str
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        x = RESAMPLE[self.resample](x)
        skip = x.shape[-1] != self.features
        if self.side == 'down':
            x = normalize(self._linear('skip')(x) if skip else x, -1)
        h = self._linear('conv_in', kernel_size=3)(silu(x))
        gain = self.param('gain', nn.initializers.zeros, ())
        c = 1 + Linear(self.features, name='modulation')(e, gain)
        h = silu(h * c[:, None, None].astype(h.dtype))
        h = nn.Dropout(self.dropout)(h, deterministic=self.deterministic)
        h = self._linear('conv_out', kernel_size=3)(h)
        if self.side == 'up' and skip:
            x = self._linear('skip')(x)
        x = mix(x, h, self.residual_balance)
        return mix(x, self._attend(x), self.attention_balance) if self.num_heads else x

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        qkv = Linear(3 * channels, self.compute_dtype, name='qkv')(x)
        qkv = normalize(qkv.reshape(batch, height * width, 3, self.num_heads, channels // self.num_heads), -1)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation=self.attention)
        return self._linear('out')(h.reshape(x.shape))

    def _linear(self, name: str, kernel_size: int = 1) -> Linear:
        return Linear(self.features, self.compute_dtype, kernel_size, name=name)


class EDM2(nn.Module, kw_only=True):
    """The network: `x: [B, H, W, C], t: [B], cond: int32 [B] or None -> [B, H, W, out_channels]`.

    `t` is log(sigma / alpha) / 4, as the target EDM gives it, times `time_scale`: 1e-3 for targets that give timesteps
    in 0..1000. `x` has magnitude 1, as that target scales it. Level i has `base_channels * channel_multipliers[i]`
    channels at 1 / 2^i of the size: H and W must be multiples of 2^(levels - 1). Attention follows a block where the
    height is one of `attention_resolutions`, and the first of the way up. `dropout` acts only with
    `deterministic=False` and a 'dropout' key. `remat` trades memory for time, block by block, as in DiT.
    """

    base_channels: int
    channel_multipliers: Sequence[int] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: Sequence[int] = (16, 8)
    head_channels: int = 64
    dropout: float = 0.0
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    concat_balance: float = 0.5
    label_balance: float = 0.5
    uncertainty_channels: OrNone = 128  # Fourier features of u; 0: there is no u
    time_scale: float = 1.0
    num_classes: int
    out_channels: int
    compute_dtype: str = 'float32'
    attention: str = 'auto'
    remat: str = 'none'

    project = staticmethod(normalize_weights)  # the step after each update

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        if not self.channel_multipliers:
            raise ValueError('channel_multipliers is empty; give one multiplier for each level, as in (1, 2, 3, 4)')
        for name in ('residual_balance', 'attention_balance', 'concat_balance', 'label_balance'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f'{name} is the share of the second of two terms, in [0, 1]; got {getattr(self, name)}'
                )
        super().__post_init__()

    @property
    def has_log_variance(self) -> bool:
        return self.uncertainty_channels > 0

    def setup(self):
        if self.has_log_variance:
            self.uncertainty_features = FourierFeatures(self.uncertainty_channels)
            self.uncertainty = Linear(1)

    def log_variance(self, t: Array) -> jax.Array:
        """u of each time: `[B] -> [B]`, float32."""
        return self.uncertainty(self.uncertainty_features(self.time_scale * jnp.asarray(t)))[:, 0]

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        self._check(x, t, cond)
        if self.has_log_variance and self.is_initializing():
            self.log_variance(t)
        e, x = self._embed(t, cond), jnp.asarray(x)
        # a channel of ones stands for the biases that there are not
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        h = Linear(self._channels(0), self.compute_dtype, 3, name='conv_in')(x)
        h, skips = self._down(h, e, deterministic=deterministic)
        h = self._up(h, e, skips, deterministic=deterministic)
        gain = self.param('gain', nn.initializers.zeros, ())
        return Linear(self.out_channels, jnp.float32, 3, name='conv_out')(h, gain)

    def _embed(self, t: Array, cond: Array | None) -> jax.Array:
        size = self.base_channels * max(self.channel_multipliers)
        features = FourierFeatures(self.base_channels, name='time_features')(self.time_scale * jnp.asarray(t))
        e = Linear(size, name='time')(features)
        if self.num_classes:
            e = mix(e, LabelVector(self.num_classes, size, name='label')(cond), self.label_balance)
        return silu(e)

    def _down(self, h: jax.Array, e: jax.Array, *, deterministic: bool) -> tuple[jax.Array, list[jax.Array]]:
        skips = [h]
        for level in range(len(self.channel_multipliers)):
            if level > 0:
                block = self._block(f'down_{level}', h.shape[-1], 'down', 'down', deterministic=deterministic)
                h = block(h, e)
                skips.append(h)
            for i in range(self.num_blocks):
                heads = self._heads(level, h.shape[1])
                name = f'down_{level}_{i}'
                h = self._block(name, self._channels(level), 'down', heads=heads, deterministic=deterministic)(h, e)
                skips.append(h)
        return h, skips

    def _up(self, h: jax.Array, e: jax.Array, skips: list[jax.Array], *, deterministic: bool) -> jax.Array:
        lowest = len(self.channel_multipliers) - 1
        heads = self._channels(lowest) // self.head_channels
        h = self._block('middle_in', h.shape[-1], 'up', heads=heads, deterministic=deterministic)(h, e)
        h = self._block('middle_out', h.shape[-1], 'up', deterministic=deterministic)(h, e)
        for level in reversed(range(lowest + 1)):
            if level < lowest:
                h = self._block(f'up_{level}', h.shape[-1], 'up', 'up', deterministic=deterministic)(h, e)
            for i in range(self.num_blocks + 1):
                h = concatenate(h, skips.pop(), self.concat_balance)
                heads = self._heads(level, h.shape[1])
                name = f'up_{level}_{i}'
                h = self._block(name, self._channels(level), 'up', heads=heads, deterministic=deterministic)(h, e)
        return h

    def _block(
        self, name: str, features: int, side: str, resample: str = 'keep', *, heads: int = 0, deterministic: bool
    ) -> Block:
        block = Block if self.remat == 'none' else nn.remat(Block, policy=REMAT_POLICIES[self.remat])
        return block(
            features=features,
            side=side,
            resample=resample,
            num_heads=heads,
            dropout=self.dropout,
            residual_balance=self.residual_balance,
            attention_balance=self.attention_balance,
            compute_dtype=self.compute_dtype,
            attention=self.attention,
            deterministic=deterministic,
            name=name,
        )

    def _channels(self, level: int) -> int:
        return self.base_channels * self.channel_multipliers[level]

    def _heads(self, level: int, height: int) -> int:
        return self._channels(level) // self.head_channels if height in self.attention_resolutions else 0

    def _check(self, x: Array, t: Array, cond: Array | None) -> None:
        check_rank('EDM2', x, '[B, H, W, C]')
        levels = len(self.channel_multipliers)
        total = 2 ** (levels - 1)
        if x.shape[1] % total or x.shape[2] % total:
            raise ValueError(
                f'height and width must be multiples of {total} (channel_multipliers has {levels} levels, '
                f'{levels - 1} halvings), got {x.shape[1]}x{x.shape[2]}'
            )
        for level in range(levels):
            attends = x.shape[1] >> level in self.attention_resolutions or level == levels - 1
            if attends and self._channels(level) % self.head_channels:
                raise ValueError(
                    f'{self._channels(level)} channels at {x.shape[1] >> level} pixels, where there is attention, must '
                    f'be a multiple of head_channels={self.head_channels}'
                )
        if jnp.ndim(t) != 1:
            raise ValueError(f't must be one time for each sample, shape [B]; got shape {jnp.shape(t)}')
        if (self.num_classes > 0) != (cond is not None) or (cond is not None and jnp.shape(cond) != jnp.shape(t)):
            right = 'int32 labels of the shape of t' if self.num_classes else 'None'
            got = 'None' if cond is None else f'shape {jnp.shape(cond)}'
            raise ValueError(f'EDM2 with num_classes={self.num_classes} takes cond = {right}; got {got}')
