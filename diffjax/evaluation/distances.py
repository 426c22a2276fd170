"""Distances between two sets of features `[N, D]` and `[M, D]`, each a sample of a distribution. All in float64.

    Frechet   |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)                                    (1)
    kernel    E k(a, a') + E k(b, b') - 2 E k(a, b),   k(x, y) = (x.y / D + 1)^3,   a != a', b != b'   (2)

(1) is the squared 2-Wasserstein distance of the Gaussians that share the means m and covariances S: Dowson and Landau
1982; on Inception features it is FID, Heusel et al. 2017, eq. 6. It is biased upwards by about 1/N, so only distances
at equal N compare. (2) is the unbiased squared maximum mean discrepancy: Gretton et al. 2012, eq. 3; on Inception
features it is KID, Binkowski et al. 2018, section 3.
"""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """The first two moments of a set of features, float64."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]


def statistics(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance (divided by N - 1) of features `[N, D]`. Raises ValueError for N < 2."""
    features = _checked(features)
    mean = features.mean(0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """(1) between two sets of features, `[N, D]` and `[M, D]`. Zero for equal moments; lower is closer.

    Raises ValueError for features that are not finite, of different D, or fewer than two.
    """
    return frechet_distance_of_statistics(statistics(a), statistics(b))


def frechet_distance_of_statistics(a: Statistics, b: Statistics) -> float:
    """(1) from moments. Covariances may be singular: images with constant border pixels always are.

    With any factors S1 = A A^T, S2 = B B^T, the trace of the root is the sum of the singular values of A^T B. Taking
    those, rather than roots of eigenvalues, keeps zero directions at rounding error instead of its square root.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f'The features differ in dimension: {a.mean.shape} and {b.mean.shape}.')
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    means = np.sum((a.mean - b.mean) ** 2)
    return float(max(0.0, means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A `[D, rank]` with A A^T = covariance: Cholesky with pivoting, which ends where rounding error begins.

    A third of the time of eigenvectors in 2048 dimensions, and far less where points are few: their rank is below N.
    """
    from scipy.linalg.lapack import dpstrf

    lower, order, rank, _ = dpstrf((covariance + covariance.T) / 2, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return factor


def kernel_distance(a: np.ndarray, b: np.ndarray, *, rows_at_once: int = 1024) -> float:
    """(2) between two sets of features, `[N, D]` and `[M, D]`. Unbiased, hence it may be negative; lower is closer.

    Raises ValueError for features that are not finite, of different D, or fewer than two.
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f'The features differ in dimension: {a.shape[1]} and {b.shape[1]}.')

    def kernel_sum(x, y):
        blocks = (x[i : i + rows_at_once] @ y.T for i in range(0, len(x), rows_at_once))
        return sum(((block / x.shape[1] + 1) ** 3).sum() for block in blocks)

    def within(x):
        diagonal = ((np.einsum('nd,nd->n', x, x) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel_sum(a, b) / (len(a) * len(b)))


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f'Features must be [N, D] with N >= 2, not {list(features.shape)}.')
    if not np.isfinite(features).all():
        raise ValueError('The features hold NaN or infinity.')
    return features
