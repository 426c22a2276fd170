"""What the blocks of a U-Net are told: an embedding of time and label, text, and SDXL's added embeddings.

    c = SiLU(MLP(sinusoids(t)) + label + MLP([pooled, sinusoids(size)]))

The label is a row of a table (Nichol & Dhariwal 2021, arXiv:2102.09672); the last term is SDXL's (Podell et al. 2023,
arXiv:2307.01952, section 2.2): one embedding of the whole text, and six numbers about the image's size and crop.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.conditions import LabelTokens, check_condition
from diffjax.nets.layers import LabelEmbedding

XAVIER = nn.initializers.xavier_uniform()

SINUSOIDS = {'cos_sin': (0, 0), 'sin_cos': (0, 1), 'cos_sin_to_end': (1, 0), 'sin_cos_to_end': (1, 1)}


class Told(NamedTuple):
    """c: [B, D] as above; text: [B, S, E] or None; text_mask: [B, S], True where there is a token, or None."""

    c: jax.Array
    text: jax.Array | None
    text_mask: Array | None


def sinusoids(t: Array, size: int, style: str) -> jax.Array:
    """Cosines and sines of `t: [B]` at h = size / 2 frequencies, `[B, size]` in float32.

        'cos_sin'           cosines first, w_i = 10000^(-i / h)         ADM, Stable Diffusion
        'sin_cos_to_end'    sines first, w_i = 10000^(-i / (h - 1))     DDPM: the lowest frequency is 1 / 10000

    and the two others, 'sin_cos' and 'cos_sin_to_end'.
    """
    shift, sines_first = SINUSOIDS[style]
    half = size // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / (half - shift)).astype(np.float32)
    angles = jnp.asarray(t, jnp.float32)[:, None] * frequencies
    pair = (jnp.sin(angles), jnp.cos(angles)) if sines_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(pair, axis=-1)


class EmbeddingMLP(nn.Module):
    """`[B, N] -> [B, hidden_size]`, a dense layer, SiLU and a dense layer, in float32."""

    hidden_size: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        h = nn.silu(nn.Dense(self.hidden_size, kernel_init=XAVIER, name='in')(h))
        return nn.Dense(self.hidden_size, kernel_init=XAVIER, name='out')(h)


class Condition(nn.Module):
    """`x: [B, H, W, C], t: [B], cond -> Told`; UNet's docstring has the fields and what `cond` may be.

    ValueError where `t` is not a vector, or where a condition is missing, unexpected or misshapen.
    """

    frequencies: int
    sinusoids: str
    num_classes: int
    null_label: bool
    text_size: int
    num_tokens: int
    pooled_size: int
    size_frequencies: int

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: PyTree) -> Told:
        if jnp.ndim(t) != 1:
            raise ValueError(f't must be one time for each sample, shape [B]; got shape {jnp.shape(t)}')
        hidden = 4 * self.frequencies
        h = EmbeddingMLP(hidden, name='time')(sinusoids(t, self.frequencies, self.sinusoids))
        if self.text_size == 0:
            return Told(nn.silu(h + self._label(t, cond)), None, None)
        cond = self._text(x, t, cond)
        if self.pooled_size:
            size = sinusoids(jnp.ravel(cond['size']), self.size_frequencies, self.sinusoids)
            added = jnp.concatenate([jnp.asarray(cond['pooled'], jnp.float32), size.reshape(len(t), -1)], axis=-1)
            h = h + EmbeddingMLP(hidden, name='added')(added)
        return Told(nn.silu(h), cond['text'], cond.get('text_mask'))

    def _label(self, t: Array, labels: Array | None) -> jax.Array | float:
        if self.num_classes == 0:
            if labels is not None:
                raise ValueError('cond was given to a network with num_classes=0; pass None, or set num_classes')
            return 0.0
        self._check_labels(t, labels)
        rows = self.num_classes if self.null_label else self.num_classes - 1
        return LabelEmbedding(rows, 4 * self.frequencies, nn.initializers.normal(1.0), name='label')(labels)

    def _text(self, x: Array, t: Array, cond: PyTree) -> Mapping[str, Any]:
        if isinstance(cond, dict) or self.num_classes == 0:
            required = {'text': '[B, S, D]'} | ({'pooled': '[B, P]', 'size': '[B, 6]'} if self.pooled_size else {})
            check_condition('UNet', cond, required, {'text_mask': '[B, S]'})
            for name, right in (('text', self.text_size), ('pooled', self.pooled_size), ('size', 6)):
                if name in required and jnp.shape(cond[name])[-1] != right:
                    got = f'got {jnp.shape(cond[name])}'
                    raise ValueError(f'UNet takes cond[{name!r}] with {right} features at its end, {got}')
            return cond
        self._check_labels(t, cond)
        fields = (self.num_classes, self.num_tokens, self.text_size, self.pooled_size)
        height, width = x.shape[1:3]
        size = jnp.tile(jnp.array([[height, width, 0, 0, height, width]], jnp.float32), (len(t), 1))
        return {**LabelTokens(*fields, name='label')(cond), 'size': size}

    def _check_labels(self, t: Array, labels: Array | None) -> None:
        if labels is None or isinstance(labels, dict) or jnp.shape(labels) != jnp.shape(t):
            got = f'shape {jnp.shape(labels)}' if hasattr(labels, 'shape') else type(labels).__name__
            null = f' ({self.num_classes} is the null label)' if self.null_label else ''
            right = f'int32 labels of shape {jnp.shape(t)}{null}'
            raise ValueError(f'a network with num_classes={self.num_classes} takes cond, {right}; got {got}')
