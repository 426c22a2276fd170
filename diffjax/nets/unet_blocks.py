"""What U-Nets are made of: normalisation, convolution, resampling, residual blocks, attention and transformer blocks.

A residual block (Ho et al. 2020, appendix B) takes c, the embedding of the time and all else, through SiLU. Where
conditioning is by scale and shift (Nichol & Dhariwal 2021, arXiv:2102.09672, appendix A; "AdaGN" in Dhariwal & Nichol
2021, arXiv:2105.05233, equation 2):

    h <- Conv(SiLU(GN(x)))                                                                                          (1)
    h <- Conv(dropout(SiLU(GN(h) (1 + scale) + shift))),     scale, shift = Linear(c)                               (2)
    x <- x + h                             x through a 1x1 convolution where the number of channels changes         (3)

and where it is additive (Ho et al. 2020), (2) is h <- Conv(dropout(SiLU(GN(h + Linear(c))))). A block that resamples
(BigGAN's) changes the size of x and of SiLU(GN(x)) alike, before the convolution of (1).

A spatial transformer (Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1) takes pixels as tokens into blocks of

    x <- x + SelfAttention(LN(x));    x <- x + CrossAttention(LN(x), text)                                           (4)
    x <- x + Linear(a GELU(b)),       a, b = Linear(LN(x))                                                           (5)

and adds what comes out to its input. What ends a block that is added to its input starts at zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import FlatDense, Initializer, SelfAttention, attention, modulate

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros

SAMES = {'both': ((1, 1), (1, 1)), 'end': ((0, 1), (0, 1))}
"""Zeros beside a 3x3 convolution of stride 2: on both sides, or below and to the right alone (TensorFlow's SAME)."""


class Style(NamedTuple):
    """What all blocks of one network have in common; UNet's docstring has the fields."""

    compute_dtype: str
    attention: str
    dropout: float
    num_groups: int
    norm_epsilon: float
    time_conditioning: str
    projection: str


def num_groups(channels: int) -> int:
    """At most 32 groups of at least 4 channels each: the largest number of such that divides `channels`."""
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def group_norm(x: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Mean 0 and variance 1 for each sample and group of channels: `[B, ..., C] -> [B, ..., C]`, in float32.

    Sums run over pixels first, channel by channel, and then over the channels of a group: CPUs add whole vectors of
    channels, and need a third of the time that one sum over both takes.
    """
    x = jnp.asarray(x, jnp.float32)
    pixels, channels = tuple(range(1, x.ndim - 1)), x.shape[-1]

    def mean(h: jax.Array) -> jax.Array:
        each = jnp.mean(h, pixels, keepdims=True).reshape(len(h), *len(pixels) * [1], groups, channels // groups)
        each = jnp.broadcast_to(jnp.mean(each, -1, keepdims=True), each.shape)
        return each.reshape(*each.shape[:-2], channels)

    centred = x - mean(x)  # a variance from squares of x itself would lose what a large mean covers
    return centred * jax.lax.rsqrt(mean(centred**2) + epsilon)


class GroupNorm(nn.Module):
    """`group_norm` with a learned scale and bias: `[B, ..., C] -> [B, ..., C]`; num_groups: 0 for `num_groups(C)`."""

    num_groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', ZEROS, (channels,))
        return group_norm(x, self.num_groups or num_groups(channels), self.epsilon) * scale + bias


def conv(features: int, dtype: Any, name: str, *, stride: int = 1, sides: str = 'both', init: Initializer = XAVIER):
    """A 3x3 convolution `[B, H, W, C] -> [B, H / stride, W / stride, features]` with zeros beside as in `SAMES`."""
    return nn.Conv(features, (3, 3), strides=stride, padding=SAMES[sides], dtype=dtype, kernel_init=init, name=name)


def upsample(x: jax.Array) -> jax.Array:
    """Every pixel twice in height and width: `[B, H, W, C] -> [B, 2 H, 2 W, C]`."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def downsample(x: jax.Array) -> jax.Array:
    """The mean of each 2x2 pixels: `[B, H, W, C] -> [B, H / 2, W / 2, C]`."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


RESAMPLE = {'': lambda x: x, 'up': upsample, 'down': downsample}


class ResidualBlock(nn.Module):
    """Equations (1) to (3): `x: [B, H, W, C], c: [B, D] -> [B, H, W, features]`; resample: '', 'up' or 'down'."""

    features: int
    style: Style
    resample: str = ''

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        style, dtype = self.style, self.style.compute_dtype
        resample, additive = RESAMPLE[self.resample], style.time_conditioning == 'additive'
        norm_in, norm_out = (
            GroupNorm(style.num_groups, style.norm_epsilon, name=name) for name in ('norm_in', 'norm_out')
        )
        h = conv(self.features, dtype, 'conv_in')(resample(nn.silu(norm_in(x))))
        told = FlatDense(self.features * (1 if additive else 2), dtype=dtype, name='modulation')(c)
        if additive:
            h = norm_out(h + told[:, None, None])
        else:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = modulate(norm_out(h), shift, scale)
        h = nn.Dropout(style.dropout, deterministic=False)(nn.silu(h))
        h = conv(self.features, dtype, 'conv_out', init=ZEROS)(h)
        x = resample(x)
        if x.shape[-1] != self.features:
            x = FlatDense(self.features, dtype=dtype, name='skip')(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention among all pixels, normalised first, added to its input: `[B, H, W, C] -> [B, H, W, C]`."""

    num_heads: int
    style: Style
    normalised: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style, h = self.style, x
        if self.normalised:
            h = GroupNorm(style.num_groups, style.norm_epsilon, name='norm')(h)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        h = SelfAttention(self.num_heads, style.compute_dtype, style.attention, ZEROS, name='attention')(h)
        return x + h.reshape(x.shape)


class TokenAttention(nn.Module):
    """Attention of tokens to tokens, without biases but the last: `x: [B, L, D], to: [B, S, E] -> [B, L, D]`.

    Without `to` the tokens look at each other. mask: [B, S], True where there is a token to look at.
    """

    num_heads: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, to: jax.Array | None = None, mask: Array | None = None) -> jax.Array:
        size, dtype = x.shape[-1], self.style.compute_dtype

        def heads(h: jax.Array, parts: int) -> jax.Array:
            return h.reshape(*h.shape[:2], parts, self.num_heads, size // self.num_heads)

        if to is None:
            qkv = heads(FlatDense(3 * size, use_bias=False, dtype=dtype, name='qkv')(x), 3)
            q, k, v = (qkv[:, :, i] for i in range(3))
        else:
            q = heads(FlatDense(size, use_bias=False, dtype=dtype, name='q')(x), 1)[:, :, 0]
            kv = heads(FlatDense(2 * size, use_bias=False, dtype=dtype, name='kv')(to), 2)
            k, v = kv[:, :, 0], kv[:, :, 1]
        h = attention(q, k, v, mask, implementation=self.style.attention)
        return FlatDense(size, dtype=dtype, name='out')(h.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a gated MLP: `x: [B, L, D] -> [B, L, D]`."""

    num_heads: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, text_mask: Array | None) -> jax.Array:
        size, dtype = x.shape[-1], self.style.compute_dtype

        def norm(h: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)(h)

        x = x + TokenAttention(self.num_heads, self.style, name='self_attention')(norm(x, 'norm_1'))
        h = TokenAttention(self.num_heads, self.style, name='cross_attention')(norm(x, 'norm_2'), text, text_mask)
        x = x + h
        h, gate = jnp.split(FlatDense(8 * size, dtype=dtype, name='mlp_in')(norm(x, 'norm_3')), 2, axis=-1)
        return x + FlatDense(size, dtype=dtype, name='mlp_out')(h * nn.gelu(gate, approximate=False))


class PointwiseConv(nn.Module):
    """A 1x1 convolution, computed as the dense layer that it is: `[B, ..., C] -> [B, ..., features]`."""

    features: int
    dtype: Any
    kernel_init: Initializer = XAVIER

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (1, 1, x.shape[-1], self.features))[0, 0]
        bias = self.param('bias', ZEROS, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return (x.reshape(-1, x.shape[-1]) @ kernel + bias).reshape(*x.shape[:-1], self.features)


PROJECTIONS = {'linear': FlatDense, 'conv': PointwiseConv}
"""Into and out of a spatial transformer: the same map, as a dense layer (SD 2, SDXL) or as a 1x1 convolution (SD 1)."""


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels, added to their input: `x: [B, H, W, C] -> [B, H, W, C]`.

    block: the class of each, wrapped by `nn.remat` where that is wanted.
    """

    num_heads: int
    depth: int
    style: Style
    block: Any = TransformerBlock

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, text_mask: Array | None) -> jax.Array:
        size, style = x.shape[-1], self.style
        project = PROJECTIONS[style.projection]
        h = GroupNorm(style.num_groups, 1e-6, name='norm')(x).reshape(x.shape[0], -1, size)
        h = project(size, dtype=style.compute_dtype, name='project_in')(h)
        for i in range(self.depth):
            h = self.block(self.num_heads, style, name=f'blocks_{i}')(h, text, text_mask)
        h = project(size, dtype=style.compute_dtype, kernel_init=ZEROS, name='project_out')(h)
        return x + h.reshape(x.shape)
