"""PixArt-alpha, a DiT that looks at text (Chen et al. 2023, arXiv:2310.00426, section 2.3).

Blocks are those of DiT (`nets/dit_blocks.py`) with shared modulations ("adaLN-single") and, between attention and MLP,
cross-attention to the text's tokens, which a two-layer MLP has brought to the width of the network. Each image of the
1024 model is also told its height and width in pixels and its aspect ratio, embedded as the time is and added to it.

Positions are fixed sines and cosines, stretched so that an image of any size covers the range of a usual one: with s
tokens along a side of a usual image and n of the image at hand, token i stands at

    p_i = i s / (n m),      m = interpolation_scale (1 at 512 pixels, 2 at 1024)                                    (1)

They follow from the shapes and are no parameters.

    published              depth  width  heads   s   parameters   forward pass with 120 tokens of text
    PixArt-XL-2-256           28   1152     16  16      610.9 M     149 G multiply-adds on 32 x 32 x 4
    PixArt-XL-2-512           28   1152     16  32      610.9 M     618 G on 64 x 64 x 4
    PixArt-XL-2-1024-MS       28   1152     16  64      611.3 M    3255 G on 128 x 128 x 4

PixArt-Sigma (arXiv:2403.04692) is the 1024 model without the sizes, with 300 tokens of text and another autoencoder.
They are trained with linear betas and eps, with a learned variance (8 channels out), and are told t from 0 to 1000.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.conditions import LabelTokens, check_condition
from diffjax.nets.dit import check_patches, patchify, unpatchify
from diffjax.nets.dit_blocks import (
    ZEROS,
    BlockStyle,
    Context,
    DiTBlock,
    check_style,
    layer_norm,
    modulation_table,
    shared_modulations,
)
from diffjax.nets.layers import FlatDense, TimestepEmbedding, check_choice, check_rank, modulate, sincos_line
from diffjax.nets.stacking import REMAT_POLICIES, check_scan_layers, trunk

SIZE_CONDITIONS = ('none', 'embedded')
PIXELS = 8  # of an image along a side of a latent: what labels are told of sizes


class PixArt(nn.Module, kw_only=True):
    """PixArt-alpha: `x: [B, H, W, C], t: [B] in 0..1000, cond -> [B, H, W, out_channels]`.

    cond: {'text': [B, S, text_size]}, where not all tokens are there 'text_mask': [B, S], and with
    `size_conditions='embedded'` (the 1024 model) 'resolution': [B, 2], height and width in pixels, and 'aspect_ratio':
    [B, 1], height / width. Or, with `num_classes > 0`, labels int32 [B], each of which learns `num_label_tokens` tokens
    of text, and sizes are those of x.

    H and W are multiples of `patch_size`; `base_size` and `interpolation_scale` are s and m of (1). `scan_layers` and
    `remat`: see nets/stacking.py.
    """

    patch_size: int = 2
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    text_size: int = 4096
    size_conditions: str = 'none'
    base_size: int = 32
    interpolation_scale: float = 1.0
    num_classes: int = 0
    num_label_tokens: int = 4
    out_channels: int
    compute_dtype: str = 'float32'
    scan_layers: bool | str = 'auto'
    remat: str = 'none'
    attention: str = 'auto'

    def __post_init__(self):
        check_style(self._style(), self.hidden_size)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        check_choice('size_conditions', self.size_conditions, SIZE_CONDITIONS)
        check_scan_layers(self.scan_layers)
        if self.size_conditions == 'embedded' and self.hidden_size % 3:
            raise ValueError(
                f'hidden_size={self.hidden_size} must be a multiple of 3, for example {self.hidden_size // 3 * 3}: '
                'height, width and aspect ratio share the embedding of sizes'
            )
        super().__post_init__()

    def _style(self) -> BlockStyle:
        return BlockStyle(
            self.num_heads, self.mlp_ratio, self.compute_dtype, self.attention, conditioning='adaln_single'
        )

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published PixArt has no dropout
        check_rank('PixArt', x, '[B, H, W, C]')
        check_patches(x, self.patch_size)
        (height, width), p, size = x.shape[1:3], self.patch_size, self.hidden_size
        cond = self._as_dict(x, t, cond)
        tokens = FlatDense(size, dtype=self.compute_dtype, name='patch_embed')(patchify(jnp.asarray(x), p))
        tokens = tokens + self._positions(height // p, width // p).astype(tokens.dtype)
        condition = self._condition(t, cond)
        text = FlatDense(size, dtype=self.compute_dtype, name='text_in')(jnp.asarray(cond['text']))
        text = FlatDense(size, dtype=self.compute_dtype, name='text_out')(nn.gelu(text, approximate=True))

        context = Context(shared_modulations(nn.silu(condition)), None, text, cond.get('text_mask'))
        how = {'depth': self.depth, 'scan_layers': self.scan_layers, 'remat': self.remat}
        tokens = trunk(DiTBlock, {'style': self._style(), 'cross_attention': True}, tokens, context, **how)

        told = jnp.tile(condition, 2) + modulation_table(self, 'final_modulation_table', 2, size).reshape(-1)
        tokens = modulate(layer_norm(tokens), *jnp.split(told, 2, axis=-1))
        tokens = FlatDense(p * p * self.out_channels, dtype=jnp.float32, kernel_init=ZEROS, name='final')(tokens)
        return unpatchify(tokens, p, height, width)

    def _condition(self, t: Array, cond: dict[str, Array]) -> jax.Array:
        """Time and sizes, [B, D]."""
        c = TimestepEmbedding(self.hidden_size, name='time')(t)
        if self.size_conditions == 'none':
            return c
        parts = []
        for name in ('resolution', 'aspect_ratio'):
            values = jnp.asarray(cond[name], jnp.float32)
            embedded = TimestepEmbedding(self.hidden_size // 3, name=name)(values.reshape(-1))
            parts.append(embedded.reshape(values.shape[0], -1))
        return c + jnp.concatenate(parts, axis=-1)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        def along(n: int) -> np.ndarray:
            places = np.arange(n) * self.base_size / (n * self.interpolation_scale)
            return sincos_line(self.hidden_size // 2, places)

        row, column = np.divmod(np.arange(rows * columns), columns)
        return jnp.asarray(np.concatenate([along(columns)[column], along(rows)[row]], axis=-1))

    def _as_dict(self, x: Array, t: Array, cond: PyTree) -> dict[str, Array]:
        if jnp.ndim(t) != 1:
            raise ValueError(f't must be one time for each sample, shape [B]; got shape {jnp.shape(t)}')
        sized = self.size_conditions == 'embedded'
        if self.num_classes > 0 and cond is not None and not isinstance(cond, dict):
            if jnp.shape(cond) != jnp.shape(t) or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
                given = f'{jnp.result_type(cond)} of shape {jnp.shape(cond)}'
                raise ValueError(f'PixArt takes labels as integers of shape {jnp.shape(t)}, got {given}')
            cond = LabelTokens(self.num_classes, self.num_label_tokens, self.text_size, name='label')(cond)
            height, width = (PIXELS * side for side in x.shape[1:3])
            sizes = {'resolution': (height, width), 'aspect_ratio': (height / width,)} if sized else {}
            return cond | {name: jnp.tile(jnp.float32(value), (t.shape[0], 1)) for name, value in sizes.items()}
        required = {'text': f'[B, S, {self.text_size}]'}
        required |= {'resolution': '[B, 2]', 'aspect_ratio': '[B, 1]'} if sized else {}
        check_condition('PixArt', cond, required, {'text_mask': '[B, S]'})
        for name, last in (('text', self.text_size), ('resolution', 2), ('aspect_ratio', 1)):
            if name in cond and cond[name].shape[-1] != last:
                raise ValueError(f'PixArt takes cond[{name!r}] of shape {required[name]}, got {jnp.shape(cond[name])}')
        return cond
