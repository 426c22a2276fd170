"""MM-DiT, the two-stream transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 4).

Tokens of the image and of the text go through joint blocks (`nets/joint_blocks.py`); time and the pooled text modulate
them. The output is read from the image's tokens; the last block leaves the text as it came.

Image tokens are patches of p x p pixels, to which a fixed table is added (their section 5.3.2, "positional encodings
for varying aspect ratios"): sines and cosines on a square grid of M x M, of which an image of any shape takes the
centre. With s tokens along a side of a usual image, row and column i of the table stand at

    p_i = (i - (M - s) / 2) 16 / s                                                                                  (1)

so that such an image covers 0 to 16. The table stands among the parameters as `pos_embed`, because published
checkpoints bring their own; its gradient is zero, and the counts below leave it out.

    published                    depth  width  heads  dual  QK-norm  parameters   forward of 128 x 128 x 16, S = 154
    Stable Diffusion 3 medium       24   1536     24     0  none         2.03 B    4.2 T multiply-adds
    Stable Diffusion 3.5 medium     24   1536     24    13  rms          2.24 B    5.4 T
    Stable Diffusion 3.5 large      38   2432     38     0  rms          8.06 B   14.8 T

They are trained with `flow` and `velocity`, and are told t on the scale 0 to 1000, where t is the noise's share after
any shift of the grid: sample them with the schedule `flow` and the grid `shifted`, not with a shifted schedule.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.dit import patchify, unpatchify
from diffjax.nets.joint_blocks import (
    Context,
    JointBlock,
    ModulatedOutput,
    TextCondition,
    Tokens,
    joint_mask,
)
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    QK_NORMS,
    FlatDense,
    check_choice,
    check_rank,
    sincos_line,
)
from diffjax.nets.stacking import REMAT_POLICIES, check_scan_layers, trunk

GRID_UNITS = 16  # a usual image covers positions 0 to 16: the tokens of 256 pixels, at which the paper's scale is 1


class MMDiT(nn.Module, kw_only=True):
    """MM-DiT: `x: [B, H, W, C], t: [B] in 0..1000, cond -> [B, H, W, out_channels]`.

    cond: {'text': [B, S, text_size], 'pooled': [B, pooled_size]} and, where not all tokens are there, 'text_mask':
    [B, S]; or, with `num_classes > 0`, labels int32 [B], each of which learns `num_label_tokens` tokens of text.

    H and W are multiples of `patch_size`, at most `pos_embed_max_size` times it; `pos_embed_base_size` is s of (1).
    `qk_norm`: 'none', 'rms' or 'layer'. The first `num_dual_blocks` blocks also have an attention among the tokens of
    the image. Parameters: `dual_blocks_i`, `blocks_i` and `last_block`; `scan_layers`, see nets/stacking.py, is about
    the first two.
    """

    patch_size: int = 2
    hidden_size: int
    depth: int
    num_heads: int
    num_dual_blocks: int = 0
    qk_norm: str = 'none'
    pos_embed_max_size: int = 192
    pos_embed_base_size: int = 64
    text_size: int = 4096
    pooled_size: int = 2048
    num_classes: int = 0
    num_label_tokens: int = 4
    out_channels: int
    compute_dtype: str = 'float32'
    scan_layers: bool | str = 'auto'
    remat: str = 'none'
    attention: str = 'auto'

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        check_scan_layers(self.scan_layers)
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        check_choice('qk_norm', self.qk_norm, QK_NORMS)
        for divisor, reason in ((self.num_heads, 'num_heads'), (4, 'two-dimensional positions need it')):
            if self.hidden_size % divisor:
                right = divisor * max(1, round(self.hidden_size / divisor))
                given = f'hidden_size={self.hidden_size}'
                raise ValueError(f'{given} must be a multiple of {divisor} ({reason}), for example {right}')
        if self.depth < 1:
            raise ValueError(f'depth={self.depth} must be at least 1')
        if not 0 <= self.num_dual_blocks < self.depth:
            raise ValueError(
                f'num_dual_blocks={self.num_dual_blocks} must lie between 0 and {self.depth - 1}: '
                f'depth={self.depth}, and the last block has none'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published MM-DiTs have no dropout
        self._check_size(x)
        p, (height, width) = self.patch_size, x.shape[1:3]
        text, c, cond = TextCondition(
            'MMDiT',
            self.hidden_size,
            self.num_classes,
            self.num_label_tokens,
            self.text_size,
            self.pooled_size,
            self.compute_dtype,
            name='condition',
        )(t, cond)
        image = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='patch_embed')(patchify(jnp.asarray(x), p))
        image = image + self._positions(height // p, width // p).astype(image.dtype)
        context = Context(c, mask=joint_mask(cond, image.shape[1]))
        image = self._trunk(Tokens(text, image), context).image
        patches = ModulatedOutput(p * p * self.out_channels, name='final')(image, c)
        return unpatchify(patches, p, height, width)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        size, base = self.pos_embed_max_size, self.pos_embed_base_size

        def table(key: jax.Array) -> jax.Array:
            del key  # fixed
            places = (np.arange(size) - (size - base) / 2) * GRID_UNITS / base
            line = jnp.asarray(sincos_line(self.hidden_size // 2, places))
            columns, rows = jnp.broadcast_to(line, (size, *line.shape)), jnp.repeat(line, size, axis=0)
            return jnp.concatenate([columns.reshape(rows.shape), rows], axis=-1)

        positions = jax.lax.stop_gradient(self.param('pos_embed', table)).reshape(size, size, -1)
        top, left = (size - rows) // 2, (size - columns) // 2
        return positions[top : top + rows, left : left + columns].reshape(rows * columns, -1)

    def _trunk(self, tokens: Tokens, context: Context) -> Tokens:
        fields = {
            'num_heads': self.num_heads,
            'qk_norm': self.qk_norm,
            'compute_dtype': self.compute_dtype,
            'attention': self.attention,
        }
        how = {'scan_layers': self.scan_layers, 'remat': self.remat}
        dual, joint = self.num_dual_blocks, self.depth - self.num_dual_blocks - 1
        tokens = trunk(JointBlock, fields | {'kind': 'dual'}, tokens, context, depth=dual, name='dual_blocks', **how)
        tokens = trunk(JointBlock, fields, tokens, context, depth=joint, **how)
        last = JointBlock if self.remat == 'none' else nn.remat(JointBlock, policy=REMAT_POLICIES[self.remat])
        return last(**fields, kind='last', name='last_block')(tokens, context)[0]

    def _check_size(self, x: Array) -> None:
        check_rank('MMDiT', x, '[B, H, W, C]')
        p, most = self.patch_size, self.patch_size * self.pos_embed_max_size
        if any(side % p or side > most for side in x.shape[1:3]):
            right = f'height and width must be multiples of patch_size={p} up to {most}'
            raise ValueError(f'{right} (pos_embed_max_size={self.pos_embed_max_size}), got {x.shape[1]}x{x.shape[2]}')
