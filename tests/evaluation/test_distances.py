"""Frechet and kernel distances against closed forms, other algorithms and a plain loop."""

import numpy as np
import pytest
import scipy.linalg

from diffjax.evaluation import (
    Statistics,
    frechet_distance,
    frechet_distance_of_statistics,
    kernel_distance,
    statistics,
)
from diffjax.evaluation.features import pixels


def random_covariance(rng, dimension, rank=None):
    factor = rng.normal(size=(dimension, rank or dimension))
    return factor @ factor.T


def test_diagonal_gaussians_closed_form():
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, 7)), rng.uniform(0, 3, size=(2, 7))
    a, b = (Statistics(m, np.diag(s**2)) for m, s in zip(means, deviations))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance_of_statistics(a, b) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_closed_form():
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    deviations = rng.uniform(0.1, 3, size=(2, 6))
    a, b = (Statistics(np.zeros(6), rotation @ np.diag(s**2) @ rotation.T) for s in deviations)
    assert frechet_distance_of_statistics(a, b) == pytest.approx(
        np.sum((deviations[0] - deviations[1]) ** 2), rel=1e-12
    )


def test_general_covariances_against_scipys_matrix_root():
    rng = np.random.default_rng(2)
    for dimension in (1, 3, 20):
        a, b = (Statistics(rng.normal(size=dimension), random_covariance(rng, dimension)) for _ in range(2))
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance_of_statistics(a, b) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance_of_statistics(b, a) == pytest.approx(expected, rel=1e-9)


def test_a_set_to_itself_is_zero_and_to_its_translation_the_squared_shift():
    features = np.random.default_rng(3).normal(size=(200, 10)) @ np.diag(np.arange(10.0))  # one constant direction
    shift = np.linspace(-1, 2, 10)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features + shift) == pytest.approx(np.sum(shift**2), rel=1e-10)


def test_singular_covariances_in_different_subspaces():
    # Rank-one covariances u u^T and w w^T: the cross term is |u . w|.
    rng = np.random.default_rng(4)
    u, w = rng.normal(size=(2, 12))
    a, b = Statistics(np.zeros(12), np.outer(u, u)), Statistics(np.zeros(12), np.outer(w, w))
    assert frechet_distance_of_statistics(a, b) == pytest.approx(u @ u + w @ w - 2 * abs(u @ w), rel=1e-9)
    point = Statistics(np.zeros(12), np.zeros((12, 12)))
    assert frechet_distance_of_statistics(a, point) == pytest.approx(u @ u)


def test_fewer_points_than_dimensions():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(5, 40))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)


def test_statistics_are_numpys():
    features = np.random.default_rng(6).normal(size=(50, 4))
    mean, covariance = statistics(features.astype(np.float32))
    assert covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), atol=1e-6)


def test_samples_of_gaussians_reach_the_distance_of_the_gaussians():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 200_000, 3))
    distance = frechet_distance(a, 2 * b + [1, 0, -2])
    assert distance == pytest.approx(5 + 3, rel=0.02)


@pytest.mark.parametrize('bad', [np.zeros((1, 3)), np.zeros(3), np.array([[0.0, np.nan], [1.0, 2.0]])])
def test_impossible_features_are_refused(bad):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match='[Ff]eatures'):
            distance(bad, np.zeros((4, bad.shape[-1])))


def test_different_dimensions_are_refused():
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match='dimension'):
            distance(np.eye(3), np.eye(4))


def test_kernel_distance_against_a_plain_loop():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.3

    def mean_kernel(x, y, exclude_diagonal):
        values = [
            (u @ v / 3 + 1) ** 3 for i, u in enumerate(x) for j, v in enumerate(y) if not (exclude_diagonal and i == j)
        ]
        return np.mean(values)

    expected = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    assert kernel_distance(a, b, rows_at_once=2) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased():
    # Both sets from one Gaussian: the mean over repetitions is zero within four standard errors.
    values = [kernel_distance(*np.random.default_rng(seed).normal(size=(2, 20, 2))) for seed in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_pixels_scale_to_minus_one_to_one_and_refuse_floats():
    images = np.array([0, 255, 51, 204], np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(pixels(images), [[-1, 1, -0.6, 0.6]])
    with pytest.raises(ValueError, match='float64'):
        pixels(images / 255)
