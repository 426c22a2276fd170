"""Splash attention on TPUs: jax's Pallas kernel, for any lengths, key masks, and batches or heads over several devices.

A kernel is opaque to the partitioner, so its forward and backward pass each say how they split: over batch and heads,
with whole sequences on every device. The backward pass runs the forward kernel again, so that nothing but q, k and v is
kept. Off TPUs the kernel is interpreted, which is slow and gives the same numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LANES = 128  # sequences come in multiples of a vector register's width


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array) -> jax.Array:
    """softmax(q k^T) v for each head, q already scaled.

    q: [B, L, heads, head_dim]; k, v: [B, S, heads, head_dim]; present: bool [B, S]. Returns [B, L, heads, head_dim].
    """
    length = q.shape[1]

    def padded(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, 0), (0, -a.shape[1] % LANES)) + ((0, 0),) * (a.ndim - 2))

    q, k, v, present = map(padded, (q, k, v, present.astype(jnp.int32)))
    return _attend(_kernel(q.shape[1], k.shape[1]), q, k, v, present)[:, :length]


@functools.lru_cache(maxsize=32)
def _kernel(length: int, source: int):
    rows, columns = (next(n for n in (512, 256, LANES) if size % n == 0) for size in (length, source))
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )
    everything = splash.MultiHeadMask([splash.FullMask((length, source))])
    interpret = jax.default_backend() != 'tpu'
    with jax.ensure_compile_time_eval():  # its tables of blocks are arrays, kept for other traces than this one
        return splash.make_splash_mha_single_device(everything, block_sizes=sizes, interpret=interpret)


def _run(kernel, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array) -> jax.Array:
    """The whole of it on one device."""
    # A query sees the keys of its own segment: 1 is what is there, 0 what is masked or padding.
    segments = splash.SegmentIds(q=jnp.ones(q.shape[:2], jnp.int32), kv=present)
    heads_first = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)


def _gradients(kernel, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array, g: jax.Array) -> tuple:
    return jax.vjp(lambda q, k, v: _run(kernel, q, k, v, present), q, k, v)[1](g)


def _split(function, rule: str):
    """`function(kernel, q, ...)`, split over batch and heads as q is; the kernel's tables go to every device."""
    split = custom_partitioning(function)

    def partition(mesh, arguments, result):
        spec = tuple(arguments[1].sharding.spec)
        batch, _, heads, _ = spec + (None,) * (4 - len(spec))
        by_axes = {4: P(batch, None, heads, None), 2: P(batch, None), 3: P()}

        def place(a):
            return NamedSharding(mesh, by_axes[len(a.shape)])

        return mesh, function, jax.tree.map(place, result), jax.tree.map(place, arguments)

    tables = ', '.join(f'x{i} y{i} z{i}' for i in range(len(jax.tree.leaves(_kernel(LANES, LANES)))))
    split.def_partition(partition, sharding_rule=f'{tables}, {rule}', need_replication_factors=('l', 'd', 's'))
    return split


_forward = _split(_run, 'b l h d, b s h d, b s h d, b s -> b l h d')
_backward = _split(_gradients, 'b l h d, b s h d, b s h d, b s, b l h d -> b l h d, b s h d, b s h d')


@jax.custom_vjp
def _attend(kernel, q, k, v, present):
    return _forward(kernel, q, k, v, present)


def _backward_rule(saved, g):
    kernel, *_, present = saved
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), (kernel, present))
    return (nothing[0], *_backward(*saved, g), nothing[1])


_attend.defvjp(lambda *arguments: (_forward(*arguments), arguments), _backward_rule)
