"""Going through a set of images once, part by part: moments, the Inception Score, and points for neighbours.

Each process takes its own stretch of the set and each part of it is split over that process's devices; what they found
is put together at the end. Memory holds one part of images, the moments, and the points that are kept.

    IS = exp( mean_x sum_k p(k|x) (log p(k|x) - log p(k)) ),     p(k) = mean_x p(k|x)                               (1)

Salimans et al. 2016, section 4; the mean of it over stretches of 5,000 images in their order, as in ADM's evaluator.
"""

import io
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffjax.evaluation.image_sets import ImageSet
from diffjax.evaluation.moments import Moments, merge, moments
from diffjax.evaluation.spaces import Features, Space

SPLIT = 5000  # images of one Inception Score
KEPT = 50_000  # points for precision and recall, at most: 400 MB of 2048 float32 features
ROWS = 512  # points that enter the moments together: fewer would leave the matrix product slow


class Collected(NamedTuple):
    """What is known of a set of images in a space."""

    count: int
    points: np.ndarray  # [<= KEPT, D] float32
    moments: Moments
    spatial: Moments | None
    inception_score: float | None
    images_per_second: float  # of all processes, without the time to compile


class _Sums(NamedTuple):
    """Of (1), for each stretch of images."""

    counts: np.ndarray  # [stretches]
    classes: np.ndarray  # [stretches, K] sum p(k|x)
    negentropies: np.ndarray  # [stretches] sum p(k|x) log p(k|x)

    def score(self) -> float:
        mean = self.classes / self.counts[:, None]
        log_mean = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
        return float(np.exp(self.negentropies / self.counts - (mean * log_mean).sum(1)).mean())


def collect(images: ImageSet, space: Space, *, progress: bool = False) -> Collected:
    """Extract and sum up. All processes call it, and all return the same; with `progress` process 0 shows rate and ETA.

    Raises ValueError for fewer than two images, and for features that are not finite.
    """
    count = images.shape[0]
    if count < 2:
        raise ValueError(f'{images.name} holds {count} image: moments need at least 2')
    share = -(-count // jax.process_count())
    start = min(jax.process_index() * share, count)
    stop = min(start + share, count)
    gathered, hidden = _Gathered(count, start), not progress or jax.process_index() > 0
    began, timed = time.monotonic(), stop - start
    with tqdm(total=stop - start, unit='image', desc=images.name, disable=hidden, dynamic_ncols=True) as bar:
        parts = images.parts(start, stop, space.batch_size)
        for i, (features, size) in enumerate(_ahead(parts, space)):
            gathered.add(features, size)
            bar.update(size)
            if i == 0 and size < stop - start:  # the first part has waited for the compiler
                began, timed = time.monotonic(), stop - start - size
    speed = timed / max(time.monotonic() - began, 1e-9)
    return _put_together(_from_all(gathered.arrays() | {'speed': np.asarray(speed)}))


def _ahead(parts: Iterator[np.ndarray], space: Space) -> Iterator[tuple[Features, int]]:
    """The features of each part with its size, one part late: it is summed up while the next is computed."""
    flying = None
    for part in parts:
        flying, landed = (space.extract(part), len(part)), flying
        if landed:
            yield landed
    if flying:
        yield flying


class _Gathered:
    """What one process has found so far, from image number `start` on."""

    def __init__(self, total: int, start: int):
        self._total, self._place = total, start
        self._points: list[np.ndarray] = []
        self._waiting: dict[str, list[np.ndarray]] = {'points': [], 'spatial': []}
        self._moments: dict[str, Moments] = {}
        self._sums: _Sums | None = None

    def add(self, features: Features, count: int) -> None:
        points = np.asarray(features.points, np.float32)[:count]
        self._points.append(points[: max(KEPT - self._place, 0)])
        for name, waiting in self._waiting.items():
            if (values := getattr(features, name)) is not None:
                waiting.append(np.asarray(values)[:count])
                if sum(map(len, waiting)) >= ROWS:
                    self._merge(name)
        if features.logits is not None:
            self._score(np.asarray(features.logits, np.float64)[:count])
        self._place += count

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name; nothing where this process had no images."""
        for name, waiting in self._waiting.items():
            if waiting:
                self._merge(name)
        found = {'kept': np.concatenate(self._points)} if self._points else {}
        for name, each in (*self._moments.items(), ('sums', self._sums)):
            found |= {f'{name}.{i}': np.asarray(value) for i, value in enumerate(each or ())}
        return found

    def _merge(self, name: str) -> None:
        self._moments[name] = merge(self._moments.get(name), moments(np.concatenate(self._waiting[name])))
        self._waiting[name] = []

    def _score(self, logits: np.ndarray) -> None:
        log_p = logits - logits.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        if self._sums is None:
            stretches = -(-self._total // SPLIT)
            self._sums = _Sums(np.zeros(stretches), np.zeros((stretches, p.shape[1])), np.zeros(stretches))
        places = np.arange(self._place, self._place + len(p)) // SPLIT
        for sums, values in zip(self._sums, (np.ones(len(p)), p, (p * log_p).sum(1))):
            np.add.at(sums, places, values)


def _put_together(parts: list[dict[str, np.ndarray]]) -> Collected:
    """What the processes found, in their order."""

    def whole(name):
        merged = None
        for part in parts:
            if f'{name}.0' in part:
                merged = merge(merged, Moments(int(part[f'{name}.0']), part[f'{name}.1'], part[f'{name}.2']))
        return merged

    sums = [_Sums(*(part[f'sums.{i}'] for i in range(3))) for part in parts if 'sums.0' in part]
    points = whole('points')
    return Collected(
        count=points.count,
        points=np.concatenate([part['kept'] for part in parts if 'kept' in part]),
        moments=points,
        spatial=whole('spatial'),
        inception_score=_Sums(*map(sum, zip(*sums))).score() if sums else None,
        images_per_second=float(sum(part['speed'] for part in parts)),
    )


def _from_all(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of every process. They travel as bytes: they differ in size, and JAX would round float64."""
    if jax.process_count() == 1:
        return [arrays]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = np.frombuffer(buffer.getbuffer(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [dict(np.load(io.BytesIO(row[:size].tobytes()), allow_pickle=False)) for row, size in zip(rows, sizes)]
