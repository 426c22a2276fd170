"""Blocks in which text and image attend to each other: the layers of MM-DiT and of Flux.

In a joint block (Esser et al. 2024, arXiv:2403.03206, figure 2b) the tokens of text and image are two streams x, each
with weights of its own, which meet in one attention. With c = SiLU(condition), each stream has

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(c)                                                  (1)
    q, k, v = Linear(modulate(LN(x), shift_1, scale_1))                                                             (2)
    h = the stream's part of Attention(q, k, v), over the tokens of both streams                                    (3)
    x <- x + gate_1 * Linear(h)                                                                                     (4)
    x <- x + gate_2 * MLP(modulate(LN(x), shift_2, scale_2))                                                        (5)

Between (2) and (3) q and k may be divided by their root mean square in each head, times a learned scale (their section
5.3.2), and turned by angles that stand for positions (RoPE, Su et al. 2021, arXiv:2104.09864, equation 34).

A single block (Flux; attention beside the MLP as in Dehghani et al. 2023, arXiv:2302.05442) takes both streams as one
sequence, text first:

    shift, scale, gate = Linear(c)                                                                                  (6)
    q, k, v, m = Linear(modulate(LN(x), shift, scale))                                                              (7)
    x <- x + gate * Linear([Attention(q, k, v), GELU(m)])                                                           (8)

The layers of (1) and (6) start at zero, so that every block starts as the identity.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.conditions import LabelTokens, check_condition
from diffjax.nets.dit_blocks import layer_norm
from diffjax.nets.layers import FlatDense, SelfAttention, TimestepEmbedding, attention, head_norm, modulate
from diffjax.nets.rotary import Turns, turned

ZEROS = nn.initializers.zeros


class Tokens(NamedTuple):
    """Both streams: text [B, S, D] and image [B, L, D]."""

    text: jax.Array
    image: jax.Array

    def joined(self) -> jax.Array:
        """[B, S + L, D], text first."""
        return jnp.concatenate(self, axis=1)


class Context(NamedTuple):
    """What every block is told: c [B, D]; the turns of q and k; which of the S + L tokens are there, [B, S + L]."""

    c: jax.Array
    turns: Turns | None = None
    mask: Array | None = None


# Attention ------------------------------------------------------------------------------------------------------------


def split_heads(qkv: jax.Array, num_heads: int, qk_norm: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, L, 3, D]` -> q, k, v, each `[B, L, heads, head_dim]`; q and k with the norm asked for, in float32.

    To be called in a compact module, where the norms' scales are `q_norm` and `k_norm`.
    """
    q, k, v = (qkv[:, :, i].reshape(*qkv.shape[:2], num_heads, -1) for i in range(3))
    return head_norm(q, qk_norm, 'q_norm'), head_norm(k, qk_norm, 'k_norm'), v


def merged_attention(q: jax.Array, k: jax.Array, v: jax.Array, context: Context, implementation: str) -> jax.Array:
    """Equation (3): `[B, L, heads, head_dim]`, of which q may be the last tokens alone -> `[B, L, D]`."""
    by = context.turns
    last = by and tuple(table[-q.shape[1] :] for table in by)
    h = attention(turned(q, last), turned(k, by), v, context.mask, implementation=implementation)
    return h.reshape(*h.shape[:2], -1)


class HeadProjections(nn.Module):
    """Equation (2) after its modulation: `[B, L, D]` -> q, k, v, each `[B, L, num_heads, D / num_heads]`."""

    num_heads: int
    qk_norm: str
    compute_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = FlatDense(3 * x.shape[-1], axis='heads', parts=3, dtype=self.compute_dtype, name='qkv')(x)
        return split_heads(qkv, self.num_heads, self.qk_norm)


# Blocks ---------------------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """What a joint block holds for one stream: equations (1), (2) and, after the attention, (4) and (5).

    kind: 'joint' as they stand; 'last' ends with (2), for text that nothing reads any more; 'dual' adds to (4)
    an attention among the stream's own tokens, with shift_3, scale_3, gate_3 (Stable Diffusion 3.5 medium).
    """

    size: int
    num_heads: int
    qk_norm: str
    compute_dtype: str
    attention: str
    kind: str = 'joint'

    def setup(self):
        dense = functools.partial(FlatDense, dtype=self.compute_dtype, axis='whole')
        self.norm = nn.LayerNorm(1e-6, dtype=jnp.float32, use_bias=False, use_scale=False, use_fast_variance=False)
        modulations = {'joint': 6, 'dual': 9, 'last': 2}[self.kind]
        self.modulation = dense(modulations * self.size, kernel_init=ZEROS)
        self.heads = HeadProjections(self.num_heads, self.qk_norm, self.compute_dtype)
        if self.kind == 'dual':
            fields = (self.num_heads, self.compute_dtype, self.attention)
            self.own_attention = SelfAttention(*fields, qk_norm=self.qk_norm)
        if self.kind != 'last':
            self.out, self.mlp_out = dense(self.size), dense(self.size)
            self.mlp_in = dense(4 * self.size, axis='hidden')

    def enter(self, x: jax.Array, c: jax.Array) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
        """x: [B, L, D] -> (q, k, v), the modulations."""
        modulations = jnp.split(self.modulation(c), self.modulation.features // self.size, axis=-1)
        if self.kind == 'last':
            modulations = modulations[::-1]  # published with the scale before the shift, as at the output
        return self.heads(modulate(self.norm(x), *modulations[:2])), modulations

    def leave(self, x: jax.Array, h: jax.Array, modulations: list[jax.Array]) -> jax.Array:
        """x, h: [B, L, D], the stream as it entered and its part of the attention -> [B, L, D]."""
        gate_1, shift_2, scale_2, gate_2 = modulations[2:6]
        h = gate_1[:, None] * self.out(h)
        if self.kind == 'dual':
            shift_3, scale_3, gate_3 = modulations[6:]
            h = h + gate_3[:, None] * self.own_attention(modulate(self.norm(x), shift_3, scale_3))
        x = x + h
        h = self.mlp_in(modulate(self.norm(x), shift_2, scale_2))
        return x + gate_2[:, None] * self.mlp_out(nn.gelu(h, approximate=True))


class JointBlock(nn.Module):
    """Equations (1) to (5): `Tokens, Context -> (Tokens, None)`, a pair because `nn.scan` wants a carry and an output.

    kind: 'joint'; 'dual', whose image has an attention of its own as well; 'last', which leaves the text as it came.
    """

    num_heads: int
    qk_norm: str
    compute_dtype: str
    attention: str
    kind: str = 'joint'

    @nn.compact
    def __call__(self, tokens: Tokens, context: Context) -> tuple[Tokens, None]:
        last = self.kind == 'last'
        fields = (tokens.image.shape[-1], self.num_heads, self.qk_norm, self.compute_dtype, self.attention)
        text = Stream(*fields, kind='last' if last else 'joint', name='text')
        image = Stream(*fields, kind='dual' if self.kind == 'dual' else 'joint', name='image')
        text_qkv, text_modulations = text.enter(tokens.text, context.c)
        image_qkv, image_modulations = image.enter(tokens.image, context.c)

        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        h = merged_attention(image_qkv[0] if last else q, k, v, context, self.attention)
        h_text, h_image = jnp.split(h, [h.shape[1] - tokens.image.shape[1]], axis=1)
        return Tokens(
            text=tokens.text if last else text.leave(tokens.text, h_text, text_modulations),
            image=image.leave(tokens.image, h_image, image_modulations),
        ), None


class SingleBlock(nn.Module):
    """Equations (6) to (8) with q and k normalised: `x: [B, S + L, D], Context -> ([B, S + L, D], None)`."""

    num_heads: int
    compute_dtype: str
    attention: str

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
        size, dense = x.shape[-1], functools.partial(FlatDense, dtype=self.compute_dtype)
        modulation = dense(3 * size, kernel_init=ZEROS, name='modulation')(context.c)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        inner = dense(7 * size, name='in')(modulate(layer_norm(x), shift, scale))
        qkv, m = jnp.split(inner, [3 * size], axis=-1)
        qkv = qkv.reshape(*qkv.shape[:2], 3, size)
        h = merged_attention(*split_heads(qkv, self.num_heads, 'rms'), context, self.attention)
        h = jnp.concatenate([h, nn.gelu(m, approximate=True)], axis=-1)
        return x + gate[:, None] * dense(size, name='out')(h), None


# Both ends ------------------------------------------------------------------------------------------------------------


class VectorEmbedding(nn.Module):
    """`[B, P] -> [B, hidden_size]`: a SiLU MLP of two layers, in float32."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        h = nn.silu(nn.Dense(self.hidden_size, kernel_init=init, name='in')(jnp.asarray(x, jnp.float32)))
        return nn.Dense(self.hidden_size, kernel_init=init, name='out')(h)


class TextCondition(nn.Module):
    """`t: [B], cond -> (text [B, S, D], c [B, D], cond as a dict)`: what the blocks are told, c after its SiLU.

    network: its name, for messages. cond: a dict of `text`, `pooled`, `text_mask` if not all tokens are there and, with
    `guidance='embedded'`, `guidance`; or labels int32 [B], which stand for a guidance scale of 1.
    """

    network: str
    hidden_size: int
    num_classes: int
    num_label_tokens: int
    text_size: int
    pooled_size: int
    compute_dtype: str
    guidance: str = 'none'

    @nn.compact
    def __call__(self, t: Array, cond: dict[str, Array] | Array | None) -> tuple[jax.Array, jax.Array, dict]:
        if jnp.ndim(t) != 1:
            raise ValueError(f't must be one time for each sample, shape [B]; got shape {jnp.shape(t)}')
        cond = self._as_dict(t, cond)
        c = TimestepEmbedding(self.hidden_size, name='time')(t)
        if self.guidance == 'embedded':
            # On the scale of t: published networks are given a thousand times the scale of guidance.
            scale = 1000 * jnp.asarray(cond['guidance'], jnp.float32)
            c = c + TimestepEmbedding(self.hidden_size, name='guidance')(scale)
        c = c + VectorEmbedding(self.hidden_size, name='pooled')(cond['pooled'])
        text = FlatDense(self.hidden_size, dtype=self.compute_dtype, name='text')(jnp.asarray(cond['text']))
        return text, nn.silu(c), cond

    def _as_dict(self, t: Array, cond: dict[str, Array] | Array | None) -> dict[str, Array]:
        labelled = self.num_classes > 0 and cond is not None and not isinstance(cond, dict)
        if labelled:
            if jnp.shape(cond) != jnp.shape(t) or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
                given = f'{jnp.result_type(cond)} of shape {jnp.shape(cond)}'
                raise ValueError(f'{self.network} takes labels as integers of shape {jnp.shape(t)}, got {given}')
            sizes = (self.num_classes, self.num_label_tokens, self.text_size, self.pooled_size)
            cond = LabelTokens(*sizes, name='label')(cond)
            return cond | {'guidance': jnp.ones(t.shape)} if self.guidance == 'embedded' else cond
        required = {'text': f'[B, S, {self.text_size}]', 'pooled': f'[B, {self.pooled_size}]'}
        required |= {'guidance': '[B]'} if self.guidance == 'embedded' else {}
        check_condition(self.network, cond, required, {'text_mask': '[B, S]'})
        for name, size in (('text', self.text_size), ('pooled', self.pooled_size)):
            if cond[name].shape[-1] != size:
                raise ValueError(
                    f'{self.network} with {name}_size={size} takes cond[{name!r}] of shape {required[name]}, '
                    f'got {tuple(cond[name].shape)}'
                )
        return cond


def joint_mask(cond: dict[str, Array], num_image_tokens: int) -> jax.Array | None:
    """Which of all tokens are there, [B, S + L], where the text has a mask."""
    if 'text_mask' not in cond:
        return None
    mask = jnp.asarray(cond['text_mask'], bool)
    return jnp.concatenate([mask, jnp.ones((mask.shape[0], num_image_tokens), bool)], axis=1)


class ModulatedOutput(nn.Module):
    """`modulate(LN(x), shift, scale)`, then a linear layer, both zero at first: `[B, L, D], c: [B, D] -> [B, L, O]`.

    Its modulation holds the scale before the shift, as published.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        dense = functools.partial(FlatDense, dtype=jnp.float32, kernel_init=ZEROS)
        scale, shift = jnp.split(dense(2 * x.shape[-1], name='modulation')(c), 2, axis=-1)
        return dense(self.features, name='linear')(modulate(layer_norm(x), shift, scale))
