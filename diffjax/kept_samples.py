"""What has been drawn so far, kept on disk: a command that dies while it samples goes on with the next batch.

Each batch is a file of its own,

    FOLDER/FIRST-MADE_BY-CRC.npy      FIRST: the number of its first sample; CRC: the CRC-32 of the file's bytes

and MADE_BY the digest of all that samples depend on (`digest_of`): parameters, labels, plan, seed, devices and so on.
A batch of another making is removed, and never mixed with what is drawn now. When the whole is written the files go.
They are not worth the end of a run: where the disk takes no more of them, all are removed, and drawing goes on without.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.training.processes import from_process_0

log = logging.getLogger('diffjax')

NAME = re.compile(r'(\d{8,})-([0-9a-f]{16})-([0-9a-f]{8})\.(npy|part)')


class Kept:
    """The batches in a folder that were made by the same. Process 0 reads and writes them; all processes have them."""

    def __init__(self, folder: Path, made_by: str, sample: jax.ShapeDtypeStruct):
        """made_by: as of `digest_of`. sample: the shape and the type of one."""
        self._folder, self._made_by, self._sample = folder, made_by, sample
        self._writes = jax.process_index() == 0
        self._batches = _shared(dict(self._read()) if self._writes else {}, sample)
        if self._writes and self._batches:
            log.warning('going on after %s samples that were drawn before, in %s', f'{self.num_samples:,}', folder)

    @property
    def num_samples(self) -> int:
        """How many are there, and have not been taken."""
        return sum(len(samples) for samples in self._batches.values())

    def take(self, first: int, number: int) -> np.ndarray | None:
        """Samples first to first + number, as they were kept; None where they have to be drawn."""
        samples = self._batches.pop(first, None)
        return samples if samples is not None and len(samples) == number else None

    def keep(self, first: int, samples: np.ndarray) -> None:
        if not self._writes:
            return
        data = io.BytesIO()
        np.save(data, samples, allow_pickle=False)
        data = data.getvalue()
        name = f'{first:08d}-{self._made_by}-{zlib.crc32(data):08x}'
        part = self._folder / f'{name}.part'
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(self._folder / f'{name}.npy')
        except OSError as error:
            self._writes = False
            reason = (error.strerror or str(error)).lower()
            log.warning('samples cannot be kept in %s while they are drawn (%s): all or none', self._folder, reason)
            with contextlib.suppress(OSError):  # of a folder that takes no change at all
                self.clear()

    def clear(self) -> None:
        """Removes all batches, and those of other makings: the whole is written."""
        if jax.process_index() or not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _read(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first, samples) of each batch that is whole and was made by the same; other files of ours are removed."""
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if (match := NAME.fullmatch(path.name)) is None:
                continue
            first, made_by, crc, ending = match.groups()
            if ending == 'npy' and made_by == self._made_by:
                try:
                    yield int(first), self._checked(path.read_bytes(), int(crc, 16))
                    continue
                except ValueError as error:
                    log.warning('%s is damaged (%s): its samples are drawn again', path, error)
            path.unlink(missing_ok=True)

    def _checked(self, data: bytes, crc: int) -> np.ndarray:
        """Raises ValueError for anything but samples as they were written."""
        if zlib.crc32(data) != crc:
            raise ValueError('its bytes are not those that were written')
        samples = np.load(io.BytesIO(data), allow_pickle=False)
        if (samples.dtype, samples.shape[1:]) != (self._sample.dtype, self._sample.shape):
            raise ValueError(f'it holds {samples.dtype} {list(samples.shape)}')
        return samples


def _shared(batches: dict[int, np.ndarray], sample: jax.ShapeDtypeStruct) -> dict[int, np.ndarray]:
    """Those of process 0, on every process."""
    if jax.process_count() == 1:
        return batches
    shared = {}
    for first in json.loads(from_process_0(json.dumps(list(batches)).encode())):
        data = from_process_0(batches.pop(first).tobytes() if batches else b'')
        shared[first] = np.frombuffer(data, sample.dtype).reshape(-1, *sample.shape)
    return shared


def digest_of(made_by: Mapping[str, Any]) -> str:
    """16 digits of the SHA-256 of a table of plain values, arrays, and dataclasses and tuples of these."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f'no digest of {value!r:.80}')
    value = np.asarray(value)
    content = np.ascontiguousarray(np.atleast_1d(value)).view(np.uint8)
    return [str(value.dtype), value.shape, hashlib.sha256(content).hexdigest()]
