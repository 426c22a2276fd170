"""The U-Net of DDPM, ADM and Stable Diffusion: one network, whose fields choose among the published ones.

Residual blocks on the way down, in the middle and on the way up, skip connections across, and attention at chosen
levels: among pixels alone (DDPM, Ho et al. 2020, arXiv:2006.11239, appendix B; ADM, Dhariwal & Nichol 2021,
arXiv:2105.05233, section 3), or in transformer blocks that look at a text too (Stable Diffusion, Rombach et al. 2022,
arXiv:2112.10752; SDXL, Podell et al. 2023, arXiv:2307.01952). The blocks and their equations are in unet_blocks.py,
what they are told in unet_condition.py. The network starts as zero and its blocks as the identity (up to the 1x1
convolutions where the number of channels changes).

Published sizes; multiply-adds of one forward pass (those of attention too), half of its FLOPs, at the size of x given:

                     base   multipliers       blocks  attention at       x             parameters   multiply-adds
    DDPM CIFAR-10    128    1 2 2 2           2       16                 32x32x3         35.7 M          6.22 G
    ADM 64           192    1 2 3 4           3       32 16 8            64x64x3         296 M         110 G
    ADM 256          256    1 1 2 2 4 4       2       32 16 8            256x256x3       554 M        1.12 T
    ADM 512          256    .5 1 1 2 2 4 4    2       32 16 8            512x512x3       559 M        1.98 T
    SD 1.5           320    1 2 4 4           2       levels 0 1 2       64x64x4         860 M         0.40 T
    SD 2.1           320    1 2 4 4           2       levels 0 1 2       96x96x4         866 M         1.07 T
    SDXL             320    1 2 4             2       levels 1 2         128x128x4      2.57 B         3.38 T

DDPM: time_conditioning='additive', sinusoids='sin_cos_to_end', downsample_zeros='end', num_heads=1, norm_epsilon=1e-6,
num_groups=32. ADM: resampling='resnet', head_dim=64. Stable Diffusion: time_conditioning='additive', with num_heads=8,
text_size=768, projection='conv' (1.5), head_dim=64, text_size=1024 (2.1), or head_dim=64, text_size=2048,
transformer_depth=(1, 2, 10), pooled_size=1280 (SDXL).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.dit import REMAT_POLICIES
from diffjax.nets.layers import ATTENTION_IMPLEMENTATIONS, COMPUTE_DTYPES, check_choice, check_rank
from diffjax.nets.patches import from_patches, to_patches
from diffjax.nets.unet_blocks import (
    PROJECTIONS,
    SAMES,
    ZEROS,
    AttentionBlock,
    GroupNorm,
    ResidualBlock,
    SpatialTransformer,
    Style,
    TransformerBlock,
    conv,
    downsample,
    upsample,
)
from diffjax.nets.unet_condition import SINUSOIDS, Condition, Told

TIME_CONDITIONING = ('scale_shift', 'additive')
RESAMPLING = ('conv', 'resnet', 'pool')
SEQUENCES = ('channel_multipliers', 'attention_resolutions', 'attention_levels', 'num_heads', 'transformer_depth')
MIDDLE_ATTENTION = ('normalised', 'plain', 'none')


class UNet(nn.Module, kw_only=True):
    """The U-Net: `x: [B, H, W, C], t: [B], cond -> [B, H, W, out_channels]`.

    cond      without `text_size`: int32 labels [B], `num_classes` itself the null label, or None for num_classes = 0;
              with it a dict: 'text' [B, S, text_size], 'text_mask' [B, S] where wanted, and, where pooled_size > 0,
              'pooled' [B, pooled_size] and 'size' [B, 6]; or, where num_classes > 0, labels, which become
              `num_tokens` tokens (and `pooled`; the size is then that of x)

    base_channels          level i has `base_channels * channel_multipliers[i]` channels at 1 / 2^i of the size in
                           patches, so H and W are multiples of patch_size 2^(levels - 1); the embedding of time has
                           4 base_channels features
    patch_size             squares of so many pixels are folded into channels first, and unfolded last
    num_res_blocks         residual blocks of a level on the way down; on the way up it has one more
    attention_resolutions  attention follows each residual block where the height, in patches, is one of these,
    attention_levels       or where the level is one of these, whatever the height
    middle_attention       between the two residual blocks in the middle: 'normalised', 'plain' (no norm) or 'none'
    num_heads, head_dim    heads, one number or one for each level; with head_dim > 0 as many as the channels hold
    transformer_depth      blocks of each spatial transformer, one number or one for each level (the last: the middle)
    projection             'linear' or 'conv', into and out of them: the same computed, the shapes as published
    time_conditioning      'scale_shift' or 'additive'
    resampling             'conv': a convolution of stride 2, and one after doubling; 'resnet': residual blocks that
                           resample; 'pool': means of 2x2 and doubling alone
    downsample_zeros       zeros beside that convolution: 'both' sides or the 'end' alone
    sinusoids              of times: 'cos_sin', 'sin_cos_to_end', ...: see unet_condition.sinusoids
    null_label             False: a table of `num_classes` rows, of a network that knows no null label
    size_frequencies       features of each number of 'size'
    num_groups             of all normalisations; 0: at most 32 groups of at least 4 channels
    dropout                in residual blocks, only with `deterministic=False` and a 'dropout' key
    remat                  what the backward pass finds of residual, attention and transformer blocks, as in DiT
    """

    base_channels: int
    channel_multipliers: Sequence[float] = (1, 2, 2)
    patch_size: int = 1
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    attention_levels: Sequence[int] = ()
    middle_attention: str = 'normalised'
    num_heads: int | Sequence[int] = 4
    head_dim: int = 0
    transformer_depth: int | Sequence[int] = 1
    projection: str = 'linear'
    text_size: int = 0
    num_tokens: int = 8
    pooled_size: int = 0
    size_frequencies: int = 256
    time_conditioning: str = 'scale_shift'
    resampling: str = 'conv'
    downsample_zeros: str = 'both'
    sinusoids: str = 'cos_sin'
    null_label: bool = True
    num_groups: int = 0
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    num_classes: int
    out_channels: int
    compute_dtype: str = 'float32'
    attention: str = 'auto'
    remat: str = 'none'

    def __post_init__(self):
        for field in SEQUENCES:  # a config has lists, a module must be hashable
            value = getattr(self, field)
            setattr(self, field, value if isinstance(value, int) else tuple(value))
        for field, valid in (
            ('compute_dtype', COMPUTE_DTYPES),
            ('attention', ATTENTION_IMPLEMENTATIONS),
            ('middle_attention', MIDDLE_ATTENTION),
            ('projection', tuple(PROJECTIONS)),
            ('time_conditioning', TIME_CONDITIONING),
            ('resampling', RESAMPLING),
            ('downsample_zeros', tuple(SAMES)),
            ('sinusoids', tuple(SINUSOIDS)),
            ('remat', tuple(REMAT_POLICIES)),
        ):
            check_choice(field, getattr(self, field), valid)
        _check_levels(self)
        if self.base_channels % 2:
            raise ValueError(f'base_channels={self.base_channels} must be even (it holds pairs of cosine and sine)')
        if self.pooled_size and (not self.text_size or self.size_frequencies % 2):
            raise ValueError(
                f'pooled_size={self.pooled_size} needs text_size > 0 and an even size_frequencies, '
                f'got {self.text_size} and {self.size_frequencies}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        self._check_size(x)
        told = self._told(x, t, cond)
        style = self._style(0.0 if deterministic else self.dropout)

        h = conv(self._widths[0], self.compute_dtype, 'conv_in')(to_patches(jnp.asarray(x), self.patch_size))
        h, skips = self._down(h, told, style)
        h = self._middle(h, told, style)
        h = self._up(h, told, style, skips)
        h = nn.silu(GroupNorm(self.num_groups, self.norm_epsilon, name='norm_out')(h))
        h = conv(self.out_channels * self.patch_size**2, jnp.float32, 'conv_out', init=ZEROS)(h)
        return from_patches(h, self.patch_size)

    def _told(self, x: Array, t: Array, cond: PyTree) -> Told:
        return Condition(
            self.base_channels,
            self.sinusoids,
            self.num_classes,
            self.null_label,
            self.text_size,
            self.num_tokens,
            self.pooled_size,
            self.size_frequencies,
            name='condition',
        )(x, t, cond)

    def _down(self, h: jax.Array, told: Told, style: Style) -> tuple[jax.Array, list[jax.Array]]:
        skips = [h]
        for level, width in enumerate(self._widths):
            if level > 0:
                h = self._resample(h, told, style, 'down', level)
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = self._block(h, told, style, level, width, f'down_{level}_{i}')
                skips.append(h)
        return h, skips

    def _middle(self, h: jax.Array, told: Told, style: Style) -> jax.Array:
        level, width = len(self._widths) - 1, h.shape[-1]
        h = self._remat(ResidualBlock)(width, style, name='middle_in')(h, told.c)
        if self.middle_attention != 'none':
            h = self._attend(h, told, style, level, 'middle_attention', normalised=self.middle_attention != 'plain')
        return self._remat(ResidualBlock)(width, style, name='middle_out')(h, told.c)

    def _up(self, h: jax.Array, told: Told, style: Style, skips: list[jax.Array]) -> jax.Array:
        for level in reversed(range(len(self._widths))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(h, told, style, level, self._widths[level], f'up_{level}_{i}')
            if level > 0:
                h = self._resample(h, told, style, 'up', level)
        return h

    def _block(self, h: jax.Array, told: Told, style: Style, level: int, width: int, name: str) -> jax.Array:
        """A residual block, and attention where the level or the height has it."""
        h = self._remat(ResidualBlock)(width, style, name=name)(h, told.c)
        if level in self.attention_levels or h.shape[1] in self.attention_resolutions:
            h = self._attend(h, told, style, level, f'{name}_attention', normalised=True)
        return h

    def _attend(self, h: jax.Array, told: Told, style: Style, level: int, name: str, *, normalised: bool) -> jax.Array:
        heads = self._num_heads(level, h.shape[-1])
        if not self.text_size:
            return self._remat(AttentionBlock)(heads, style, normalised, name=name)(h)
        depth = _of_level(self.transformer_depth, level)
        block = SpatialTransformer(heads, depth, style, self._remat(TransformerBlock), name=name)
        return block(h, told.text, told.text_mask)

    def _resample(self, h: jax.Array, told: Told, style: Style, way: str, level: int) -> jax.Array:
        """Down into a level, or up out of it."""
        width, name = h.shape[-1], f'{way}_{level}'
        if self.resampling == 'resnet':
            return self._remat(ResidualBlock)(width, style, way, name=name)(h, told.c)
        if self.resampling == 'pool':
            return upsample(h) if way == 'up' else downsample(h)
        if way == 'up':
            return conv(width, style.compute_dtype, name)(upsample(h))
        return conv(width, style.compute_dtype, name, stride=2, sides=self.downsample_zeros)(h)

    def _remat(self, block: type[nn.Module]) -> type[nn.Module]:
        return block if self.remat == 'none' else nn.remat(block, policy=REMAT_POLICIES[self.remat])

    def _style(self, dropout: float) -> Style:
        names = ('num_groups', 'norm_epsilon', 'time_conditioning', 'projection')
        return Style(self.compute_dtype, self.attention, dropout, *(getattr(self, name) for name in names))

    @property
    def _widths(self) -> list[int]:
        return [round(self.base_channels * multiplier) for multiplier in self.channel_multipliers]

    def _num_heads(self, level: int, width: int) -> int:
        heads = _of_level(self.num_heads, level)
        given, divisor = (f'head_dim={self.head_dim}', self.head_dim) if self.head_dim else (f'{heads} heads', heads)
        if width % divisor:
            raise ValueError(f'{given} do not divide the {width} channels of level {level}; choose a divisor')
        return width // self.head_dim if self.head_dim else heads

    def _check_size(self, x: Array) -> None:
        check_rank('UNet', x, '[B, H, W, C]')
        levels = len(self.channel_multipliers)
        total = self.patch_size * 2 ** (levels - 1)
        if x.shape[1] % total or x.shape[2] % total:
            raise ValueError(
                f'height and width must be multiples of {total} (patch_size {self.patch_size}, and channel_multipliers '
                f'has {levels} levels, {levels - 1} halvings), got {x.shape[1]}x{x.shape[2]}'
            )


def _of_level(value: int | Sequence[int], level: int) -> int:
    return value if isinstance(value, int) else value[level]


def _check_levels(unet: UNet) -> None:
    """Raises ValueError where a field has not one value for each level, or names a level that is not there."""
    levels = len(unet.channel_multipliers)
    if not levels:
        raise ValueError('channel_multipliers is empty; give one multiplier for each level, as in (1, 2, 2)')
    if unet.patch_size < 1:
        raise ValueError(f'patch_size={unet.patch_size} must be positive')
    for field in ('num_heads', 'transformer_depth'):
        value = getattr(unet, field)
        each = (value,) * levels if isinstance(value, int) else value
        if len(each) != levels or min(each) < 1:
            raise ValueError(f'{field}={value!r} must be a positive number, or {levels}, one for each level')
    if wrong := [level for level in unet.attention_levels if not 0 <= level < levels]:
        raise ValueError(f'attention_levels: there is no level {wrong[0]}; the {levels} levels count from 0')
    widths = [round(unet.base_channels * multiplier) for multiplier in unet.channel_multipliers]
    if wrong := [width for width in widths if width < 1 or unet.num_groups and width % unet.num_groups]:
        raise ValueError(f'num_groups={unet.num_groups} does not divide the {wrong[0]} channels of a level')
