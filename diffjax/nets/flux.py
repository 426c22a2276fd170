"""Flux, the transformer of FLUX.1 (Black Forest Labs 2024): joint blocks, then single blocks, over rotated heads.

The layers are those of `nets/joint_blocks.py`. Text and image go through `depth` joint blocks as two streams, then
through `single_depth` single blocks as one sequence, of which the image's tokens are the output. Queries and keys are
normalised and turned by angles: a token has three ids, (0, 0, 0) for text and (0, row, column) for the image's patches,
and the ids are positions along three axes that share the features of a head as `rope_sizes` says.

Patches are 2 x 2 pixels of the latents, in rows; their four pixels are the features of a token. Published weights hold
these features channel by channel ("packed" latents) and ours pixel by pixel; `weights/flux.py` puts them in order.

    published            depth  single   width  heads   parameters    forward of 128 x 128 x 16, S = 512
    FLUX.1 dev              19      38    3072     24       11.90 B    guidance embedded; 37.2 T multiply-adds
    FLUX.1 schnell          19      38    3072     24       11.89 B    distilled to 1 to 4 steps

They are trained with `flow` and `velocity` and are told t on the scale 0 to 1000, where t is the noise's share after
any shift of the grid: sample them with the schedule `flow` and the grid `dynamic_shift` (dev) or `uniform` (schnell).
"""

from collections.abc import Sequence

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
    SingleBlock,
    TextCondition,
    Tokens,
    joint_mask,
)
from diffjax.nets.layers import ATTENTION_IMPLEMENTATIONS, COMPUTE_DTYPES, FlatDense, check_choice, check_rank
from diffjax.nets.rotary import turns
from diffjax.nets.stacking import REMAT_POLICIES, check_scan_layers, trunk

PATCH_SIZE = 2
GUIDANCES = ('none', 'embedded')


class Flux(nn.Module, kw_only=True):
    """Flux: `x: [B, H, W, C], t: [B] in 0..1000, cond -> [B, H, W, out_channels]`, H and W multiples of 2.

    cond: {'text': [B, S, text_size], 'pooled': [B, pooled_size]}; with `guidance='embedded'` also 'guidance': [B], the
    scale that a distilled network imitates; and, where not all tokens are there, 'text_mask': [B, S]. Or, with
    `num_classes > 0`, labels int32 [B], each of which learns `num_label_tokens` tokens of text.

    `rope_sizes`: features of a head for each id, even numbers whose sum is `hidden_size / num_heads`.
    Parameters: `double_blocks_i` and `single_blocks_i`, stacked as `scan_layers` says (nets/stacking.py).
    """

    hidden_size: int
    depth: int
    single_depth: int
    num_heads: int
    rope_sizes: Sequence[int] = (16, 56, 56)
    text_size: int = 4096
    pooled_size: int = 768
    guidance: str = 'none'
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
        check_choice('guidance', self.guidance, GUIDANCES)
        if self.depth < 1 or self.single_depth < 1:
            raise ValueError(f'depth={self.depth} and single_depth={self.single_depth} must be at least 1')
        sizes = self.rope_sizes = tuple(self.rope_sizes)  # a config has a list, which has no hash
        if len(sizes) != 3 or any(size % 2 or size < 2 for size in sizes):
            raise ValueError(f'rope_sizes are three even numbers, as in (16, 56, 56); got {sizes}')
        if self.hidden_size != self.num_heads * sum(sizes):
            raise ValueError(
                f'hidden_size={self.hidden_size} must be {self.num_heads * sum(sizes)}: '
                f'num_heads={self.num_heads} heads of {sum(sizes)} features, the sum of rope_sizes'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published Flux has no dropout
        check_rank('Flux', x, '[B, H, W, C]')
        p, (height, width) = PATCH_SIZE, x.shape[1:3]
        if height % p or width % p:
            raise ValueError(f'Flux takes x of even height and width, got {height}x{width}')
        text, c, cond = TextCondition(
            'Flux',
            self.hidden_size,
            self.num_classes,
            self.num_label_tokens,
            self.text_size,
            self.pooled_size,
            self.compute_dtype,
            self.guidance,
            name='condition',
        )(t, cond)
        image = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='patch_embed')(patchify(jnp.asarray(x), p))
        rotation = turns(token_ids(text.shape[1], height // p, width // p), self.rope_sizes)
        context = Context(c, tuple(map(jnp.asarray, rotation)), joint_mask(cond, image.shape[1]))
        image = self._trunk(Tokens(text, image), context)[:, text.shape[1] :]
        patches = ModulatedOutput(p * p * self.out_channels, name='final')(image, c)
        return unpatchify(patches, p, height, width)

    def _trunk(self, tokens: Tokens, context: Context) -> jax.Array:
        fields = {'num_heads': self.num_heads, 'compute_dtype': self.compute_dtype, 'attention': self.attention}
        how = {'scan_layers': self.scan_layers, 'remat': self.remat}
        double = fields | {'qk_norm': 'rms'}
        tokens = trunk(JointBlock, double, tokens, context, depth=self.depth, name='double_blocks', **how)
        depth = self.single_depth
        return trunk(SingleBlock, fields, tokens.joined(), context, depth=depth, name='single_blocks', **how)


def token_ids(num_text: int, rows: int, columns: int) -> np.ndarray:
    """`[num_text + rows * columns, 3]`: zeros for text, then (0, row, column), row by row."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([np.zeros((num_text, 3)), np.stack([0 * row, row, column], axis=-1)])
