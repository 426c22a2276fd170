"""DiT, the diffusion transformer with adaLN-zero conditioning (Peebles & Xie 2023, arXiv:2212.09748, section 3.2).

An image is cut into patches of p x p pixels, each a token. The tokens go through blocks (`nets/dit_blocks.py`) that are
told c = time + label by scales, shifts and gates, and the output is Linear(modulate(N(x), shift, scale)), put back from
patches to pixels. The layers of the modulations and the output layer start at zero, so that every block starts as the
identity and the network as zero (section 3.2, figure 3).

The defaults are the published DiT. What the field has settled on since are settings: rotary positions, normalised
queries and keys, RMSNorm, SwiGLU, shared modulations, register tokens (Darcet et al. 2023, arXiv:2309.16588).

    32 x 32 x 4 in, learned variance     depth  width  heads   parameters   multiply-adds of the forward pass
    DiT-S/2, S/4, S/8                       12    384      6      33.0 M     6.1 G,   1.4 G,  0.36 G
    DiT-B/2, B/4, B/8                       12    768     12     130.5 M    23.0 G,   5.6 G,   1.4 G
    DiT-L/2, L/4, L/8                       24   1024     16     458.1 M    80.7 G,  19.7 G,   5.0 G
    DiT-XL/2, XL/4, XL/8                    28   1152     16     675.1 M   118.6 G,  29.0 G,   7.4 G
    LightningDiT-XL/1 (16 x 16 x 32)        28   1152     16     675.3 M   118.6 G

SiT (Ma et al. 2024, arXiv:2401.08740) is DiT with another schedule and target. LightningDiT (Yao et al. 2025,
arXiv:2501.01423) is `norm='rms', mlp='swiglu', positions='both'`, later with `qk_norm='rms'`.

The counts of parameters are those of the published models. To have them so, and to load published weights, the fixed
sin-cos positions stand among the parameters as `pos_embed`; their gradient is zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.dit_blocks import (
    ZEROS,
    BlockStyle,
    Context,
    DiTBlock,
    check_style,
    modulation_table,
    shared_modulations,
    token_norm,
)
from diffjax.nets.layers import (
    ConditionEmbedding,
    FlatDense,
    check_choice,
    check_rank,
    modulate,
    sincos_positions,
)
from diffjax.nets.rotary import Turns, turns
from diffjax.nets.stacking import REMAT_POLICIES, check_scan_layers, trunk

POSITIONS = ('sincos', 'rope', 'both')


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


def check_patches(x: Array, patch_size: int) -> None:
    """Raises ValueError where `x: [B, H, W, C]` cannot be cut into patches."""
    height, width = x.shape[1:3]
    if height % patch_size or width % patch_size:
        right = f'height and width must be multiples of patch_size={patch_size}'
        raise ValueError(f'{right}, got {height}x{width}')


class DiT(nn.Module, kw_only=True):
    """The diffusion transformer: `x: [B, H, W, C], t: [B], cond: int32 [B] or None -> [B, H, W, out_channels]`.

    H and W must be multiples of `patch_size`, `hidden_size` one of `num_heads` and of 4.
    positions: 'sincos', a fixed table added to the patches; 'rope', queries and keys turned by their row (the first
    half of a head's features) and column; or 'both'.
    num_registers: learned tokens that stand beside the patches and are read by nobody but the other tokens.
    `qk_norm`, `norm`, `mlp` and `conditioning`: see nets/dit_blocks.py. `scan_layers` and `remat`: see
    nets/stacking.py; 'none' keeps every activation, 'full' the input of each block, 'dots' also products with weights.
    `frequency_shift=1` spaces the frequencies of the time embedding as diffusers' DiT does, 0 as the published one.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int
    out_channels: int
    positions: str = 'sincos'
    qk_norm: str = 'none'
    norm: str = 'layer'
    mlp: str = 'gelu'
    conditioning: str = 'adaln'
    num_registers: int = 0
    compute_dtype: str = 'float32'
    scan_layers: bool | str = 'auto'
    remat: str = 'none'
    attention: str = 'auto'
    frequency_shift: int = 0

    def __post_init__(self):
        check_style(self._style(), self.hidden_size)
        check_choice('positions', self.positions, POSITIONS)
        check_choice('remat', self.remat, tuple(REMAT_POLICIES))
        check_scan_layers(self.scan_layers)
        if self.positions != 'sincos' and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f'positions={self.positions!r} turn heads of a multiple of 4 features; hidden_size={self.hidden_size} '
                f'and num_heads={self.num_heads} make {self.hidden_size // self.num_heads}'
            )
        super().__post_init__()

    def _style(self) -> BlockStyle:
        return BlockStyle(**{name: getattr(self, name) for name in BlockStyle._fields})

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # published DiTs have no dropout
        check_rank('DiT', x, '[B, H, W, C]')
        check_patches(x, self.patch_size)
        (height, width), p = x.shape[1:3], self.patch_size
        tokens = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='patch_embed')(patchify(jnp.asarray(x), p))
        if self.positions != 'rope':
            tokens = tokens + self._table(height // p, width // p).astype(tokens.dtype)
        tokens = self._with_registers(tokens)
        embedding = ConditionEmbedding(
            self.hidden_size, self.num_classes, frequency_shift=self.frequency_shift, name='condition'
        )
        condition = embedding(t, cond)
        c = nn.silu(condition)
        told = c if self.conditioning == 'adaln' else shared_modulations(c)
        how = {'depth': self.depth, 'scan_layers': self.scan_layers, 'remat': self.remat}
        context = Context(told, self._turns(height // p, width // p))
        tokens = trunk(DiTBlock, {'style': self._style()}, tokens, context, **how)[:, self.num_registers :]

        if self.conditioning == 'adaln':
            told = FlatDense(2 * self.hidden_size, dtype=jnp.float32, kernel_init=ZEROS, name='final_modulation')(c)
        else:
            table = modulation_table(self, 'final_modulation_table', 2, self.hidden_size)
            told = jnp.tile(condition, 2) + table.reshape(-1)
        tokens = modulate(token_norm(tokens, self.norm, 'final_norm'), *jnp.split(told, 2, axis=-1))
        tokens = FlatDense(p * p * self.out_channels, dtype=jnp.float32, kernel_init=ZEROS, name='final')(tokens)
        return unpatchify(tokens, p, height, width)

    def _table(self, rows: int, columns: int) -> jax.Array:
        def table(key: jax.Array) -> jax.Array:
            del key  # fixed
            return jnp.asarray(sincos_positions(self.hidden_size, rows, columns))

        return jax.lax.stop_gradient(self.param('pos_embed', table))

    def _with_registers(self, tokens: jax.Array) -> jax.Array:
        if self.num_registers == 0:
            return tokens
        shape = (self.num_registers, self.hidden_size)
        registers = self.param('registers', nn.initializers.normal(0.02), shape).astype(tokens.dtype)
        registers = jnp.broadcast_to(registers, (tokens.shape[0], *shape))
        return jnp.concatenate([registers, tokens], axis=1)

    def _turns(self, rows: int, columns: int) -> Turns | None:
        if self.positions == 'sincos':
            return None
        size = self.hidden_size // self.num_heads // 2
        grid = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
        grid = np.concatenate([np.zeros((self.num_registers, 2)), grid])  # registers are turned by nothing
        return tuple(map(jnp.asarray, turns(grid, (size, size))))
