"""Meshes, and where each array lives on them.

Two axes: examples are split over both `data` and `fsdp`, parameters (with their optimiser state and averages) over
`fsdp` alone. Parameters are born sharded, by `jit(init, out_shardings=...)`. A third axis, `sequence`, splits the
frames of each clip, for clips that are too long for one device: whatever calls the network has its input split
(`over_time`), and the compiler has neighbouring frames exchanged where layers look at them.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.core.types import Model, PyTree

MIN_SHARDED_SIZE = 2**10  # smaller arrays are replicated: splitting them costs more than it saves
SCANNED = 'blocks'  # a word of the names of stacked layers, whose first axis is scanned over: blocks, single_blocks


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes; -1 for one of them means "all that are left".

    With `sequence` above 1 it has this axis too, whose devices are of one process.
    Raises ValueError when the product is not the number of devices.
    """
    num_devices, num_local = jax.device_count(), jax.local_device_count()
    if sequence < 1 or num_local % sequence:
        raise ValueError(f'mesh.sequence = {sequence} does not divide the {num_local} devices of a process')
    shape, given, left = [data, fsdp], max(data, fsdp), num_devices // sequence
    if shape.count(-1) == 1 and given > 0 and left % given == 0:
        shape[shape.index(-1)] = left // given
    if min(shape) < 1 or np.prod(shape) != left:
        times = f' times mesh.sequence = {sequence}' if sequence > 1 else ''
        raise ValueError(
            f'mesh.data = {data} times mesh.fsdp = {fsdp}{times} does not cover the {num_devices} devices here'
        )
    axes = {'data': shape[0], 'fsdp': shape[1]} | ({'sequence': sequence} if sequence > 1 else {})
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def num_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.size // mesh.shape.get('sequence', 1)


def over_time(model: Model, mesh: Mesh) -> Model:
    """The network with its input, clips [B, T, H, W, C], split along time; as it is where the mesh has no such axis.

    Images, and clips whose frames the axis does not divide, are not split.
    """
    size = mesh.shape.get('sequence', 1)
    if size == 1:
        return model
    sharding = NamedSharding(mesh, P(P.UNCONSTRAINED, 'sequence'))

    def apply(params, x, *args, **kwargs):
        if x.ndim == 5 and x.shape[1] % size == 0:
            x = jax.lax.with_sharding_constraint(x, sharding)
        return model.apply(params, x, *args, **kwargs)

    return model._replace(apply=apply)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices but those that share their frames."""
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
    parts = num_parts(mesh)
    if batch_size % (num_microbatches * parts):
        step = num_microbatches * parts
        fitting = [n for n in (batch_size // step * step, -(-batch_size // step) * step) if n]
        raise ValueError(
            f'batch_size = {batch_size} does not divide over {parts} devices x {num_microbatches} microbatches; '
            f'{" or ".join(map(str, fitting))} would'
        )
