"""Imported weights on disk: an Orbax checkpoint of the parameters, and network.json, which says of what network.

    DIR/network.json    {'network': {'name': 'DiT', ...}, 'input': ..., 'source': ..., 'parameters': ..., ...}
    DIR/params/         the parameters, unrolled, in nested dicts; each a Zarr array in a folder of its own

network.json holds the SHA-256 of each array and of itself: Orbax gives damaged bytes back without a word. Arrays are
written and read one after the other, so that memory holds about one of them.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from diffjax.core.types import PyTree
from diffjax.weights.architecture import INPUT, WeightsError
from diffjax.weights.engine import Deferred, build_network, import_leaves, nested
from diffjax.weights.folders import appearing, check_absent, check_inside
from diffjax.weights.registry import ARCHITECTURES
from diffjax.weights.sources import Source, open_source
from diffjax.weights.tensors import CODES, DTYPES, Spec, read_json

KEYS = ('network', 'input', 'class_name', 'source', 'dtypes', 'parameters', 'sha256')
Report = Callable[[int], Any]  # is told the bytes that have been done since it was told last


class Weights(NamedTuple):
    network: Any  # the Flax module, layers unrolled
    params: PyTree  # nested dicts of NumPy arrays
    record: dict[str, Any]  # network.json


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes `Deferred` arrays as NumPy's, each read when its turn has come, and tells what it has written."""

    def __init__(self, written: Callable[[str, np.ndarray], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._written = written

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values)):
            a = value.read()
            for future in await super().serialize([a], [info], [arg]):
                future.result()
            self._written(info.name.replace('.', '/'), a)
        return []


def import_source(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    variant: str = '',
    dtype: str | None = 'float32',
    start: Callable[[Source, int], Report] = lambda source, num_bytes: lambda n: None,
) -> Path:
    """Writes the weights at `path` as the folder `out`, which must not be there, and returns it.

    Args:
        variant: of the files, such as 'fp16'.
        dtype: of the parameters; None keeps that of the tensors.
        start: is called once everything has been checked, and returns what is told of the progress.
    """
    check_absent(out)
    source = open_source(path, variant=variant)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    leaves = import_leaves(source.architecture, source.options, source.tensors, shapes)
    report = start(source, sum(4 * int(np.prod(leaf.shape)) for leaf in leaves.values()))
    with appearing(out) as folder:
        parameters = _write_params(folder / 'params', leaves, dtype, report)
        record = {
            'network': {'name': source.architecture.network, **source.options},
            'input': source.options[INPUT],
            'class_name': source.architecture.class_name,
            'source': {'path': str(source.path.absolute()), 'files': list(source.files), 'config': source.config},
            'dtypes': _dtypes(source.specs),
            'parameters': parameters,
        }
        del record['network'][INPUT]
        record['sha256'] = _digest_record(record)
        (folder / 'network.json').write_text(json.dumps(record, indent=1) + '\n')
    return Path(out)


def _write_params(
    folder: Path, leaves: Mapping[str, Deferred], dtype: str | None, report: Report
) -> dict[str, dict[str, Any]]:
    """Writes an Orbax checkpoint, and returns path -> {shape, dtype, sha256}."""
    parameters: dict[str, dict[str, Any]] = {}

    def written(path: str, a: np.ndarray) -> None:
        parameters[path] = {'shape': list(a.shape), 'dtype': CODES[a.dtype], 'sha256': _digest(a)}
        report(4 * a.size)

    def deferred(leaf: Deferred) -> Deferred:
        return Deferred(leaf.shape, lambda: np.asarray(leaf.read(), dtype, order='C'))

    types = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, _Handler(written)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights do not compress, and files of their own are quicker than one database of many small commits.
    layout = {'use_ocdbt': False, 'use_zarr3': False, 'use_compression': False}
    handler = ocp.PyTreeCheckpointHandler(**layout, type_handler_registry=types)
    tree = nested({path: _Leaf(deferred(leaf)) for path, leaf in leaves.items()})
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    except WeightsError:
        raise
    except (ValueError, RuntimeError) as error:  # what tensorstore raises on a full disk
        raise WeightsError(f'{folder.parent.name} cannot be written: {str(error).strip().splitlines()[0]}') from error
    return {path: parameters[path] for path in leaves}


class _Leaf:
    """A `Deferred` as a leaf: a NamedTuple would be a node of the tree."""

    def __init__(self, deferred: Deferred):
        self.shape, self.read = deferred.shape, deferred.read


def _dtypes(specs: Mapping[str, Spec]) -> dict[str, Any]:
    """What the tensors came in: the code of most of them, and of each other one."""
    codes = {name: CODES[spec.dtype] for name, spec in specs.items()}
    most = Counter(codes.values()).most_common(1)[0][0]
    return {'most': most, 'others': {name: code for name, code in codes.items() if code != most}}


def load(folder: str | os.PathLike) -> Weights:
    """The network of an imported folder and its parameters, verified.

    Raises WeightsError for a folder that `import` did not write, or that has changed since.
    """
    record = read_record(folder)
    leaves = StoredLeaves(folder, record)
    options = {key: value for key, value in record['network'].items() if key != 'name'}
    network = build_network(ARCHITECTURES[record['class_name']], options)
    return Weights(network, nested(dict(leaves.items())), record)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """network.json, verified."""
    path = Path(folder) / 'network.json'
    check_inside(path, Path(folder))
    if not path.is_file():
        raise WeightsError(f'{folder}: no network.json in it; python -m diffjax.weights import writes such folders')
    record = read_json(path)
    if sorted(record) != sorted(KEYS):
        raise WeightsError(f'{path}: it has the keys {", ".join(map(repr, record))[:200]} instead of {", ".join(KEYS)}')
    if record['sha256'] != _digest_record(record):
        raise WeightsError(f'{path}: it has been changed since it was written, or is damaged')
    for key, holds in CONTENTS.items():
        if not holds(record):
            raise WeightsError(f'{path}: {key} is {str(record[key])[:80]}, and not what import writes there')
    return record


def _is_parameter(path: str, known: Any) -> bool:
    """Whether a parameter has a name that stays in its folder, and a shape, dtype and digest."""
    return (
        re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)*', path) is not None
        and isinstance(known, dict)
        and isinstance(known.get('shape'), list)
        and all(type(size) is int and 0 <= size < 2**62 for size in known['shape'])
        and isinstance(known.get('dtype'), str)
        and known['dtype'] in DTYPES
        and isinstance(known.get('sha256'), str)
    )


def _is_dtypes(dtypes: Any) -> bool:
    return (
        isinstance(dtypes, dict)
        and isinstance(dtypes.get('others'), dict)
        and all(code in CODES.values() for code in (dtypes.get('most'), *dtypes['others'].values()))
    )


CONTENTS = {  # of network.json: key -> whether it holds what it should; in this order
    'class_name': lambda record: isinstance(record['class_name'], str) and record['class_name'] in ARCHITECTURES,
    'network': lambda record: (
        isinstance(record['network'], dict)
        and record['network'].get('name') == ARCHITECTURES[record['class_name']].network
    ),
    'input': lambda record: isinstance(record['input'], dict),
    'source': lambda record: isinstance(record['source'], dict) and isinstance(record['source'].get('path'), str),
    'dtypes': lambda record: _is_dtypes(record['dtypes']),
    'parameters': lambda record: (
        isinstance(record['parameters'], dict)
        and all(_is_parameter(path, known) for path, known in record['parameters'].items())
    ),
}


class StoredLeaves(Mapping):
    """The parameters of an imported folder: path -> array, each read and verified when it is asked for.

    Not by Orbax, which restores trees and, where one is damaged, lets its threads write pages to the terminal.
    """

    def __init__(self, folder: str | os.PathLike, record: Mapping[str, Any]):
        self._folder, self._parameters = Path(folder).absolute() / 'params', record['parameters']

    def __getitem__(self, path: str) -> np.ndarray:
        known = self._parameters[path]
        folder = self._folder / path.replace('/', '.')
        check_inside(folder, self._folder)
        place = {'driver': 'file', 'path': str(folder)}
        try:
            stored = tensorstore.open({'driver': 'zarr', 'kvstore': place}, open=True).result()
            _check_stored(stored, known, f'{self._folder}: {path} is damaged: it is not what was written')
            a = stored.read().result()
        except WeightsError:
            raise
        except (ValueError, OSError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise WeightsError(f'{self._folder}: {path} cannot be read ({reason})') from error
        if a.dtype != DTYPES[known['dtype']] or _digest(a) != known['sha256']:
            raise WeightsError(f'{self._folder}: {path} is damaged: it is not what was written')
        return a

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _check_stored(stored: Any, known: Mapping[str, Any], message: str) -> None:
    """Raises WeightsError for another array than was written: before memory is asked for, whose lack ends the process.

    stored: a `tensorstore.TensorStore`.
    """
    chunks = stored.chunk_layout.read_chunk.shape or ()
    fits = stored.shape == tuple(known['shape']) and stored.dtype.numpy_dtype == DTYPES[known['dtype']]
    if not fits or any(chunk > max(size, 1) for chunk, size in zip(chunks, stored.shape)):
        raise WeightsError(message)


def _digest(a: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(a, order='C').reshape(-1).view(np.uint8).data).hexdigest()


def _digest_record(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
