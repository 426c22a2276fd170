"""Meshes, and where each array lives on them.

Two axes: examples are split over both `data` and `fsdp`, parameters (with their optimiser state and averages) over
`fsdp` alone. Parameters are born sharded, by `jit(init, out_shardings=...)`.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.core.types import PyTree

MIN_SHARDED_SIZE = 2**10  # smaller arrays are replicated: splitting them costs more than it saves
SCANNED = 'blocks'  # a word of the names of stacked layers, whose first axis is scanned over: blocks, single_blocks


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes; -1 for one of them means "all that are left".

    Raises ValueError when the product is not the number of devices.
    """
    num_devices = jax.device_count()
    shape, given = [data, fsdp], max(data, fsdp)
    if shape.count(-1) == 1 and given > 0 and num_devices % given == 0:
        shape[shape.index(-1)] = num_devices // given
    if min(shape) < 1 or np.prod(shape) != num_devices:
        raise ValueError(f'mesh.data = {data} times mesh.fsdp = {fsdp} does not cover the {num_devices} devices here')
    return jax.make_mesh(tuple(shape), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices."""
    return NamedSharding(mesh, P(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def parameter_spec(shape: tuple[int, ...], size: int, *, scanned: bool = False) -> P:
    """The largest axis that `size` divides goes over fsdp (the last of equals); never the axis of stacked layers."""
    axes = [i for i, length in enumerate(shape) if i >= scanned and length % size == 0]
    if size == 1 or not axes or np.prod(shape, dtype=int) < MIN_SHARDED_SIZE:
        return P()
    best = max(axes, key=lambda i: (shape[i], i))
    return P(*['fsdp' if i == best else None for i in range(len(shape))])


def is_stacked(name: str) -> bool:
    """Whether parameters of this name have a first axis over layers; `blocks_3` is one layer, `blocks` are all."""
    words = name.split('_')
    return SCANNED in words and not words[-1].isdecimal()


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """A sharding for each leaf of a state (arrays or shapes)."""

    def place(path, leaf):
        scanned = any(is_stacked(str(getattr(entry, 'key', ''))) for entry in path)
        return NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape['fsdp'], scanned=scanned))

    return jax.tree_util.tree_map_with_path(place, state)


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError unless each microbatch divides over the devices."""
    if batch_size % (num_microbatches * mesh.size):
        step = num_microbatches * mesh.size
        fitting = [n for n in (batch_size // step * step, -(-batch_size // step) * step) if n]
        raise ValueError(
            f'batch_size = {batch_size} does not divide over {mesh.size} devices x {num_microbatches} microbatches; '
            f'{" or ".join(map(str, fitting))} would'
        )
