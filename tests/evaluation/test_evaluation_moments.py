"""Running moments against NumPy's over the whole, in any order and far from zero."""

import functools

import numpy as np
import pytest

from diffjax.evaluation.moments import merge, moments


@pytest.mark.parametrize('offset', [0, 1e6])
@pytest.mark.parametrize('cuts', [(1, 2, 3), (400,), (7, 150, 151, 499), tuple(range(1, 500))])
def test_parts_merge_to_the_whole(cuts, offset):
    """Also one point at a time, and where the sums of squares that others keep would cancel: 1e12 beside 1."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + offset * np.arange(6)
    parts = [moments(part) for part in np.split(features, cuts)]
    whole = functools.reduce(merge, parts, None)
    mean, covariance = whole.statistics
    assert whole.count == 500
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-10, atol=1e-10)
    exact = np.cov(features - offset * np.arange(6), rowvar=False)
    np.testing.assert_allclose(covariance, exact, rtol=1e-10 if not offset else 1e-8)
    backwards = functools.reduce(merge, parts[::-1], None).statistics
    np.testing.assert_allclose(backwards.covariance, covariance, rtol=1e-9)


def test_float32_is_summed_in_float64():
    features = (1e4 + np.random.default_rng(1).normal(size=(1000, 3))).astype(np.float32)
    np.testing.assert_allclose(
        moments(features).statistics.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10
    )


def test_too_little_and_no_numbers_are_refused():
    with pytest.raises(ValueError, match='at least 2 points, got 1'):
        _ = moments(np.ones((1, 3))).statistics
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='NaN or infinity'):
            moments(np.array([[0.0, bad], [1.0, 2.0]]))
