"""VideoDiT: the diffusion transformer of clips, from the layers of dit.py and dit_blocks.py.

A clip is cut into space-time patches of r frames by p x p pixels, each a token (the tubelets of ViViT, Arnab et al.
2021, arXiv:2103.15691, section 3.2; Latte, Ma et al. 2024, arXiv:2401.03048).

    'factorised'   a block is DiT's, among the tokens of each frame, and then, among the tokens of each place,
                       x <- x + Attention(N(x))                                                                     (1)
                   with the positions in time rotary and the last layer zero at first
    'full'         a block is DiT's, among all tokens

Attention is 2 L^2 D multiply-adds of L tokens: T' frames of L tokens cost 2 T' L (L + T') D factorised, and
2 T' L (T' L) D in full. Positions in space are DiT's: a table, rotary, or both. Those in time are rotary, so that clips
of any length go in: each head's features in (1), and in full attention too, where positions in space are but a table;
else the features of a head are shared between time, rows and columns.

Parameters have DiT's names, so that `inflation.inflate` carries those of an image DiT in: a factorised VideoDiT with
r = 1 then makes each frame as the image DiT would. An image is a clip of one frame: (1) is not evaluated, and with
r > 1 it stands in for r equal frames, and what is made of it is their mean. So a VideoDiT sees an image as DiT does,
unless attention in full shares a head's features with time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.conditions import FrameRateEmbedding, check_frequencies, split_frame_rate
from diffjax.nets.dit import DiT, check_patches, patchify, unpatchify
from diffjax.nets.dit_blocks import (
    ZEROS,
    Context,
    DiTBlock,
    modulation_table,
    shared_modulations,
    token_norm,
)
from diffjax.nets.layers import ConditionEmbedding, FlatDense, SelfAttention, check_choice, check_rank, modulate
from diffjax.nets.rotary import Turns, grid_positions, space_time_sizes, turns
from diffjax.nets.stacking import trunk

SPACE_TIME = ('factorised', 'full')


class ClipContext(NamedTuple):
    """What a factorised block is told: what DiT's block is, for each frame, and the turns of q and k over time."""

    frame: Context
    turns: Turns


class FactorisedBlock(DiTBlock, kw_only=True):
    """DiT's block in each frame, then equation (1): `x: [B frames, L, D] -> ([B frames, L, D], None)`.

    frames: of each clip; 0 for images, for which (1) is not evaluated.
    """

    frames: int

    @nn.compact
    def __call__(self, x: jax.Array, context: ClipContext) -> tuple[jax.Array, None]:
        x, _ = super().__call__(x, context.frame)
        if self.frames == 0:
            return x, None
        style, (_, length, size) = self.style, x.shape
        h = token_norm(x, style.norm, 'norm_time').astype(x.dtype)
        h = h.reshape(-1, self.frames, length, size).swapaxes(1, 2).reshape(-1, self.frames, size)
        fields = (style.num_heads, style.compute_dtype, style.attention, ZEROS, style.qk_norm)
        h = SelfAttention(*fields, name='time_attention')(h, context.turns)
        return x + h.reshape(-1, length, self.frames, size).swapaxes(1, 2).reshape(x.shape), None


class VideoDiT(DiT, kw_only=True):
    """The diffusion transformer of clips: `x: [B, T, H, W, C], t: [B], cond -> [B, T, H, W, out_channels]`.

    T is 1, or a multiple of `temporal_patch_size`. cond: int32 labels [B], None without classes, or a dict with
    'frame_rate' [B] and, with classes, 'label'.

    space_time              'factorised' or 'full' attention
    frame_rate_frequencies  features of the frame rate, even; 0 for a network that knows none

    Other fields: see `DiT`. Register tokens stand in each frame.
    """

    temporal_patch_size: int = 1
    space_time: str = 'factorised'
    frame_rate_frequencies: int = 0

    def __post_init__(self):
        check_choice('space_time', self.space_time, SPACE_TIME)
        check_frequencies(self.frame_rate_frequencies)
        super().__post_init__()
        size = self.hidden_size // self.num_heads
        least = 8 if self.space_time == 'full' and self.positions != 'sincos' else 2
        if size % 2 or size < least:
            right = f'an even number of features, at least {least}, to be turned by positions'
            raise ValueError(
                f'a head needs {right}; hidden_size={self.hidden_size} and num_heads={self.num_heads} make {size}'
            )

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published DiTs have no dropout
        self._check(x)
        image, p, r, (height, width) = x.shape[1] == 1, self.patch_size, self.temporal_patch_size, x.shape[2:4]
        x = jnp.repeat(x, r, axis=1) if image else jnp.asarray(x)
        frames, rows, columns = x.shape[1] // r, height // p, width // p
        patches = patchify(x.reshape(-1, *x.shape[2:]), p)  # [B T, L, p p C]
        patches = patches.reshape(-1, r, *patches.shape[1:]).swapaxes(1, 2).reshape(len(t) * frames, rows * columns, -1)
        tokens = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='patch_embed')(patches)
        if self.positions != 'rope':
            tokens = tokens + self._table(rows, columns).astype(tokens.dtype)
        tokens = self._with_registers(tokens)

        condition = self._condition(t, cond)
        c = nn.silu(condition)
        told = c if self.conditioning == 'adaln' else shared_modulations(c)
        blocks = self._in_full if self.space_time == 'full' else self._factorised
        tokens = blocks(tokens, told, (frames, rows, columns), with_time=not image or self.is_initializing())
        tokens = tokens[:, self.num_registers :].reshape(len(t), -1, self.hidden_size)

        tokens = modulate(token_norm(tokens, self.norm, 'final_norm'), *self._final_modulations(c, condition))
        out = FlatDense(r * p * p * self.out_channels, dtype=jnp.float32, kernel_init=ZEROS, name='final')(tokens)
        out = out.reshape(-1, rows * columns, r, p * p * self.out_channels).swapaxes(1, 2)
        out = unpatchify(out.reshape(-1, *out.shape[2:]), p, height, width).reshape(*x.shape[:4], -1)
        return out.mean(1, keepdims=True) if image else out

    def _condition(self, t: Array, cond: PyTree) -> jax.Array:
        cond, frame_rate = split_frame_rate('VideoDiT', cond, t, self.frame_rate_frequencies)
        embedding = ConditionEmbedding(
            self.hidden_size, self.num_classes, frequency_shift=self.frequency_shift, name='condition'
        )
        h = embedding(t, cond)
        if frame_rate is None and self.is_initializing():
            frame_rate = jnp.zeros_like(t)
        if frame_rate is None or not self.frame_rate_frequencies:
            return h
        return h + FrameRateEmbedding(self.hidden_size, self.frame_rate_frequencies, name='frame_rate')(frame_rate)

    def _factorised(
        self, tokens: jax.Array, told: jax.Array, grid: tuple[int, int, int], *, with_time: bool
    ) -> jax.Array:
        """Blocks over `tokens: [B frames, L, D]`."""
        frames = grid[0]
        over_time = turns(grid_positions(frames), (self.hidden_size // self.num_heads,))
        frame = Context(jnp.repeat(told, frames, axis=0), self._turns(*grid[1:]))
        context = ClipContext(frame, tuple(map(jnp.asarray, over_time)))
        fields = {'style': self._style(), 'frames': frames if with_time else 0}
        return trunk(FactorisedBlock, fields, tokens, context, **self._depth())

    def _in_full(self, tokens: jax.Array, told: jax.Array, grid: tuple[int, int, int], *, with_time: bool) -> jax.Array:
        """The same, among all tokens of a clip; an image needs nothing left out."""
        del with_time
        size, positions = self.hidden_size // self.num_heads, grid_positions(*grid).reshape(grid[0], -1, 3)
        registers = np.zeros((grid[0], self.num_registers, 3))  # in the middle of nowhere, but in their frame
        registers[..., 0] = np.arange(grid[0])[:, None]
        positions = np.concatenate([registers, positions], axis=1).reshape(-1, 3)
        sizes = (size, 0, 0) if self.positions == 'sincos' else space_time_sizes(size)
        context = Context(told, tuple(map(jnp.asarray, turns(positions, sizes))))
        h = tokens.reshape(len(told), -1, self.hidden_size)
        return trunk(DiTBlock, {'style': self._style()}, h, context, **self._depth()).reshape(tokens.shape)

    def _depth(self) -> dict:
        return {'depth': self.depth, 'scan_layers': self.scan_layers, 'remat': self.remat}

    def _final_modulations(self, c: jax.Array, condition: jax.Array) -> list[jax.Array]:
        if self.conditioning == 'adaln':
            told = FlatDense(2 * self.hidden_size, dtype=jnp.float32, kernel_init=ZEROS, name='final_modulation')(c)
        else:
            table = modulation_table(self, 'final_modulation_table', 2, self.hidden_size)
            told = jnp.tile(condition, 2) + table.reshape(-1)
        return jnp.split(told, 2, axis=-1)

    def _check(self, x: Array) -> None:
        check_rank('VideoDiT', x, '[B, T, H, W, C]')
        check_patches(x[:, 0], self.patch_size)
        if x.shape[1] > 1 and x.shape[1] % self.temporal_patch_size:
            right = f'1 or a multiple of temporal_patch_size={self.temporal_patch_size}'
            raise ValueError(f'the number of frames must be {right}, got {x.shape[1]}')
