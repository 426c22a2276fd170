"""Meshes, and where each array lives on them.

    data        examples
    fsdp        examples, and parameters with their optimiser state and averages: each device keeps a part of every
                parameter, and a whole layer while it computes it (Rajbhandari et al. 2020, "ZeRO", stage 3; Xu et al.
                2021, arXiv:2105.04663, section 3.2)
    tensor      the same examples, of which each device computes some heads and some hidden features (Shoeybi et al.
                2019, "Megatron-LM", arXiv:1909.08053, section 3): first products of a block are split by columns,
                its last ones by rows, and only their sums are exchanged
    sequence    frames of each clip, for clips that are too long for one device: whatever calls the network has its
                input split (`over_time`), and the compiler has neighbouring frames exchanged where layers look at them

Parameters are born sharded, by `jit(init, out_shardings=...)`. Where each is kept follows from rules, pairs of a
regular expression, which the whole path of a parameter must match, and the axes over which each of its dimensions is
split:

    (('.*attention/(q|k|v)/kernel', (None, 'tensor')), ('.*/table/embedding', (('fsdp', 'tensor'), None)))

The first match decides, and says all: what it leaves None is not split. Stacked layers are matched by the same rules as
single ones, and the dimension over layers, which no rule counts, is never split. For what no rule matches there are
`TENSOR_RULES` where the mesh has an axis `tensor`, and for the rest the largest dimension that divides goes over
`fsdp`. A rule says where a parameter is kept, never what is computed: any rules give the same results up to rounding.

What the compiler would not find out is how activations are split: with parameters over `fsdp` it takes to splitting
features, and exchanges activations in every layer in the place of parameters. `placement` tells it, by what networks
say of their axes (nets/placement.py).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.core.types import Model, PyTree

AXES = ('data', 'fsdp', 'sequence', 'tensor')
MIN_SHARDED_SIZE = 2**10  # smaller arrays are replicated: splitting them costs more than it saves
SCANNED = 'blocks'  # a word of the names of stacked layers, whose first axis is scanned over: blocks, single_blocks

Spec = tuple[str | tuple[str, ...] | None, ...]
Rules = tuple[tuple[str, Spec], ...]

# Of the blocks of transformers in nets/: kernels, and the dimension that goes over `tensor`. Queries, keys and values
# stand side by side in one kernel, so that no part of its columns is that of some heads. It is kept by rows, over
# `fsdp` as well, and a layer's is gathered when it is used, which is little beside the tokens.
PACKED = r'.*(qkv|kv)/kernel'
TENSOR_RULES = (
    (r'.*blocks?(_\w+)?/.*(qkv|kv|out)/kernel', 0),
    (r'.*blocks?(_\w+)?/.*(q|mlp_in|modulation)/kernel', 1),
)

PLACES = {'batch': ('data', 'fsdp'), 'heads': ('tensor',), 'hidden': ('tensor',), 'whole': ()}


# Meshes ---------------------------------------------------------------------------------------------------------------


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes; -1 for one of them means "all that are left".

    With `sequence` or `tensor` above 1 it has these axes too, whose devices are of one process.
    Raises ValueError when the product is not the number of devices.
    """
    num_devices, num_local = jax.device_count(), jax.local_device_count()
    others = {name: size for name, size in (('sequence', sequence), ('tensor', tensor)) if size != 1}
    inner = 1
    for name, size in others.items():
        inner *= size
        if size < 1 or num_local % inner:
            raise ValueError(f'mesh.{name} = {size} does not divide the {num_local} devices of a process')
    shape, given, left = [data, fsdp], max(data, fsdp), num_devices // inner
    if shape.count(-1) == 1 and given > 0 and left % given == 0:
        shape[shape.index(-1)] = left // given
    if min(shape) < 1 or np.prod(shape) != left:
        times = ''.join(f' times mesh.{name} = {size}' for name, size in others.items())
        raise ValueError(
            f'mesh.data = {data} times mesh.fsdp = {fsdp}{times} does not cover the {num_devices} devices here'
        )
    axes = {'data': shape[0], 'fsdp': shape[1]} | others
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def num_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices but those that share their frames or features."""
    return NamedSharding(mesh, P(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


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


# Activations ----------------------------------------------------------------------------------------------------------


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


def placement(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array] | None:
    """Where activations go, `place(x, what its axes mean)`; None where parameters are whole on each device.

    An axis that the devices do not divide is left to the compiler. So are examples on a mesh with `sequence`: networks
    fold frames into them, which no split of one axis describes.
    """
    sizes = dict(mesh.shape)
    if sizes['fsdp'] * sizes.get('tensor', 1) == 1:
        return None
    left = ('batch',) if sizes.get('sequence', 1) > 1 else ()

    def over(length: int, axis: str | None) -> Any:
        if axis is None or axis in left:
            return P.UNCONSTRAINED
        names = tuple(name for name in PLACES[axis] if name in sizes)
        return names if length % _product(sizes, names) == 0 else P.UNCONSTRAINED

    def place(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        axes += (None,) * (x.ndim - len(axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*map(over, x.shape, axes))))

    return place


# Parameters -----------------------------------------------------------------------------------------------------------


def read_rules(given: Any) -> Rules:
    """`mesh.rules` of a config, checked. Raises ValueError for what is no rule, and for axes that no mesh has."""
    if not _is_list(given):
        raise ValueError(f"mesh.rules are pairs such as ('.*qkv/kernel', (None, 'tensor')); got {given!r}")
    return tuple(map(_read_rule, given))


def _read_rule(rule: Any) -> tuple[str, Spec]:
    right = _is_list(rule) and len(rule) == 2 and isinstance(rule[0], str) and _is_list(rule[1])
    names = [name for entry in rule[1] for name in (entry if _is_list(entry) else [entry])] if right else []
    if not right or not all(name is None or isinstance(name, str) for name in names):
        raise ValueError(f"mesh.rules are pairs such as ('.*qkv/kernel', (None, 'tensor')); one is {rule!r}")
    pattern, spec = rule
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'mesh.rules: {pattern!r} is no regular expression: {error}') from error
    spec = tuple(entry if entry is None or isinstance(entry, str) else tuple(entry) for entry in spec)
    named = [name for entry in spec for name in _names(entry)]
    if unknown := [name for name in named if name not in AXES]:
        raise ValueError(f'mesh.rules: {pattern!r}: unknown axis {unknown[0]!r}; the axes are {", ".join(AXES)}')
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f'mesh.rules: {pattern!r}: {twice[0]!r} can split one dimension alone, got {spec}')
    return pattern, spec


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def parameter_spec(shape: tuple[int, ...], size: int, *, scanned: bool = False) -> P:
    """The largest axis that `size` divides goes over fsdp (the last of equals); never the axis of stacked layers."""
    return P(*_with_fsdp((), shape, size, scanned))


def _with_fsdp(spec: Spec, shape: tuple[int, ...], size: int, first: int) -> Spec:
    """`spec` with fsdp on the largest dimension, from number `first` on, that it leaves; as it is if there is none."""
    spec = (*spec, *(None,) * (len(shape) - len(spec)))
    axes = [i for i, length in enumerate(shape) if i >= first and spec[i] is None and length % size == 0]
    if size == 1 or not axes or np.prod(shape, dtype=int) < MIN_SHARDED_SIZE:
        return spec if any(spec) else ()
    best = max(axes, key=lambda i: (shape[i], i))
    return tuple('fsdp' if i == best else entry for i, entry in enumerate(spec))


def is_stacked(name: str) -> bool:
    """Whether parameters of this name have a first axis over layers; `blocks_3` is one layer, `blocks` are all."""
    words = name.split('_')
    return SCANNED in words and not words[-1].isdecimal()


def parameter_specs(mesh: Mesh, params: PyTree, rules: Rules = ()) -> dict[tuple[str, ...], P]:
    """How each parameter (an array or its shape) is split, by its path.

    Raises ValueError for a rule that no parameter matches, or whose axes do not fit those that do; and where an axis
    `tensor` splits nothing.
    """
    sizes = dict(mesh.shape)
    leaves = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, '/'.join(path)) for path in leaves):
            known = ', '.join('/'.join(path) for path in list(leaves)[:3])
            raise ValueError(f'mesh.rules: {pattern!r} matches no parameter; there are {known}, ...')
    tensor = sizes.get('tensor', 1)
    specs = {path: _parameter_spec(path, shape, sizes, rules) for path, shape in leaves.items()}
    if tensor > 1 and not any('tensor' in _names(entry) for spec in specs.values() for entry in spec):
        raise ValueError(
            f'mesh.tensor = {tensor} splits no parameter of this network: it is for transformers of nets, and for '
            'others with mesh.rules'
        )
    return specs


def _parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int], rules: Rules) -> P:
    name, first = '/'.join(path), int(any(map(is_stacked, path)))
    for pattern, spec in rules:
        if re.fullmatch(pattern, name):
            return P(*_fitted(f'mesh.rules: {pattern!r}', spec, name, shape, first, sizes))
    spec = ()
    for pattern, dimension in TENSOR_RULES if len(shape) - first == 2 else ():
        if not spec and re.fullmatch(pattern, name):
            spec = _fitted('mesh.tensor', (None,) * dimension + ('tensor',), name, shape, first, sizes)
    if re.fullmatch(PACKED, name) and len(shape) - first == 2:
        rows = tuple(axis for axis in ('tensor', 'fsdp') if sizes.get(axis, 1) > 1)
        if 'fsdp' in rows and np.prod(shape) >= MIN_SHARDED_SIZE and shape[first] % _product(sizes, rows) == 0:
            return P(*(None,) * first, rows if len(rows) > 1 else 'fsdp', None)
    return P(*_with_fsdp(spec, shape, sizes['fsdp'], first))


def _fitted(rule: str, spec: Spec, name: str, shape: tuple[int, ...], first: int, sizes: dict[str, int]) -> Spec:
    """The spec of one layer as that of a parameter `shape`, without axes that the mesh has not. Raises ValueError."""
    own = shape[first:]
    if len(spec) > len(own):
        raise ValueError(f'{rule} splits {len(spec)} dimensions, and {name} has {len(own)}, {list(own)}')
    kept = [tuple(axis for axis in _names(entry) if axis in sizes) for entry in spec]
    for length, axes in zip(own, kept):
        if length % _product(sizes, axes):
            over = ' x '.join(f'{axis} {sizes[axis]}' for axis in axes)
            raise ValueError(f'{rule}: {over} does not divide the {length} of {name}, {list(own)}')
    entries = tuple(axes[0] if len(axes) == 1 else axes or None for axes in kept)
    return (None,) * first + entries if any(entries) else ()


def state_shardings(mesh: Mesh, state: PyTree, rules: Rules = ()) -> PyTree:
    """A sharding for each leaf of a train state (arrays or shapes), or of parameters alone.

    What belongs to a parameter, averages of it and moments of its gradient, is split as the parameter is: it is known
    by its path, which ends as the parameter's does, and its shape.
    """
    params = getattr(state, 'params', state)
    specs = parameter_specs(mesh, params, rules)
    shapes = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        path = _path(path)
        for i in range(len(path)):
            if shapes.get(path[i:]) == leaf.shape:
                return NamedSharding(mesh, specs[path[i:]])
        return NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape['fsdp'], scanned=any(map(is_stacked, path))))

    return jax.tree_util.tree_map_with_path(place, state)


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry)))) for entry in path)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _product(sizes: dict[str, int], names: Sequence[str]) -> int:
    return int(np.prod([sizes[name] for name in names], dtype=int))
