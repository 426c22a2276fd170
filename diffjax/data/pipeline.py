"""From a source to batches: a Grain iterator on each host, then global arrays on the mesh.

The order of examples is one infinite stream: a fresh permutation of the dataset for each epoch, one after the other,
cut into global batches of `batch_size`. Process p of P takes the p-th of P equal pieces of every batch, so that the
pieces in process order are the batch of one process, and the iterator's state, the number of batches delivered, is the
same for every P. No example is dropped: a batch that meets the end of an epoch continues in the next.
"""

import copy
import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from diffjax.data.sources import Source

if TYPE_CHECKING:
    import grain

MEMORY_LIMIT_BYTES = 2**30
PREFETCH_BATCHES = 16


def read_all(source: Source) -> dict[str, np.ndarray]:
    """The whole source in memory, in the order on disk: a dict of read-only arrays `[N, ...]`, as in its examples."""
    return source.arrays


def make_iterator(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> 'grain.DatasetIterator':
    """An infinite, deterministic iterator over this process's pieces of the global batches.

    It yields dicts of NumPy arrays with b = batch_size / process_count examples: `image` uint8 `[b, H, W, C]`,
    `video` `[b, T, H, W, C]`, or `mean` and `std` `[b, (T,) H, W, C]`, and `label` int32 `[b]`. `get_state()` and
    `set_state(state)` save and restore the place in the stream; the iterator is checkpointable by Grain's Orbax
    handler. The state does not depend on threads, memory or processes, only on batch_size.

    Args:
      source: an opened split. `batch_size` may exceed its size.
      batch_size: of the global batch.
      seed: of the shuffles.
      process_index, process_count: `jax.process_index()` and `jax.process_count()`.
      num_threads: threads that read batches ahead; for None 1 where the examples are in memory and else one per core,
        at most 16.
      memory_limit_bytes: a source that is at most this large, decoded, is decoded once and kept in memory.

    Raises ValueError for a batch that the processes cannot share equally, or a process index out of range.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f'batch_size={batch_size} must be a positive multiple of the number of processes, {process_count}.'
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index={process_index} must be in 0..{process_count - 1}.')
    if not len(source):
        raise ValueError(f'The split {source.split!r} of {source.name!r} has no examples.')
    in_memory = source.num_bytes <= memory_limit_bytes
    gather = functools.partial(_take, read_all(source)) if in_memory else source.read
    if num_threads is None:
        num_threads = 1 if in_memory else min(os.cpu_count() or 1, 16)
    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()  # shuffle first: epochs must not mix
    pieces = stream.batch(batch_size // process_count, drop_remainder=True)
    batches = pieces[process_index::process_count].map(gather)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads, PREFETCH_BATCHES)))


def _take(arrays: Mapping[str, np.ndarray], indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[indices] for name, array in arrays.items()}


def to_global(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Global arrays on the mesh from every process's piece of the batch.

    `sharding` splits the leading axis; the global arrays are `[batch_size, ...]`. What is on the mesh already stays.
    """
    return {
        name: array if isinstance(array, jax.Array) else jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


class Prefetched:
    """Batches on the mesh, one of them ahead (double buffering): it travels while the step before it computes.

    A step is started without waiting for the one before, so that most copies overlap anyway. What this adds: after the
    host has waited for the device, at a logged step or a checkpoint, the next batch is there.

    `get_state` is the place behind the batch that was handed out last, whatever lies ahead, so that a run resumes with
    the batch that it would have seen.
    """

    def __init__(self, iterator: 'grain.DatasetIterator', sharding: jax.sharding.Sharding, num_ahead: int = 1):
        self._iterator, self._sharding, self._num_ahead = iterator, sharding, num_ahead
        self._state, self._ahead = copy.deepcopy(iterator.get_state()), deque()  # (batch, the place behind it)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._ahead) <= self._num_ahead:
            batch = to_global(next(self._iterator), self._sharding)
            self._ahead.append((batch, copy.deepcopy(self._iterator.get_state())))
        batch, self._state = self._ahead.popleft()
        return batch

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)
        self._ahead.clear()
        self._state = copy.deepcopy(state)
