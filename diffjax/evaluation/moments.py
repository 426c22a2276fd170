"""The moments of features that never stand in memory together: running sums that merge without cancellation.

Of two disjoint sets with n, m points, means a, b and scatters A = sum (x - a)(x - a)^T, B, the union has

    mean = a + (b - a) m / (n + m),     scatter = A + B + (b - a)(b - a)^T n m / (n + m)                            (1)

Chan, Golub & LeVeque 1983, eq. 1.5. All in float64, whatever the features are.
"""

from typing import NamedTuple

import numpy as np

from diffjax.evaluation.distances import Statistics


class Moments(NamedTuple):
    count: int
    mean: np.ndarray  # [D]
    scatter: np.ndarray  # [D, D]

    @property
    def statistics(self) -> Statistics:
        """Mean and unbiased covariance. Raises ValueError for fewer than two points."""
        if self.count < 2:
            raise ValueError(f'A covariance needs at least 2 points, got {self.count}.')
        return Statistics(self.mean, self.scatter / (self.count - 1))


def moments(features: np.ndarray) -> Moments:
    """Of points `[N, D]`, N > 0. Raises ValueError for NaN and infinity."""
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise ValueError('The features hold NaN or infinity.')
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(a: Moments | None, b: Moments) -> Moments:
    """(1). None: nothing yet."""
    if a is None:
        return b
    count, step = a.count + b.count, b.mean - a.mean
    scatter = np.outer(step, step * (a.count * b.count / count))
    scatter += a.scatter
    scatter += b.scatter
    return Moments(count, a.mean + step * (b.count / count), scatter)
