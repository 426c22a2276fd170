"""Blocks of the DiT family, with the options that the field has settled on; DiT and PixArt are made of them.

With six modulations from the condition c, a block is

    x <- x + gate_1 * Attention(modulate(N(x), shift_1, scale_1))                                                   (1)
    x <- x + CrossAttention(x, text)                                                          where there is text   (2)
    x <- x + gate_2 * MLP(modulate(N(x), shift_2, scale_2))                                                         (3)

conditioning   'adaln'         shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(c) in each block, zero at
                               first, so that blocks start as the identity (DiT, arXiv:2212.09748)
               'adaln_single'  c holds six modulations for all blocks, and each adds a learned table to them
                               (PixArt-alpha, Chen et al. 2023, arXiv:2310.00426, section 2.3)
norm           'layer'         without parameters, as in DiT
               'rms'           root mean square with a learned scale (Zhang & Sennrich 2019, arXiv:1910.07467)
mlp            'gelu'          Linear(GELU(Linear(x))), with h = mlp_ratio D features inside
               'swiglu'        Linear(SiLU(a) b), a, b = Linear(x), with 2/3 h each, so that the number of parameters
                               stays (Shazeer 2020, arXiv:2002.05202)
qk_norm        'none'; or 'rms', 'layer': queries and keys normalised in each head (Henry et al. 2020, arXiv:2010.04245)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    QK_NORMS,
    CrossAttention,
    FlatDense,
    SelfAttention,
    check_choice,
    modulate,
)
from diffjax.nets.rotary import Turns

CONDITIONINGS = ('adaln', 'adaln_single')
NORMS = ('layer', 'rms')
MLPS = ('gelu', 'swiglu')
ZEROS = nn.initializers.zeros


class BlockStyle(NamedTuple):
    """What all blocks of a network have in common."""

    num_heads: int
    mlp_ratio: float
    compute_dtype: str
    attention: str
    qk_norm: str = 'none'
    norm: str = 'layer'
    mlp: str = 'gelu'
    conditioning: str = 'adaln'


class Context(NamedTuple):
    """What every block is told: c, `[B, D]` or with 'adaln_single' `[B, 6 D]`; turns of q and k; text and its mask."""

    c: jax.Array
    turns: Turns | None = None
    text: Array | None = None
    text_mask: Array | None = None


def check_style(style: BlockStyle, hidden_size: int) -> None:
    """Raises ValueError, naming what would be right, for a style that no block can have."""
    check_choice('compute_dtype', style.compute_dtype, COMPUTE_DTYPES)
    check_choice('attention', style.attention, ATTENTION_IMPLEMENTATIONS)
    check_choice('qk_norm', style.qk_norm, QK_NORMS)
    check_choice('norm', style.norm, NORMS)
    check_choice('mlp', style.mlp, MLPS)
    check_choice('conditioning', style.conditioning, CONDITIONINGS)
    for name, value in (('hidden_size', hidden_size), ('num_heads', style.num_heads), ('mlp_ratio', style.mlp_ratio)):
        if not value > 0:
            raise ValueError(f'{name} must be above 0, got {value}')
    for divisor, reason in ((style.num_heads, 'num_heads'), (4, 'two-dimensional positions need it')):
        if hidden_size % divisor:
            right = divisor * max(1, round(hidden_size / divisor))
            raise ValueError(
                f'hidden_size={hidden_size} must be a multiple of {divisor} ({reason}), for example {right}'
            )


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation without parameters, in float32. `x: [..., D]`."""
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32, use_fast_variance=False)
    return norm(x)


def token_norm(x: jax.Array, kind: str, name: str) -> jax.Array:
    """Each token normalised, in float32. To be called in a compact method, where `name` holds the scale of 'rms'."""
    return layer_norm(x) if kind == 'layer' else nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x)


def shared_modulations(c: jax.Array) -> jax.Array:
    """`c: [B, D] = SiLU(condition) -> [B, 6 D]`: what 'adaln_single' tells all blocks. For a compact method."""
    init = nn.initializers.normal(0.02)
    return FlatDense(6 * c.shape[-1], dtype=jnp.float32, kernel_init=init, name='modulation')(c)


def modulation_table(module: nn.Module, name: str, rows: int, size: int) -> jax.Array:
    """The parameter `[rows, size]` that 'adaln_single' adds to its modulations."""
    return module.param(name, nn.initializers.normal(size**-0.5), (rows, size))


class DiTBlock(nn.Module):
    """Equations (1) to (3): `x: [B, L, D] -> ([B, L, D], None)`, a pair because `nn.scan` wants a carry and an output.

    cross_attention: whether there is (2), with weights for `context.text`.
    """

    style: BlockStyle
    cross_attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        style, fields = self.style, (self.style.num_heads, self.style.compute_dtype, self.style.attention)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self._modulations(context.c, x.shape[-1])
        h = modulate(token_norm(x, style.norm, 'norm_1'), shift_1, scale_1)
        h = SelfAttention(*fields, qk_norm=style.qk_norm, name='attention')(h, context.turns)
        x = x + gate_1[:, None] * h
        if self.cross_attention:
            # As published, it starts at zero: a new network looks at the image alone.
            x = x + CrossAttention(*fields, ZEROS, name='cross_attention')(x, context.text, context.text_mask)
        h = self._mlp(modulate(token_norm(x, style.norm, 'norm_2'), shift_2, scale_2))
        return x + gate_2[:, None] * h, None

    def _modulations(self, c: jax.Array, size: int) -> list[jax.Array]:
        if self.style.conditioning == 'adaln':
            how = {'dtype': self.style.compute_dtype, 'kernel_init': ZEROS}
            c = FlatDense(6 * size, axis='whole', **how, name='modulation')(c)
        else:
            c = c + modulation_table(self, 'modulation_table', 6, size).reshape(-1)
        return jnp.split(c.astype(self.style.compute_dtype), 6, axis=-1)

    def _mlp(self, x: jax.Array) -> jax.Array:
        size, dtype = x.shape[-1], self.style.compute_dtype
        inside = int(size * self.style.mlp_ratio)
        if self.style.mlp == 'swiglu':
            pair = FlatDense(2 * int(2 / 3 * inside), axis='hidden', parts=2, dtype=dtype, name='mlp_in')(x)
            h = nn.silu(pair[..., 0, :]) * pair[..., 1, :]
        else:
            h = nn.gelu(FlatDense(inside, axis='hidden', dtype=dtype, name='mlp_in')(x), approximate=True)
        return FlatDense(size, axis='whole', dtype=dtype, name='mlp_out')(h)
