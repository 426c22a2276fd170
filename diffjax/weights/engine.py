"""One engine that reads a table in both directions: their tensors -> our parameters -> their tensors.

Whether the names and shapes of a checkpoint are those of the table is settled before a value is read: our shapes come
from an abstract initialisation of the network, theirs from these by the layouts. Values then pass one row at a time,
so that a checkpoint never stands in memory as a whole unless the caller collects it.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from diffjax import nets
from diffjax.core.types import PyTree
from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.rules import Layout, Leaf

Options = Mapping[str, Any]
Tensors = Mapping[str, Any]  # name -> array; may read each only when asked for it
Shapes = Mapping[str, tuple[int, ...]]

NAMES_SHOWN = 12  # of each kind in an error; whatever differs in numbers alone counts as one


class Deferred(NamedTuple):
    """An array that is read, or made, when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def import_tensors(
    architecture: Architecture, options: Options, tensors: Tensors, *, dtype: str | None = 'float32'
) -> PyTree:
    """Parameters for the network, unrolled: nested dicts of NumPy arrays. dtype: None keeps each tensor's own.

    Raises WeightsError, one for everything that is missing, unexpected or misshapen.
    """
    shapes = {name: tuple(np.shape(a)) for name, a in tensors.items()}
    leaves = import_leaves(architecture, options, tensors, shapes)
    return nested({path: np.asarray(leaf.read(), dtype, order='C') for path, leaf in leaves.items()})


def export_tensors(architecture: Architecture, options: Options, params: PyTree) -> dict[str, np.ndarray]:
    """Their tensors by name, in the dtypes of `params` (unrolled, or scanned layers unstacked before)."""
    leaves = flat(params)
    return dict(export_leaves(architecture, options, leaves, {path: np.shape(a) for path, a in leaves.items()}))


def import_leaves(
    architecture: Architecture, options: Options, tensors: Tensors, shapes: Shapes
) -> dict[str, Deferred]:
    """Path -> parameter of ours, to be read from theirs, after everything that can be checked has been checked."""
    rows = _rows(architecture, options)
    constants = architecture.constants(options)
    check_names(architecture.class_name, shapes, _expected(rows), constants)
    for name in constants:
        if name in shapes:
            _check_constant(name, tensors[name], constants[name])
    return {
        leaf.ours: Deferred(ours.shape, functools.partial(_import_leaf, leaf, ours, tensors)) for leaf, ours in rows
    }


def export_leaves(
    architecture: Architecture, options: Options, leaves: Mapping[str, Any], shapes: Shapes
) -> Iterator[tuple[str, np.ndarray]]:
    """(name of their tensor, its values), row by row."""
    rows = _rows(architecture, options)
    check_names(architecture.network, shapes, {leaf.ours: ours.shape for leaf, ours in rows})
    for leaf, _ in rows:
        yield from _export_leaf(leaf, leaves)  # whose variables are gone before the next is read
    yield from architecture.constants(options).items()


def expected_shapes(architecture: Architecture, options: Options) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint of theirs: what export writes."""
    constants = {name: tuple(np.shape(a)) for name, a in architecture.constants(options).items()}
    return _expected(_rows(architecture, options)) | constants


def build_network(architecture: Architecture, options: Options):
    """Our Flax module. Raises WeightsError where the network refuses the options."""
    keywords = {name: value for name, value in options.items() if name != INPUT}
    try:
        return getattr(nets, architecture.network)(**keywords)
    except (TypeError, ValueError) as error:
        raise WeightsError(f'{architecture.class_name} as {architecture.network}: {error}') from error


def parameter_shapes(architecture: Architecture, options: Options) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter of our network, without allocating one."""
    return _parameter_shapes(architecture, json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(architecture: Architecture, options: str) -> dict[str, jax.ShapeDtypeStruct]:
    network = build_network(architecture, json.loads(options))
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), *architecture.inputs(json.loads(options)))
    except (TypeError, ValueError) as error:
        raise WeightsError(f'{architecture.class_name} as {architecture.network}: {error}') from error
    return flat(variables['params'])


def flat(tree: PyTree) -> dict[str, Any]:
    """Nested dicts -> {'a/b/c': leaf}."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {'/'.join(key.key for key in path): leaf for path, leaf in paths}


def nested(leaves: Mapping[str, Any]) -> PyTree:
    """{'a/b/c': leaf} -> nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split('/')
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def check_names(what: str, found: Shapes, expected: Shapes, optional: Mapping[str, Any] = {}) -> None:  # noqa: B006
    """Raises one WeightsError for all that is missing, unexpected or misshapen. found, expected: name -> shape."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in optional]
    misshapen = [
        f'{name} is {list(found[name])} and should be {list(shape)}'
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (('missing', missing), ('unexpected', unexpected), ('of another shape', misshapen))
    told = [f'{len(names)} {kind}: {summary(names)}' for kind, names in kinds if names]
    if told:
        raise WeightsError(f'these are not the tensors of {what} in this configuration; {"; ".join(told)}')


def summary(names: Iterable[str]) -> str:
    """Names in one line: those that differ in their numbers alone as one, with how many they are."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r'(?<=[._/])\d+(?=[._/])', '*', name), []).append(name)
    told = [group[0] if len(group) == 1 else f'{kind} ({len(group)})' for kind, group in alike.items()]
    rest = sum(map(len, list(alike.values())[NAMES_SHOWN:]))
    return ', '.join(told[:NAMES_SHOWN]) + (f' and {rest} more' if rest else '')


def _rows(architecture: Architecture, options: Options) -> list[tuple[Leaf, jax.ShapeDtypeStruct]]:
    """The table's rows with the shapes of our parameters. A table that is not the network's is a mistake of ours."""
    shapes = parameter_shapes(architecture, options)
    table = architecture.table(options)
    named = [leaf.ours for leaf in table]
    difference = sorted(set(named) ^ set(shapes)) or [name for name in named if named.count(name) > 1]
    if difference:
        raise WeightsError(
            f'the table of {architecture.class_name} and the parameters of {architecture.network} differ in '
            f'{summary(difference)}'
        )
    return [(leaf, shapes[leaf.ours]) for leaf in table]


def _expected(rows: Iterable[tuple[Leaf, jax.ShapeDtypeStruct]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that rows read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, ours in rows:
        for i, size in enumerate(_sizes(ours.shape, leaf)):
            theirs = _their_shape(leaf.layout, (*ours.shape[:-1], size) if leaf.theirs[1:] else ours.shape)
            shapes |= {names[i]: theirs for names in (leaf.theirs, *leaf.copies)}
    return shapes


@functools.lru_cache(maxsize=4096)
def _their_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return jax.eval_shape(layout.to_theirs, jax.ShapeDtypeStruct(shape, np.float32)).shape
    except (TypeError, ValueError) as error:
        raise WeightsError(f'a layout does not fit a parameter of shape {list(shape)}: {error}') from error


def _sizes(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    """Of the parts along our last axis, one for each of their tensors."""
    if len(leaf.theirs) < 2:
        return (0,) * len(leaf.theirs)  # whole: a scalar has no last axis
    sizes = leaf.sizes or (shape[-1] // len(leaf.theirs),) * len(leaf.theirs)
    if len(sizes) != len(leaf.theirs) or sum(sizes) != shape[-1]:
        raise WeightsError(f'{leaf.ours} of shape {list(shape)} does not split into {len(leaf.theirs)} of {sizes}')
    return sizes


def _export_leaf(leaf: Leaf, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    a = np.asarray(leaves[leaf.ours])
    if leaf.value is not None:
        _check_constant(leaf.ours, a, leaf.value())
        return
    for i, part in enumerate(_split(a, leaf)):
        theirs = np.asarray(leaf.layout.to_theirs(part), order='C')
        for names in (leaf.theirs, *leaf.copies):
            yield names[i], theirs


def _split(a: np.ndarray, leaf: Leaf) -> list[np.ndarray]:
    sizes = _sizes(a.shape, leaf)
    return [a] if len(sizes) == 1 else np.split(a, np.cumsum(sizes)[:-1], axis=-1)


def _import_leaf(leaf: Leaf, ours: jax.ShapeDtypeStruct, tensors: Tensors) -> np.ndarray:
    if leaf.value is not None:
        return np.asarray(leaf.value(), np.float32)
    parts = []
    for i, name in enumerate(leaf.theirs):
        tensor = np.asarray(tensors[name])
        if not is_float(tensor.dtype):
            raise WeightsError(f'{name} comes as {tensor.dtype}, which is no dtype of weights')
        for copy in leaf.copies:
            if not _same_bits(np.asarray(tensors[copy[i]]), tensor):
                raise WeightsError(f'{name} and {copy[i]} should hold the same values, and differ')
        parts.append(leaf.layout.to_ours(tensor))
    a = parts[0] if len(parts) == 1 else np.concatenate(_of_one_dtype(parts), axis=-1)
    if a.shape != ours.shape:
        raise WeightsError(f'the layout of {leaf.ours} makes {list(a.shape)} of it instead of {list(ours.shape)}')
    return a


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    words = [np.ascontiguousarray(c).reshape(-1).view(np.uint8) for c in (a, b)]
    return a.dtype == b.dtype and np.array_equal(*words)


def _of_one_dtype(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays in a dtype that holds all of them exactly; NumPy knows none for float16 and bfloat16."""
    dtypes = {a.dtype for a in parts}
    wider = np.float64 if np.dtype(np.float64) in dtypes else np.float32
    return parts if len(dtypes) == 1 else [a.astype(wider) for a in parts]


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of this dtype have a fraction: NumPy's floats, bfloat16 and the 8-bit ones."""
    try:
        return bool(ml_dtypes.finfo(dtype)) and np.dtype(dtype).kind != 'c'
    except ValueError:
        return False


def _check_constant(name: str, found: Any, wanted: Any) -> None:
    """Raises WeightsError unless `found` is `wanted` to the precision of the coarser of their dtypes."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    shapes = tuple(found.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        raise WeightsError(f'{name} is {list(shapes[0])} and should be {list(shapes[1])}')
    floats = [a.dtype for a in (found, wanted) if is_float(a.dtype)]
    tolerance = max((4 * float(ml_dtypes.finfo(dtype).eps) for dtype in floats), default=0.0)
    wanted = wanted.astype(np.float64)
    tolerance *= np.max(np.abs(wanted), initial=1.0)
    if not np.max(np.abs(found.astype(np.float64) - wanted), initial=0.0) <= tolerance:  # NaN neither
        raise WeightsError(f'{name} follows from the configuration, and its values are others')
