"""A residual MLP for points: two-dimensional toys, and whatever else comes as a short vector.

    h <- Linear(x)                                                                                                  (1)
    h <- h + Linear(SiLU(modulate(Linear(h), shift, scale))),    shift, scale = Linear(SiLU(c))     `depth` times   (2)
    y  = Linear(h)                                                                                                  (3)

with c = time + label, as in the other networks. There is no normalisation: far from the data the right answer grows
with x, which a normalised network cannot say.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import ConditionEmbedding, FlatDense, check_rank, modulate


class MLP(nn.Module, kw_only=True):
    """The residual MLP: `x: [B, D], t: [B], cond: int32 [B] or None -> [B, out_channels]`, float32 throughout.

    `t` is embedded by sinusoids and expected on the scale 0..1000, as in the other networks.
    """

    hidden_size: int = 128
    depth: int = 3
    num_classes: int = 0
    out_channels: int

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, deterministic: bool = True) -> jax.Array:
        del deterministic  # no dropout
        check_rank('MLP', x, '[B, D]')
        xavier, unit = nn.initializers.xavier_uniform(), nn.initializers.normal(1.0)
        embed = ConditionEmbedding(
            self.hidden_size, self.num_classes, time_init=xavier, label_init=unit, name='condition'
        )
        c = nn.silu(embed(t, cond))
        h = FlatDense(self.hidden_size, name='in')(jnp.asarray(x))
        for i in range(self.depth):
            modulation = FlatDense(2 * self.hidden_size, name=f'modulation_{i}')(c)
            y = FlatDense(self.hidden_size, name=f'block_in_{i}')(h)
            y = nn.silu(modulate(y, *jnp.split(modulation, 2, axis=-1)))
            h = h + FlatDense(self.hidden_size, name=f'block_out_{i}')(y)
        return FlatDense(self.out_channels, name='out')(h)
