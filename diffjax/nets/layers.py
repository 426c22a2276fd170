"""Layers that the networks share: embeddings of time and label, modulation, attention, positions.

Parameters are float32 everywhere. `compute_dtype` is the precision of the large matrix products; embeddings of time,
normalisations and what modulates them are float32 whatever it is (the layers that compute scales and shifts are
matrix products).

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239), Peebles & Xie 2023 (DiT, arXiv:2212.09748), He et al. 2022 (MAE,
arXiv:2111.06377) for the two-dimensional positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from diffjax.core.types import Array
from diffjax.nets.placement import is_placing, placed
from diffjax.nets.rotary import Turns, turned

Initializer = Callable[..., Any]

COMPUTE_DTYPES = ('float32', 'bfloat16', 'float16')
ATTENTION_IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')
QK_NORMS = ('none', 'rms', 'layer')


def check_choice(field: str, value: str, valid: Sequence[str]) -> None:
    """Raises ValueError, naming the valid ones, where `value` is not among them."""
    if value not in valid:
        raise ValueError(f'{field}={value!r} is not known; choose one of {", ".join(map(repr, valid))}')


def check_rank(network: str, x: Array, shape: str) -> None:
    """Raises ValueError where `x` does not have as many axes as `shape`, written '[B, H, W, C]'."""
    if x.ndim != shape.count(',') + 1:
        raise ValueError(f'{network} takes x of shape {shape}, got {tuple(x.shape)}')


def check_labels(t: Array, cond: Array | None, num_classes: int) -> None:
    """Raises ValueError where `t` is not a vector, or where labels are missing or unexpected."""
    if jnp.ndim(t) != 1:
        raise ValueError(f't must be one time for each sample, shape [B]; got shape {jnp.shape(t)}')
    if num_classes == 0:
        if cond is not None:
            raise ValueError('cond was given to a network with num_classes=0; pass None, or set num_classes')
    elif cond is None or jnp.shape(cond) != jnp.shape(t):
        got = 'None' if cond is None else f'shape {jnp.shape(cond)}'
        raise ValueError(
            f'a network with num_classes={num_classes} takes cond, int32 labels of shape {jnp.shape(t)} '
            f'({num_classes} is the null label); got {got}'
        )


class FlatDense(nn.Dense):
    """A dense layer that sees `[B, ..., D]` as one matrix `[B * ..., D]`.

    One plain matrix product instead of a batched one: its backward pass is about 1.5 times as fast on CPUs, and the
    same elsewhere. The names and shapes of its parameters are those of `nn.Dense`.

    axis: what its features mean to whoever places them on devices (nets/placement.py).
    parts: so many things of equal size stand side by side in its features, and come out as
        `[B, ..., parts, features / parts]`: each of them can then be split over devices.
    """

    kernel_init: Initializer = nn.initializers.xavier_uniform()
    axis: str | None = None
    parts: int = 1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        *batch, size = inputs.shape
        kernel = self.param('kernel', self.kernel_init, (size, self.features), self.param_dtype)
        bias = self.param('bias', self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        flat = placed(inputs, 'batch').reshape(-1, size)
        flat, kernel, bias = promote_dtype(flat, kernel, bias, dtype=self.dtype)
        shape = (self.features,) if self.parts == 1 else (self.parts, self.features // self.parts)
        if self.parts > 1 and is_placing():  # a product of three axes, the last of which is split
            kernel = placed(kernel.reshape(size, *shape), None, None, self.axis)
            bias = None if bias is None else bias.reshape(shape)
        out = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())))
        out = out if bias is None else out + bias
        return placed(out.reshape(*batch, *shape), 'batch', *[None] * (len(batch) + len(shape) - 2), self.axis)


def sinusoidal_embedding(t: Array, size: int, max_period: float = 10_000.0, shift: int = 0) -> jax.Array:
    """Cosines, then sines, of `t` at `h = size / 2` geometrically spaced frequencies, in float32.

        [cos(t w_0), ..., cos(t w_{h-1}), sin(t w_0), ..., sin(t w_{h-1})],   w_i = max_period^(-i / (h - shift))

    With `shift = 1` the last frequency is 1 / max_period, as in DDPM's code. `t: [B]` is used as it is given; at
    `max_period` 10000 it resolves times spread over 0..1000. Returns `[B, size]`.
    """
    if size % 2:
        raise ValueError(f'a sinusoidal embedding has pairs of features: its size must be even, got {size}')
    half = size // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / (half - shift)).astype(np.float32)
    angles = jnp.asarray(t, jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """`t: [B]` -> `[B, hidden_size]`: sinusoids, then a SiLU MLP of two layers, in float32."""

    hidden_size: int
    frequency_size: int = 256
    kernel_init: Initializer = nn.initializers.normal(0.02)
    frequency_shift: int = 0

    @nn.compact
    def __call__(self, t: Array) -> jax.Array:
        h = sinusoidal_embedding(t, self.frequency_size, shift=self.frequency_shift)
        h = nn.silu(nn.Dense(self.hidden_size, kernel_init=self.kernel_init, name='in')(h))
        return nn.Dense(self.hidden_size, kernel_init=self.kernel_init, name='out')(h)


class LabelEmbedding(nn.Module):
    """`labels: int32 [B]` in 0..num_classes -> `[B, hidden_size]`, from a table of `num_classes + 1` rows.

    The last row, index `num_classes`, is the null label of classifier-free guidance (Ho & Salimans 2022). Whoever
    trains replaces labels by it; nothing is dropped here. A label beyond the table gives NaN, never a wrong row.
    """

    num_classes: int
    hidden_size: int
    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, labels: Array) -> jax.Array:
        table = nn.Embed(self.num_classes + 1, self.hidden_size, embedding_init=self.embedding_init, name='table')
        return table(labels)


class ConditionEmbedding(nn.Module):
    """Time and, where there are classes, label: `t: [B], cond: int32 [B] or None -> [B, hidden_size]`, their sum."""

    hidden_size: int
    num_classes: int
    frequency_size: int = 256
    time_init: Initializer = nn.initializers.normal(0.02)
    label_init: Initializer = nn.initializers.normal(0.02)
    frequency_shift: int = 0

    @nn.compact
    def __call__(self, t: Array, cond: Array | None) -> jax.Array:
        check_labels(t, cond, self.num_classes)
        fields = (self.hidden_size, self.frequency_size, self.time_init, self.frequency_shift)
        h = TimestepEmbedding(*fields, name='time')(t)
        if self.num_classes == 0:
            return h
        return h + LabelEmbedding(self.num_classes, self.hidden_size, self.label_init, name='label')(cond)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift`, one shift and scale for each sample and channel, in the wider dtype of the three.

    x: [B, ..., D]; shift, scale: [B, D].
    """
    dtype = jnp.result_type(x, shift, scale)
    shift, scale = shift.astype(dtype), scale.astype(dtype)  # before the 1 is added: 16 bits would round it off
    per_sample = (shift.shape[0],) + (1,) * (x.ndim - 2) + (shift.shape[-1],)
    return x * (1 + scale.reshape(per_sample)) + shift.reshape(per_sample)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Array | None = None, *, implementation: str = 'auto'
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v for each head, with logits and softmax in float32.

    q: [B, L, heads, head_dim]; k, v: [B, S, heads, head_dim]; returns [B, L, heads, head_dim] in the dtype of `q`.
    mask: True where a query may look: [B, S] for keys that are there, or [B or 1, heads or 1, L, S]. What a query that
    may look nowhere gets is finite and means nothing.

    'xla' leaves everything to the compiler; 'cudnn' is flash attention on NVIDIA GPUs in 16 bits; 'splash' is a kernel
    for TPUs, for masks of keys alone. 'auto' takes the kernel of the platform where it fits, and 'xla' elsewhere.
    Kernels have no forward-mode derivative, which the likelihood needs: evaluate it with 'xla'.
    """
    check_choice('attention', implementation, ATTENTION_IMPLEMENTATIONS)
    if implementation == 'auto':
        implementation = _attention_of_platform(q, k, mask)
    if implementation == 'splash':
        if mask is not None and jnp.ndim(mask) != 2:
            raise ValueError(f"attention='splash' takes a mask [B, S]; got shape {jnp.shape(mask)}, as 'xla' takes it")
        from diffjax.nets.splash import splash_attention  # Pallas takes a second to import

        present = jnp.ones(k.shape[:2], bool) if mask is None else jnp.asarray(mask, bool)
        return splash_attention(_scaled(q), k, v, present)
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask
    if implementation == 'cudnn':
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
    return _attention_by_xla(_scaled(q), k, v, mask)


def _attention_of_platform(q: jax.Array, k: jax.Array, mask: Array | None) -> str:
    """The fastest implementation that can do it."""
    platform, head_dim = jax.default_backend(), q.shape[-1]
    if platform == 'gpu' and q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128:
        even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0  # its backward pass takes masks of even lengths alone
        return 'cudnn' if mask is None or even else 'xla'
    return 'splash' if platform == 'tpu' and (mask is None or jnp.ndim(mask) == 2) else 'xla'


def _scaled(q: jax.Array) -> jax.Array:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _attention_by_xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Heads before positions, and the sum taken out after the product with v: on CPUs 1.4 times as fast as jax.nn's."""
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    logits = jnp.einsum('bhld,bhsd->bhls', q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    h = jnp.einsum('bhls,bhsd->bhld', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (h / weights.sum(axis=-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)


def head_norm(x: jax.Array, kind: str, name: str) -> jax.Array:
    """Queries or keys `[..., head_dim]`, each head normalised with a learned scale, in float32; 'none': as they are.

    To be called in a compact method, where `name` holds the scale ('layer' has a bias too).
    """
    if kind == 'none':
        return x
    norms = {'rms': nn.RMSNorm, 'layer': nn.LayerNorm}
    return norms[kind](epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)(x).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens: `[B, L, D] -> [B, L, D]`; `by` turns queries and keys (nets/rotary.py)."""

    num_heads: int
    compute_dtype: Any
    implementation: str = 'auto'
    out_init: Initializer = nn.initializers.xavier_uniform()
    qk_norm: str = 'none'
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, by: Turns | None = None) -> jax.Array:
        batch, length, size = x.shape
        if size % self.num_heads:
            raise ValueError(f'{size} channels cannot be shared among num_heads={self.num_heads}; it must divide them')
        how = {'use_bias': self.use_bias, 'dtype': self.compute_dtype}
        qkv = FlatDense(3 * size, axis='heads', parts=3, **how, name='qkv')(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, size // self.num_heads)
        q, k = (head_norm(qkv[:, :, i], self.qk_norm, f'{name}_norm') for i, name in enumerate('qk'))
        h = attention(turned(q, by), turned(k, by), qkv[:, :, 2], implementation=self.implementation)
        h = h.reshape(batch, length, size)
        return FlatDense(size, axis='whole', dtype=self.compute_dtype, kernel_init=self.out_init, name='out')(h)


class CrossAttention(nn.Module):
    """Attention of tokens to other tokens: `x: [B, L, D], to: [B, S, E], mask: [B, S] or None -> [B, L, D]`."""

    num_heads: int
    compute_dtype: Any
    implementation: str = 'auto'
    out_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array, to: jax.Array, mask: Array | None = None) -> jax.Array:
        size = x.shape[-1]

        def heads(h: jax.Array) -> jax.Array:
            return h.reshape(*h.shape[:-1], self.num_heads, size // self.num_heads)

        q = heads(FlatDense(size, axis='heads', dtype=self.compute_dtype, name='q')(x))
        kv = heads(FlatDense(2 * size, axis='heads', parts=2, dtype=self.compute_dtype, name='kv')(to))
        h = attention(q, kv[:, :, 0], kv[:, :, 1], mask, implementation=self.implementation).reshape(x.shape)
        return FlatDense(size, axis='whole', dtype=self.compute_dtype, kernel_init=self.out_init, name='out')(h)


def sincos_line(size: int, positions: np.ndarray) -> np.ndarray:
    """Positions along one axis as features, `[L] -> [L, size]`, in float32.

    [sin(p w_0), ..., sin(p w_{h-1}), cos(p w_0), ..., cos(p w_{h-1})],   w_i = 10000^(-i / h),   h = size / 2
    """
    angles = positions[:, None] * 10_000.0 ** (-np.arange(size // 2) / (size // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def sincos_positions(size: int, height: int, width: int) -> np.ndarray:
    """The fixed positional table `[height * width, size]` of a grid, rows first, in float32.

    The first half of the features encodes the column and the second half the row, each as `sincos_line` does: the
    order of MAE and DiT (there, too, the column comes first).
    """
    if size % 4:
        raise ValueError(f'two-dimensional positions take a quarter of the features each: {size} is no multiple of 4')
    line = sincos_line(size // 2, np.arange(max(height, width)))
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.concatenate([line[columns], line[rows]], axis=-1)
