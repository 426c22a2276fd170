"""Safetensors files, read and written one tensor at a time, so that memory holds one tensor and not the file.

A file is 8 bytes (the length of the header, little-endian), the header in JSON (name -> dtype, shape, and where its
bytes begin and end among the data), and the data: tensors in C order without a gap. The library `safetensors` maps a
file into memory, where it stays until it is closed, and its NumPy side does not know 8-bit floats; hence these lines.
Whatever a file says about itself is checked before anything is believed.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffjax.weights.architecture import WeightsError

DTYPES = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U64': np.dtype('<u8'),
    'U32': np.dtype('<u4'),
    'U16': np.dtype('<u2'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the library
JSON_ERRORS = (ValueError, RecursionError)  # of json: no JSON, no UTF-8, endless digits; and nested without end


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Mapping):
    """The tensors of a safetensors file by name; each is read when it is asked for. `metadata` is text by name.

    Raises WeightsError for a file that is not one, or that is shorter or longer than it says.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, 'rb') as file:
                length = int.from_bytes(file.read(8), 'little')
                if size < 8 or length > min(size - 8, HEADER_LIMIT):
                    raise self._wrong('it is truncated, or no safetensors file')
                header = file.read(length)
        except OSError as error:
            raise self._wrong(error.strerror or 'it cannot be read') from error
        self._start = 8 + length
        self._places = self._parse(header, size - self._start)
        self.specs = {name: spec for name, (spec, _) in self._places.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        spec, begin = self._places[name]
        try:
            with open(self.path, 'rb') as file:
                file.seek(self._start + begin)
                a = np.fromfile(file, spec.dtype, math.prod(spec.shape))
        except OSError as error:
            raise self._wrong(error.strerror or 'it cannot be read') from error
        if a.nbytes != spec.num_bytes:
            raise self._wrong(f'it ends before the end of {name}')
        return a.reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _wrong(self, why: str) -> WeightsError:
        return WeightsError(f'{self.path}: {why}')

    def _parse(self, header: bytes, size: int) -> dict[str, tuple[Spec, int]]:
        """Name -> (spec, where its bytes begin), in the order of the data."""
        try:
            entries = json.loads(header, object_pairs_hook=_table)
        except JSON_ERRORS as error:
            raise self._wrong('its header is no JSON, or has a name twice: damaged, or no safetensors file') from error
        if not isinstance(entries, dict):
            raise self._wrong('its header is no table of tensors')
        self.metadata = entries.pop('__metadata__', None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise self._wrong('its metadata is no table of texts')
        places = sorted((self._place(name, entry) for name, entry in entries.items()), key=lambda p: (p[2], p[3]))
        end = 0
        for name, _, begin, until in places:
            if begin != end:
                raise self._wrong(f'its header puts {name} at byte {begin}, where {end} would be right')
            end = until
        if end != size:
            raise self._wrong(f'it holds {size} bytes of data and its header speaks of {end}: truncated or damaged')
        return {name: (spec, begin) for name, spec, begin, _ in places}

    def _place(self, name: str, entry: Any) -> tuple[str, Spec, int, int]:
        """(name, spec, first byte, byte after the last)."""
        if not name.isprintable() or len(name) > 1000:
            raise self._wrong(f'its header has a name that is none: {name[:40]!r}')
        try:
            code, shape, (begin, end) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
            dtype = DTYPES[code]
        except (KeyError, TypeError, ValueError) as error:
            code = entry.get('dtype') if isinstance(entry, dict) else entry
            known = 'dtype, shape and data_offsets'
            raise self._wrong(f'{name} has {known} that are not understood (dtype {str(code)[:20]!r})') from error
        numbers = (*shape, begin, end)
        if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers) or len(shape) > 8:
            raise self._wrong(f'{name} has a shape or place that is none: {str(numbers)[:80]}')
        spec = Spec(shape, dtype)
        if end - begin != spec.num_bytes:
            raise self._wrong(f'{name}, {code} {list(shape)}, takes {spec.num_bytes} bytes and has {end - begin}')
        return name, spec, begin, end


class TensorWriter:
    """A safetensors file whose tensors are written in any order. A context; leaving it checks that all have come.

    They lie by falling size of their numbers, so that each begins where its dtype wants it. metadata: text by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] = {}):  # noqa: B006
        # without a format transformers does not load a file
        header: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
        self._specs, self._places, begin = specs, {}, 0
        for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
            spec = specs[name]
            offsets = [begin, begin + spec.num_bytes]
            header[name] = {'dtype': CODES[spec.dtype], 'shape': list(spec.shape), 'data_offsets': offsets}
            self._places[name], begin = begin, offsets[1]
        text = json.dumps(header, separators=(',', ':')).encode()
        text += b' ' * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = open(path, 'xb')  # noqa: SIM115  closed when the context is left
        self._file.write(len(text).to_bytes(8, 'little') + text)

    def __enter__(self) -> 'TensorWriter':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None and self._places:
            raise ValueError(f'{len(self._places)} tensors were announced and not written: {sorted(self._places)[:3]}')

    def write(self, name: str, a: np.ndarray) -> None:
        a = np.asarray(a, self._specs[name].dtype, order='C')
        if a.shape != self._specs[name].shape:
            raise ValueError(f'{name} was announced as {self._specs[name].shape} and comes as {a.shape}')
        self._file.seek(self._start + self._places.pop(name))
        self._file.write(a.reshape(-1).view(np.uint8).data)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of JSON. Raises ValueError for a key that stands there twice: which one is meant?"""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError('a key stands there twice')
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top is a table. Raises WeightsError for anything else."""
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise WeightsError(f'{path}: too long for a file of settings')
        content = json.loads(path.read_bytes(), object_pairs_hook=_table)
    except OSError as error:
        raise WeightsError(f'{path}: {error.strerror or "it cannot be read"}') from error
    except JSON_ERRORS as error:
        raise WeightsError(f'{path}: it is no JSON, or has a name twice') from error
    if not isinstance(content, dict):
        raise WeightsError(f'{path}: it holds no table of settings')
    return content


def total_bytes(specs: Iterable[Spec]) -> int:
    return sum(spec.num_bytes for spec in specs)
