"""The autoencoder of latent diffusion: images, or clips, to a small grid of latents or tokens and back.

An encoder of residual blocks, each level at half the size of the one before, a narrow middle, and a decoder that is its
mirror with one block more a level (Rombach et al. 2022, arXiv:2112.10752, appendix G; Esser et al. 2021, VQGAN,
arXiv:2012.09841). What stands in the middle is one of

    'kl'    a diagonal Gaussian over latents, N(mean, std^2) (Kingma & Welling 2014); latents are drawn from it
    'vq'    the nearest code of a learned codebook
    'fsq'   a rounding of each channel (quantization.py has both)

Clips [B, T, H, W, C] are taken where `frames > 1`: convolutions then reach over so many frames, back in time only
(causal, zeros before the first), normalisation and attention stay within a frame, and the levels of
`temporal_downsampling` halve the number of frames after the first: T = 1 + 2k -> 1 + k (MAGVIT-2, Yu et al. 2023,
arXiv:2310.05737, section 3.2). On a single frame it computes what the image network computes with the last slice of
each kernel; `inflate` is the way back, from an image network's parameters.

Published (images): Stable Diffusion's f8 with 4 channels: 83.7 M parameters, 8x8 times fewer positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets import unet_blocks
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    FlatDense,
    SelfAttention,
    check_choice,
)
from diffjax.nets.patches import from_patches, to_patches
from diffjax.nets.quantization import (
    fsq,
    fsq_tokens,
    fsq_values,
    nearest_codes,
    nearest_levels,
    scaled,
    straight_through,
)

__all__ = ['Autoencoder']

BOTTLENECKS = ('kl', 'vq', 'fsq')
XAVIER = nn.initializers.xavier_uniform()
EPSILON = 1e-6  # of normalisations, as published
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # as published


class Gaussian(NamedTuple):
    """A posterior over latents, diagonal. Both [B, ..., h, w, latent_channels]."""

    mean: jax.Array
    log_variance: jax.Array

    @property
    def std(self) -> jax.Array:
        return jnp.exp(0.5 * self.log_variance)

    def kl(self) -> jax.Array:
        """KL(N(mean, std^2) || N(0, 1)) in nats, summed over latents: [B] (Kingma & Welling 2014, appendix B)."""
        each = 0.5 * (self.mean**2 + jnp.exp(self.log_variance) - 1 - self.log_variance)
        return each.reshape(len(each), -1).sum(-1)


class Codes(NamedTuple):
    """Quantised latents: `z` before, `codes` after, `tokens` int32 without channels.

    The gradient of `codes` goes to the codebook, where there is one, and that of `quantised`, the same values, to z.
    """

    z: jax.Array
    codes: jax.Array
    tokens: jax.Array

    @property
    def quantised(self) -> jax.Array:
        return straight_through(self.z, self.codes)


class Kind(NamedTuple):
    """What encoder, decoder and all their blocks have in common; Autoencoder's docstring has the fields."""

    widths: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    middle_attention: bool
    temporal_downsampling: tuple[int, ...]
    num_groups: int
    frames: int
    patch_size: int
    compute_dtype: str
    attention: str


class GroupNorm(nn.Module):
    """Group normalisation within each frame: statistics and output in float32, `[B, (T,) H, W, C]`."""

    num_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = unet_blocks.GroupNorm(self.num_groups, EPSILON)
        nn.share_scope(self, norm)
        return norm(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)


def conv(
    features: int,
    kind: Kind,
    name: str,
    *,
    stride: int = 1,
    time_stride: int = 1,
    dtype: Any = None,
) -> nn.Conv:
    """A 3x3 convolution; over clips also causal in time. With stride 2, zeros stand below and to the right alone."""
    sides = ((1, 1), (1, 1)) if stride == 1 else ((0, 1), (0, 1))
    size, strides, padding = (3, 3), (stride, stride), sides
    if kind.frames > 1:
        size, strides = (kind.frames, 3, 3), (time_stride, *strides)
        padding = ((kind.frames - 1, 0), *sides)
    dtype = dtype or kind.compute_dtype
    return nn.Conv(features, size, strides=strides, padding=padding, dtype=dtype, kernel_init=XAVIER, name=name)


def double(x: jax.Array, *, in_time: bool) -> jax.Array:
    """Every pixel twice in height and width, and every frame but the first twice in time."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
    return jnp.repeat(x, 2, axis=1)[:, 1:] if in_time else x


class ResidualBlock(nn.Module):
    """x + Conv(SiLU(GN(Conv(SiLU(GN(x))))): `[B, (T,) H, W, C] -> [B, (T,) H, W, features]`."""

    features: int
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.features, self.kind, 'conv_in')(nn.silu(GroupNorm(self.kind.num_groups, name='norm_in')(x)))
        h = conv(self.features, self.kind, 'conv_out')(nn.silu(GroupNorm(self.kind.num_groups, name='norm_out')(h)))
        if x.shape[-1] != self.features:
            x = FlatDense(self.features, dtype=self.kind.compute_dtype, name='skip')(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention of one head among the pixels of each frame, added to its input."""

    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GroupNorm(self.kind.num_groups, name='norm')(x)
        h = h.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1])
        h = SelfAttention(1, self.kind.compute_dtype, self.kind.attention, name='attention')(h)
        return x + h.reshape(x.shape)


class Middle(nn.Module):
    """Residual, attention, residual, at the smallest size."""

    kind: Kind

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        h = ResidualBlock(h.shape[-1], self.kind, name='in')(h)
        if self.kind.middle_attention:
            h = AttentionBlock(self.kind, name='attention')(h)
        return ResidualBlock(h.shape[-1], self.kind, name='out')(h)


class Encoder(nn.Module):
    """`[B, (T,) H, W, C] -> [B, (t,) h, w, features]`."""

    features: int
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = self.kind
        h = conv(kind.widths[0], kind, 'conv_in')(to_patches(x, kind.patch_size))
        for level, width in enumerate(kind.widths):
            for i in range(kind.num_res_blocks):
                h = ResidualBlock(width, kind, name=f'down_{level}_{i}')(h)
                if level in kind.attention_levels:
                    h = AttentionBlock(kind, name=f'down_{level}_{i}_attention')(h)
            if level < len(kind.widths) - 1:
                time_stride = 2 if level in kind.temporal_downsampling else 1
                h = conv(width, kind, f'down_{level}', stride=2, time_stride=time_stride)(h)
        h = Middle(kind, name='middle')(h)
        h = nn.silu(GroupNorm(kind.num_groups, name='norm_out')(h))
        return conv(self.features, kind, 'conv_out', dtype=jnp.float32)(h)


class Decoder(nn.Module):
    """`[B, (t,) h, w, latent_channels] -> [B, (T,) H, W, features]`."""

    features: int
    kind: Kind

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        kind = self.kind
        h = conv(kind.widths[-1], kind, 'conv_in')(z)
        h = Middle(kind, name='middle')(h)
        for level, width in reversed(list(enumerate(kind.widths))):
            for i in range(kind.num_res_blocks + 1):
                h = ResidualBlock(width, kind, name=f'up_{level}_{i}')(h)
                if level in kind.attention_levels:
                    h = AttentionBlock(kind, name=f'up_{level}_{i}_attention')(h)
            if level > 0:
                h = conv(width, kind, f'up_{level}')(double(h, in_time=level - 1 in kind.temporal_downsampling))
        h = nn.silu(GroupNorm(kind.num_groups, name='norm_out')(h))
        h = conv(self.features * kind.patch_size**2, kind, 'conv_out', dtype=jnp.float32)(h)
        return from_patches(h, kind.patch_size)


class Autoencoder(nn.Module, kw_only=True):
    """The autoencoder: `encode` and `decode`, by `apply(..., method='encode')`; called, it does both.

    encode(x: [B, (T,) H, W, out_channels]) -> Gaussian ('kl') or Codes, of [B, (t,) H / f, W / f, latent_channels]
    decode(z: [B, (t,) h, w, latent_channels or code_size]) -> [B, (T,) H, W, out_channels]
    tokens_to_latents(int32 [B, (t,) h, w]) -> what `decode` takes ('vq', 'fsq')

    patch_size             squares of so many pixels are folded into channels first, and unfolded last
    base_channels, channel_multipliers   level i has their product as channels at 1 / 2^i of the size; f = 2^last patch
    num_res_blocks         of a level in the encoder; the decoder has one more
    attention_levels       attention after each residual block of these levels; `middle_attention`: between the middle's
    latent_channels        of a position; for 'fsq' the number of `levels`
    bottleneck             'kl', 'vq' with `codebook_size` codes of `code_size` channels (0: latent_channels), or 'fsq'
    pointwise              a 1x1 convolution before and after the bottleneck, as Stable Diffusion 1 and 2 have them
    num_groups             of all normalisations
    latent_scale, latent_shift   what diffusion learns is (z - shift) scale: kept with the network, used by who samples
    frames                 1 for images; for clips the number of frames a convolution reaches over
    temporal_downsampling  levels after which the number of frames is halved too
    """

    out_channels: int = 3
    patch_size: int = 1
    base_channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: Sequence[int] = ()
    middle_attention: bool = True
    latent_channels: int = 4
    bottleneck: str = 'kl'
    codebook_size: int = 0
    code_size: int = 0
    levels: Sequence[int] = ()
    pointwise: bool = False
    num_groups: int = 32
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    frames: int = 1
    temporal_downsampling: Sequence[int] = ()
    compute_dtype: str = 'float32'
    attention: str = 'auto'

    def __post_init__(self):
        for field in ('channel_multipliers', 'attention_levels', 'levels', 'temporal_downsampling'):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # lists, from a config
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        check_choice('bottleneck', self.bottleneck, BOTTLENECKS)
        self._check_fields()
        super().__post_init__()

    def setup(self):
        kind = Kind(
            self.widths,
            self.num_res_blocks,
            self.attention_levels,
            self.middle_attention,
            self.temporal_downsampling,
            self.num_groups,
            self.frames,
            self.patch_size,
            self.compute_dtype,
            self.attention,
        )
        kl = self.bottleneck == 'kl'
        self.encoder = Encoder(self.latent_channels * (2 if kl else 1), kind)
        self.decoder = Decoder(self.out_channels, kind)
        if self.pointwise:
            self.to_code = FlatDense(2 * self.latent_channels if kl else self.code_channels)
            self.from_code = FlatDense(self.latent_channels)
        if self.bottleneck == 'vq':

            def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return jax.random.uniform(key, shape, minval=-1, maxval=1) / self.codebook_size

            self.codebook = self.param('codebook', uniform, (self.codebook_size, self.code_channels))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def code_channels(self) -> int:
        return self.code_size or self.latent_channels

    @property
    def factor(self) -> int:
        """By which height and width shrink."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def temporal_factor(self) -> int:
        """By which the number of frames after the first shrinks."""
        return 2 ** len(self.temporal_downsampling)

    def __call__(self, x: Array) -> jax.Array:
        code = self.encode(x)
        return self.decode(code.mean if isinstance(code, Gaussian) else code.quantised)

    def encode(self, x: Array) -> Gaussian | Codes:
        self._check_input(x)
        h = self.encoder(jnp.asarray(x)).astype(jnp.float32)
        h = self.to_code(h) if self.pointwise else h
        if self.bottleneck == 'kl':
            mean, log_variance = jnp.split(h, 2, axis=-1)
            return Gaussian(mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
        if self.bottleneck == 'vq':
            tokens = nearest_codes(h, self.codebook)
            return Codes(h, self.codebook[tokens], tokens)
        codes = jax.lax.stop_gradient(fsq(h, self.levels))
        return Codes(scaled(h, self.levels), codes, fsq_tokens(codes, self.levels))

    def decode(self, z: Array) -> jax.Array:
        z = self.from_code(jnp.asarray(z)) if self.pointwise else jnp.asarray(z)
        return self.decoder(z).astype(jnp.float32)

    def nearest(self, z: Array) -> jax.Array:
        """What `decode` has learned to take: of codes the nearest to z; latents of a Gaussian are taken as they are."""
        if self.bottleneck == 'kl':
            return jnp.asarray(z)
        if self.bottleneck == 'vq':
            return self.codebook[nearest_codes(jnp.asarray(z), self.codebook)]
        return nearest_levels(jnp.asarray(z), self.levels)

    def tokens_to_latents(self, tokens: Array) -> jax.Array:
        if self.bottleneck == 'kl':
            raise ValueError("an autoencoder with bottleneck='kl' has no tokens; 'vq' and 'fsq' have")
        return self.codebook[tokens] if self.bottleneck == 'vq' else fsq_values(tokens, self.levels)

    def _check_fields(self) -> None:
        widths = self.widths
        names = 'channel_multipliers', 'base_channels', 'num_res_blocks', 'latent_channels', 'frames', 'patch_size'
        if not widths or min(*widths, *(getattr(self, name) for name in names[2:])) < 1:
            given = ', '.join(str(getattr(self, name)) for name in names)
            raise ValueError(f'{", ".join(names[:-1])} and {names[-1]} must be positive; got {given}')
        if wrong := [width for width in widths if width % self.num_groups]:
            raise ValueError(f'num_groups={self.num_groups} does not divide the {wrong[0]} channels of a level')
        if self.code_channels != self.latent_channels and not (self.pointwise and self.bottleneck == 'vq'):
            raise ValueError(
                f"code_size={self.code_size} needs bottleneck='vq' and pointwise=True, which changes channels"
            )
        if self.temporal_downsampling and self.frames == 1:
            raise ValueError('temporal_downsampling needs frames > 1: with frames=1 this is a network for images')
        for field, last in (('attention_levels', len(widths)), ('temporal_downsampling', len(widths) - 1)):
            if wrong := [level for level in getattr(self, field) if not 0 <= level < last]:
                raise ValueError(f'{field}={getattr(self, field)}: {wrong[0]} is not one of the levels 0 to {last - 1}')
        if self.bottleneck == 'vq' and self.codebook_size < 2:
            raise ValueError(f"bottleneck='vq' needs a codebook_size of at least 2, got {self.codebook_size}")
        if self.bottleneck == 'fsq' and (len(self.levels) != self.latent_channels or min(self.levels, default=0) < 2):
            raise ValueError(
                f"bottleneck='fsq' needs `levels`, at least 2 for each of latent_channels={self.latent_channels}; got "
                f'{self.levels}'
            )

    def _check_input(self, x: Array) -> None:
        axes = '[B, T, H, W, C]' if self.frames > 1 else '[B, H, W, C]'
        if jnp.ndim(x) != axes.count(',') + 1 or x.shape[-1] != self.out_channels:
            raise ValueError(f'this autoencoder takes {axes} with C = {self.out_channels}, got {jnp.shape(x)}')
        if x.shape[-3] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f'height and width must be multiples of {self.factor}, got {x.shape[-3]}x{x.shape[-2]}')
        if (x.shape[1] - 1) % (times := self.temporal_factor):  # 1 for images
            raise ValueError(f'the number of frames must be 1 more than a multiple of {times}, got {x.shape[1]}')


def inflate(params: PyTree, frames: int) -> PyTree:
    """An image autoencoder's parameters -> those of the same network with `frames`: each frame as an image.

    A 3x3 kernel becomes the last slice of one over time, whose other slices are zero.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 4:
            return leaf
        return jnp.zeros((frames, *leaf.shape), leaf.dtype).at[-1].set(leaf)

    return jax.tree.map(one, params)
