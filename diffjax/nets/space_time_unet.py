"""The space-time U-Net: a U-Net of images that makes whole clips, most of it on fewer frames (Lumiere).

The image network of unet.py is inflated (Bar-Tal et al. 2024, arXiv:2401.12945, section 3.1): its layers see each frame
by itself, and modules over time stand between them. With N the normalisation of a frame and W kernels over time,

    after each residual block (and its attention)     x <- x + W * SiLU(N(x))                                       (1)
    into a level with half as many frames             x <- (x + W * x) at every second frame                        (2)
    out of it                                         x <- u + W * u,    u = every frame of x twice                 (3)
    in the middle, among the frames of each pixel     x <- x + Attention(N(x)), with rotary positions               (4)
    or there, among all pixels of all frames          x <- x + Attention(N(x));  x <- x + MLP(N(x))                 (5)

(2) comes before the image network halves the pixels and (3) after it has doubled them, so that everything between runs
on half as many frames. All W and the last layers of (4) and (5) start at zero: (1), (4) and (5) are the identity, (2)
and (3) pick and repeat frames, as in Lumiere. (4) is Lumiere's; what moves far between the frames of the middle is at
other pixels there, which (5) sees. So `inflation.inflate` carries the parameters of a `UNet` in, name by name.

What an inflated network computes. The image network asks its coarse layers about each frame. Layers that run on half
of the frames cannot answer for the other half, whatever the initialisation; so `phases` says which is wanted:

    'one'   the coarse levels see every second (fourth, ...) frame. An inflated network equals the image network on
            these frames, and on every frame of a clip whose frames are equal in groups of two (four, ...).
    'all'   (2) is computed at every frame, and its two phases, the even frames and the odd ones, go through the coarse
            levels as two clips of half the frame rate; (3) puts them together again. An inflated network equals the
            image network frame by frame, for every clip, at its full cost.

Both have the same parameters, so that training can start as the image network and go on, or sample, at the lower cost.
An image is a clip of one frame: no module over time is evaluated, and what remains is the image network.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array, OrNone, PyTree
from diffjax.nets.conditions import FrameRateEmbedding, check_frequencies, split_frame_rate
from diffjax.nets.layers import FlatDense, SelfAttention, check_choice, check_rank
from diffjax.nets.rotary import grid_positions, space_time_sizes, turns
from diffjax.nets.unet import UNet
from diffjax.nets.unet_blocks import ZEROS, GroupNorm, ResidualBlock, Style
from diffjax.nets.unet_condition import Told

PHASES = ('one', 'all')


class Clip(NamedTuple):
    """What the blocks of a clip are told, [B, ...] as for images, and its number of frames."""

    told: Told
    frames: int

    def at(self, h: jax.Array) -> Told:
        """The same for each frame of `h: [B frames, ...]`, or of as many as are left of them."""
        times = len(h) // len(self.told.c)
        return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), self.told)


class TemporalConv(nn.Module):
    """W of equations (1) to (3): `x: [B frames, H, W, C] -> [B frames / stride, H, W, C]`, zeros beside; zero at first.

    Output k is centred on frame `stride k`.
    """

    kernel_size: int
    frames: int
    compute_dtype: str
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width, channels = x.shape[1:]
        layer = nn.Conv(
            channels,
            (self.kernel_size, 1),
            strides=(self.stride, 1),
            padding=((self.kernel_size // 2, self.kernel_size // 2), (0, 0)),
            dtype=self.compute_dtype,
            kernel_init=ZEROS,
            name='conv',
        )
        return layer(x.reshape(-1, self.frames, height * width, channels)).reshape(-1, height, width, channels)


class TemporalBlock(nn.Module):
    """Equation (1): `x: [B frames, H, W, C]`, to the same."""

    kernel_size: int
    frames: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(GroupNorm(self.style.num_groups, self.style.norm_epsilon, name='norm')(x))
        return x + TemporalConv(self.kernel_size, self.frames, self.style.compute_dtype, name='time')(h)


class TemporalAttention(nn.Module):
    """Equation (4): `x: [B frames, H, W, C]`, to the same."""

    num_heads: int
    frames: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style, channels, shape = self.style, x.shape[-1], (-1, self.frames, x.shape[1] * x.shape[2], x.shape[-1])
        h = GroupNorm(style.num_groups, style.norm_epsilon, name='norm')(x)
        h = h.reshape(shape).swapaxes(1, 2).reshape(-1, self.frames, channels)
        by = turns(np.arange(self.frames)[:, None], (channels // self.num_heads,))
        attend = SelfAttention(self.num_heads, style.compute_dtype, style.attention, ZEROS, name='attention')
        h = attend(h, tuple(map(jnp.asarray, by)))
        return x + h.reshape(-1, shape[2], self.frames, channels).swapaxes(1, 2).reshape(x.shape)


class SpaceTimeAttention(nn.Module):
    """Equation (5): `x: [B frames, H, W, C]`, to the same. The MLP is twice as wide."""

    num_heads: int
    frames: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style, (_, height, width, channels) = self.style, x.shape
        by = turns(grid_positions(self.frames, height, width), space_time_sizes(channels // self.num_heads))

        def tokens(x, name):
            h = GroupNorm(style.num_groups, style.norm_epsilon, name=name)(x)
            return h.reshape(-1, self.frames * height * width, channels)

        attend = SelfAttention(self.num_heads, style.compute_dtype, style.attention, ZEROS, name='attention')
        x = x + attend(tokens(x, 'norm'), tuple(map(jnp.asarray, by))).reshape(x.shape)
        h = nn.silu(FlatDense(2 * channels, dtype=style.compute_dtype, name='mlp_in')(tokens(x, 'mlp_norm')))
        h = FlatDense(channels, dtype=style.compute_dtype, kernel_init=ZEROS, name='mlp_out')(h)
        return x + h.reshape(x.shape)


ATTENTION = {'time': TemporalAttention, 'space_time': SpaceTimeAttention}


class SpaceTimeUNet(UNet, kw_only=True):
    """The U-Net of clips: `x: [B, T, H, W, C], t: [B], cond -> [B, T, H, W, out_channels]`.

    T is 1, or a multiple of 2 for each level of `temporal_downsampling`. cond: as for `UNet`, or a dict that has
    'frame_rate' [B] beside it (labels are 'label' there).

    temporal_downsampling   levels, from 1 on, into which frames are halved; () for none
    phases                  'one' or 'all': the frames that the coarse levels see, as above
    temporal_kernel         of all W, odd; 0 for no convolutions over time: frames are picked and repeated
    temporal_attention      how many blocks (4), or (5), there are
    attention_over          'time': (4); 'space_time': (5)
    frame_rate_frequencies  features of the frame rate, even; 0 for a network that knows none

    With () and 0 and 0 it makes each frame by itself: the frame-by-frame image model. Other fields: see `UNet`.
    """

    temporal_downsampling: Sequence[int]
    phases: str = 'one'
    temporal_kernel: OrNone = 3
    temporal_attention: OrNone = 1
    attention_over: str = 'time'
    frame_rate_frequencies: int = 0

    def __post_init__(self):
        self.temporal_downsampling = tuple(self.temporal_downsampling)
        check_choice('phases', self.phases, PHASES)
        check_choice('attention_over', self.attention_over, tuple(ATTENTION))
        check_frequencies(self.frame_rate_frequencies)
        super().__post_init__()
        levels = len(self.channel_multipliers)
        wrong = [level for level in self.temporal_downsampling if not 0 < level < levels]
        if wrong or len(set(self.temporal_downsampling)) < len(self.temporal_downsampling):
            given = f'temporal_downsampling={self.temporal_downsampling}'
            raise ValueError(f'{given} must name different levels from 1 to {levels - 1}, into which frames are halved')
        if self.temporal_kernel != 0 and self.temporal_kernel % 2 != 1 or self.temporal_kernel < 0:
            raise ValueError(f'temporal_kernel={self.temporal_kernel} must be odd, or 0 for no convolutions over time')
        if self.temporal_attention < 0:
            raise ValueError(f'temporal_attention={self.temporal_attention} must be a number of blocks, from 0 on')
        size = self._widths[-1] // self._num_heads(levels - 1, self._widths[-1])
        if self.temporal_attention and size % 2:
            raise ValueError(f'rotary positions turn pairs of features; heads of the last level have {size}')
        if self.temporal_attention and self.attention_over == 'space_time' and (size % 4 or size < 8):
            wanted = 'heads of a multiple of 4 features, at least 8, to be turned by time, rows and columns'
            raise ValueError(f"attention_over='space_time' needs {wanted}; those of the last level have {size}")

    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        check_rank('SpaceTimeUNet', x, '[B, T, H, W, C]')
        frames, multiple = x.shape[1], 2 ** len(self.temporal_downsampling)
        if frames > 1 and frames % multiple:
            given = f'temporal_downsampling={self.temporal_downsampling}'
            raise ValueError(f'the number of frames must be 1 or a multiple of {multiple} ({given}), got {frames}')
        if frames == 1 and self.is_initializing():  # parameters are those of clips, whatever the first batch holds
            x = jnp.repeat(x, 2 * multiple, axis=1)
        out = super().__call__(x.reshape(-1, *x.shape[2:]), t, cond, deterministic=deterministic)
        return out.reshape(*x.shape[:-1], -1)

    def _told(self, x: Array, t: Array, cond: PyTree) -> Clip:
        cond, frame_rate = split_frame_rate('SpaceTimeUNet', cond, t, self.frame_rate_frequencies)
        told = super()._told(x, t, cond)
        if frame_rate is None and self.is_initializing():
            frame_rate = jnp.zeros_like(t)
        if frame_rate is not None and self.frame_rate_frequencies:
            embed = FrameRateEmbedding(told.c.shape[-1], self.frame_rate_frequencies, name='frame_rate')
            told = told._replace(c=told.c + embed(frame_rate))
        return Clip(told, len(x) // len(t))

    def _block(self, h: jax.Array, told: Clip, style: Style, level: int, width: int, name: str) -> jax.Array:
        h = super()._block(h, told.at(h), style, level, width, name)
        return self._over_time(h, told, style, level, f'{name}_temporal')

    def _middle(self, h: jax.Array, told: Clip, style: Style) -> jax.Array:
        level, width, each = len(self._widths) - 1, h.shape[-1], told.at(h)
        h = self._remat(ResidualBlock)(width, style, name='middle_in')(h, each.c)
        if self.middle_attention != 'none':
            h = self._attend(h, each, style, level, 'middle_attention', normalised=self.middle_attention != 'plain')
        h = self._over_time(h, told, style, level, 'middle_in_temporal')
        if told.frames > 1:
            block, heads = self._remat(ATTENTION[self.attention_over]), self._num_heads(level, width)
            for i in range(self.temporal_attention):
                h = block(heads, self._frames(told, level), style, name=f'middle_temporal_attention_{i}')(h)
        h = self._remat(ResidualBlock)(width, style, name='middle_out')(h, each.c)
        return self._over_time(h, told, style, level, 'middle_out_temporal')

    def _over_time(self, h: jax.Array, told: Clip, style: Style, level: int, name: str) -> jax.Array:
        if told.frames == 1 or not self.temporal_kernel:
            return h
        return self._remat(TemporalBlock)(self.temporal_kernel, self._frames(told, level), style, name=name)(h)

    def _resample(self, h: jax.Array, told: Clip, style: Style, way: str, level: int) -> jax.Array:
        """Down into a level, first in time, or up out of it, last in time."""
        halved = told.frames > 1 and level in self.temporal_downsampling
        if way == 'down' and halved:
            h = self._fewer_frames(h, told, style, level)
        h = super()._resample(h, told.at(h), style, way, level)
        return self._more_frames(h, told, style, level) if way == 'up' and halved else h

    def _fewer_frames(self, h: jax.Array, told: Clip, style: Style, level: int) -> jax.Array:
        """Equation (2); 'all' has the phase right after the batch in the first axis, each a clip of its own."""
        frames, every = self._frames(told, level - 1), self.phases == 'all'
        pairs = h.reshape(-1, frames // 2, 2, *h.shape[1:])
        kept = h if every else pairs[:, :, 0].reshape(-1, *h.shape[1:])
        if self.temporal_kernel:
            convolve = self._convolve(frames, style, f'down_{level}_time', 1 if every else 2)
            kept = kept + convolve(h)
        return kept.reshape(pairs.shape).swapaxes(1, 2).reshape(h.shape) if every else kept

    def _more_frames(self, h: jax.Array, told: Clip, style: Style, level: int) -> jax.Array:
        """Equation (3)."""
        frames, shape = self._frames(told, level - 1), h.shape[1:]
        if self.phases == 'all':
            h = h.reshape(-1, 2, frames // 2, *shape).swapaxes(1, 2).reshape(-1, *shape)
        else:
            h = jnp.repeat(h, 2, axis=0)
        return h + self._convolve(frames, style, f'up_{level}_time', 1)(h) if self.temporal_kernel else h

    def _convolve(self, frames: int, style: Style, name: str, stride: int) -> TemporalConv:
        return TemporalConv(self.temporal_kernel, frames, style.compute_dtype, stride, name=name)

    def _frames(self, told: Clip, level: int) -> int:
        """Of each clip in a level."""
        return told.frames // 2 ** sum(other <= level for other in self.temporal_downsampling)
