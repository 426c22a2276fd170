"""DiT, the diffusion transformer with adaLN-zero conditioning (Peebles & Xie 2023, arXiv:2212.09748, section 3.2).

An image is cut into patches of p x p pixels, each a token. With c = time + label, a block is

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(SiLU(c))                                            (1)
    x <- x + gate_1 * Attention(modulate(LN(x), shift_1, scale_1))                                                  (2)
    x <- x + gate_2 *       MLP(modulate(LN(x), shift_2, scale_2))                                                  (3)

and the output is Linear(modulate(LN(x), shift, scale)), put back from patches to pixels. The layers of (1) and the
output layer start at zero, so that every block starts as the identity and the network as zero (section 3.2, figure 3).

The counts of parameters are those of the published models. To have them so, and to load published weights, the fixed
sin-cos positions stand among the parameters as `pos_embed`; their gradient is zero.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import (
    ATTENTION_IMPLEMENTATIONS,
    COMPUTE_DTYPES,
    ConditionEmbedding,
    FlatDense,
    SelfAttention,
    check_choice,
    check_rank,
    modulate,
    sincos_positions,
)
from diffjax.nets.stacking import REMAT_POLICIES, trunk


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, H/p * W/p, p * p * C]`: patches row by row, in each its rows, columns, channels."""
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    return x.reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(tokens: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """`[B, H/p * W/p, p * p * C] -> [B, H, W, C]`, the inverse of `patchify`."""
    p = patch_size
    x = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, -1).swapaxes(2, 3)
    return x.reshape(tokens.shape[0], height, width, -1)


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation without parameters, in float32. `x: [..., D]`."""
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32, use_fast_variance=False)
    return norm(x)


class DiTBlock(nn.Module):
    """One block, equations (1) to (3): `x: [B, L, D], c: [B, D] = SiLU(condition) -> ([B, L, D], None)`.

    It returns a pair because `nn.scan` wants a carry and an output.
    """

    num_heads: int
    mlp_ratio: float
    compute_dtype: str
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        size, dtype = x.shape[-1], self.compute_dtype
        zeros = nn.initializers.zeros
        modulation = FlatDense(6 * size, dtype=dtype, kernel_init=zeros, name='modulation')(c)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        h = modulate(layer_norm(x), shift_1, scale_1)
        h = SelfAttention(self.num_heads, dtype, self.attention, name='attention')(h)
        x = x + gate_1[:, None] * h

        h = modulate(layer_norm(x), shift_2, scale_2)
        h = FlatDense(int(size * self.mlp_ratio), dtype=dtype, name='mlp_in')(h)
        h = FlatDense(size, dtype=dtype, name='mlp_out')(nn.gelu(h, approximate=True))
        return x + gate_2[:, None] * h, None


class DiT(nn.Module, kw_only=True):
    """The diffusion transformer: `x: [B, H, W, C], t: [B], cond: int32 [B] or None -> [B, H, W, out_channels]`.

    H and W must be multiples of `patch_size`, `hidden_size` one of `num_heads` and of 4.
    `scan_layers` chooses one compiled block run `depth` times (parameters stacked under `blocks`) or `depth` blocks
    (`blocks_0`, `blocks_1`, ...); `nets.stacking` converts.
    `remat` trades memory for time: 'none' keeps every activation, 'full' only the input of each block, 'dots' also
    the results of products with weights.
    `frequency_shift=1` spaces the frequencies of the time embedding as diffusers' DiT does, 0 as the published one.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int
    out_channels: int
    compute_dtype: str = 'float32'
    scan_layers: bool = True
    remat: str = 'none'
    attention: str = 'auto'
    frequency_shift: int = 0

    def __post_init__(self):
        check_choice('compute_dtype', self.compute_dtype, COMPUTE_DTYPES)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        check_choice('attention', self.attention, ATTENTION_IMPLEMENTATIONS)
        for divisor, reason in ((self.num_heads, 'num_heads'), (4, 'two-dimensional positions need it')):
            if self.hidden_size % divisor:
                right = divisor * max(1, round(self.hidden_size / divisor))
                given = f'hidden_size={self.hidden_size}'
                raise ValueError(f'{given} must be a multiple of {divisor} ({reason}), for example {right}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published DiTs have no dropout
        check_rank('DiT', x, '[B, H, W, C]')
        height, width = x.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            right = f'height and width must be multiples of patch_size={self.patch_size}'
            raise ValueError(f'{right}, got {height}x{width}')

        tokens = patchify(jnp.asarray(x), self.patch_size)
        tokens = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='patch_embed')(tokens)
        tokens = tokens + self._positions(height, width).astype(tokens.dtype)
        embedding = ConditionEmbedding(
            self.hidden_size, self.num_classes, frequency_shift=self.frequency_shift, name='condition'
        )
        c = nn.silu(embedding(t, cond))
        tokens = self._trunk(tokens, c)

        zeros = nn.initializers.zeros
        modulation = FlatDense(2 * self.hidden_size, dtype=jnp.float32, kernel_init=zeros, name='final_modulation')(c)
        tokens = modulate(layer_norm(tokens), *jnp.split(modulation, 2, axis=-1))
        pixels = self.patch_size**2 * self.out_channels
        tokens = FlatDense(pixels, dtype=jnp.float32, kernel_init=zeros, name='final')(tokens)
        return unpatchify(tokens, self.patch_size, height, width)

    def _positions(self, height: int, width: int) -> jax.Array:
        def table(key: jax.Array) -> jax.Array:
            del key  # fixed
            return jnp.asarray(sincos_positions(self.hidden_size, height // self.patch_size, width // self.patch_size))

        return jax.lax.stop_gradient(self.param('pos_embed', table))

    def _trunk(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        fields = {
            'num_heads': self.num_heads,
            'mlp_ratio': self.mlp_ratio,
            'compute_dtype': self.compute_dtype,
            'attention': self.attention,
        }
        how = {'depth': self.depth, 'scan_layers': self.scan_layers, 'remat': self.remat}
        return trunk(DiTBlock, fields, tokens, c, **how)
