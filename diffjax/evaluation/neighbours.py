"""What nearest neighbours say about samples: precision and recall, and memorisation. Euclidean, float64.

With r_k(x) the distance from x to its k-th nearest other point of its own set,

    precision   fraction of samples s with |s - x| <= r_k(x) for some real x      are samples realistic?   (1)
    recall      fraction of reals x with |x - s| <= r_k(s) for some sample s      are reals covered?       (2)
    memorised   fraction of samples s with |s - x| < r_1(x) / 2 for some train x  are samples copies?      (3)

(1) and (2): Kynkaanniemi et al., Improved Precision and Recall Metric, 2019, eq. 1 and 2, k = 3. (3) is a ratio test
in the manner of Yoon et al., Diffusion Probabilistic Models Generalize when They Fail to Memorize, 2023: a sample
counts as a copy of a train image if it is much closer to it than any other train image is.

Distances are computed in blocks of bounded size, so that memory does not grow with N times M.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK_ENTRIES = 2**23  # 64 MiB of float64 distances at a time
MEMORISED_RATIO = 0.5


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class Memorisation(NamedTuple):
    fraction: float  # of samples with a ratio below 1/2
    ratios: np.ndarray  # [N] smallest |s - x| / r_1(x) over the train images x


def precision_recall(real: np.ndarray, samples: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """(1) and (2) of features `real` `[N, D]` and `samples` `[M, D]`; compare figures at equal N and M only.

    Raises ValueError unless both hold more than k points.
    """
    return PrecisionRecall(
        precision=_covered(samples, real, neighbour_distances(real, k=k)),
        recall=_covered(real, samples, neighbour_distances(samples, k=k)),
    )


def memorisation(samples: np.ndarray, train: np.ndarray) -> Memorisation:
    """(3) of features `samples` `[N, D]` and `train` `[M, D]`, and every sample's ratio.

    Train images that occur twice count once here: else their r_1 would be zero and a copy of them never be noticed.
    Raises ValueError unless `train` holds two different images.
    """
    radii = neighbour_distances(train, k=1, distinct=True)
    ratios = [np.sqrt((block / radii**2).min(1)) for _, block in _squared_distances(samples, train)]
    ratios = np.concatenate(ratios)
    return Memorisation(fraction=float(np.mean(ratios < MEMORISED_RATIO)), ratios=ratios)


def neighbour_distances(points: np.ndarray, *, k: int, distinct: bool = False) -> np.ndarray:
    """r_k: the distance from each of `points` `[N, D]` to its k-th nearest other point, `[N]`.

    With `distinct`, points equal to it are passed over. Raises ValueError if there is no k-th neighbour.
    """
    if len(points) <= k:
        raise ValueError(f'{len(points)} points have no neighbour number {k}.')
    radii = np.empty(len(points))
    for rows, block in _squared_distances(points, points):
        block[np.arange(len(block)), np.arange(rows.start, rows.start + len(block))] = np.inf  # itself
        if distinct:
            block[block == 0] = np.inf
        radii[rows] = np.sqrt(np.partition(block, k - 1, axis=1)[:, k - 1])
    if not np.isfinite(radii).all():
        raise ValueError('All the points are equal.')
    return radii


def _covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The fraction of points that lie inside or on at least one of the balls."""
    return float(np.concatenate([(d <= radii**2).any(1) for _, d in _squared_distances(points, centres)]).mean())


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of the squared distances `[N, M]`, each with its slice. What is rounding error is exactly zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a_norms, b_norms = np.einsum('nd,nd->n', a, a), np.einsum('nd,nd->n', b, b)
    height = max(1, BLOCK_ENTRIES // len(b))
    for start in range(0, len(a), height):
        rows = slice(start, start + height)
        norms = a_norms[rows, None] + b_norms
        block = norms - 2 * a[rows] @ b.T
        block[block < 1e-12 * norms] = 0
        yield rows, block
