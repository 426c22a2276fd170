"""U-ViT, a transformer that treats all it is told as tokens, with long skips (Bao et al. 2023, arXiv:2209.12152).

The tokens are the label, the time (its sinusoids as they are), and patches of p x p pixels; learned positions are added
to all. They go through n blocks down, one in the middle, and n up; block i from the end takes what block i from the
start gave, by concatenation and a linear layer (section 3.1):

    x <- Linear([x, skip])                                                                    on the way up         (1)
    x <- x + Attention(LN(x));    x <- x + MLP(LN(x))                                                               (2)

A linear layer turns the patches' tokens into pixels, and a 3 x 3 convolution smooths what shows of the patches.

    published                          depth  width  heads   parameters   multiply-adds of the forward pass
    U-ViT-S/2 on 32 x 32 x 3 (CIFAR)      13    512      8       44.3 M    12.2 G
    U-ViT-M/4 on 64 x 64 x 3              17    768     12      130.9 M    35.2 G
    U-ViT-L/2 on 32 x 32 x 4              21   1024     16      286.8 M    76.5 G
    U-ViT-H/2 on 32 x 32 x 4              29   1152     16      500.8 M   133.2 G

Weights of the trunk are drawn from a normal distribution of deviation 0.02; nothing starts at zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.dit import check_patches, patchify, unpatchify
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    FlatDense,
    LabelEmbedding,
    SelfAttention,
    check_choice,
    check_labels,
    check_rank,
    sinusoidal_embedding,
)
from diffjax.nets.stacking import REMAT_POLICIES, check_scan_layers, trunk_with_skips

INIT = nn.initializers.normal(0.02)


class UViTBlock(nn.Module):
    """Equations (1), where there is a skip, and (2): `x, skip: [B, L, D] -> (x, x)`, the second for the skip."""

    num_heads: int
    mlp_ratio: float
    compute_dtype: str
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        size, dtype = x.shape[-1], self.compute_dtype

        def norm(h: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)(h)

        def dense(features: int, name: str, axis: str = 'whole') -> FlatDense:
            return FlatDense(features, axis=axis, dtype=dtype, kernel_init=INIT, name=name)

        if skip is not None:
            x = dense(size, 'skip')(jnp.concatenate([x, skip], axis=-1))
        attend = SelfAttention(self.num_heads, dtype, self.attention, INIT, use_bias=False, name='attention')
        x = x + attend(norm(x, 'norm_1'))
        h = nn.gelu(dense(int(size * self.mlp_ratio), 'mlp_in', 'hidden')(norm(x, 'norm_2')), approximate=False)
        x = x + dense(size, 'mlp_out')(h)
        return x, x if skip is None else None


class UViT(nn.Module, kw_only=True):
    """U-ViT: `x: [B, H, W, C], t: [B] in 0..1000, cond: int32 [B] or None -> [B, H, W, out_channels]`.

    `depth` counts all blocks and is odd. H and W are multiples of `patch_size`; the learned positions are those of one
    size. Parameters: `blocks_in`, `block_middle`, `blocks_out`, the first and last stacked or unrolled by
    `scan_layers`; see nets/stacking.py, for `remat` too.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int
    out_channels: int
    compute_dtype: str = 'float32'
    scan_layers: bool | str = 'auto'
    remat: str = 'none'
    attention: str = 'auto'

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        check_scan_layers(self.scan_layers)
        if self.depth % 2 == 0 or self.depth < 3:
            raise ValueError(f'depth={self.depth} must be odd and at least 3: as many blocks up as down, one between')
        for divisor, reason in ((self.num_heads, 'num_heads'), (2, 'sinusoids come in pairs')):
            if self.hidden_size % divisor:
                raise ValueError(f'hidden_size={self.hidden_size} must be a multiple of {divisor} ({reason})')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published U-ViTs have no dropout
        check_rank('UViT', x, '[B, H, W, C]')
        check_patches(x, self.patch_size)
        check_labels(t, cond, self.num_classes)
        (height, width), p, dtype = x.shape[1:3], self.patch_size, self.compute_dtype
        tokens = FlatDense(self.hidden_size, dtype=dtype, name='patch_embed')(patchify(jnp.asarray(x), p))
        told = [sinusoidal_embedding(t, self.hidden_size)]
        if self.num_classes:
            told = [LabelEmbedding(self.num_classes, self.hidden_size, name='label')(cond), *told]
        tokens = jnp.concatenate([*(token[:, None].astype(tokens.dtype) for token in told), tokens], axis=1)
        tokens = tokens + self.param('pos_embed', INIT, tokens.shape[1:]).astype(tokens.dtype)

        tokens = self._trunk(tokens)[:, len(told) :]
        tokens = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name='final_norm')(tokens)
        tokens = FlatDense(p * p * self.out_channels, dtype=jnp.float32, kernel_init=INIT, name='final')(tokens)
        pixels = unpatchify(tokens, p, height, width)
        return nn.Conv(self.out_channels, (3, 3), padding=((1, 1), (1, 1)), name='smooth')(pixels)

    def _trunk(self, tokens: jax.Array) -> jax.Array:
        fields: dict[str, Any] = {
            name: getattr(self, name) for name in ('num_heads', 'mlp_ratio', 'compute_dtype', 'attention')
        }
        how = {'depth': self.depth // 2, 'scan_layers': self.scan_layers, 'remat': self.remat}
        tokens, skips = trunk_with_skips(UViTBlock, fields, tokens, **how, name='blocks_in')
        tokens, _ = UViTBlock(**fields, name='block_middle')(tokens, None)
        return trunk_with_skips(UViTBlock, fields, tokens, skips, **how, name='blocks_out')[0]
