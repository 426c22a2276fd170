"""Precision, recall and memorisation against plain loops, extreme cases and points placed by hand."""

import numpy as np
import pytest

from diffjax.evaluation import memorisation, neighbours, precision_recall


@pytest.fixture(params=[2**23, 50], ids=['one block', 'many blocks'])
def blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, 'BLOCK_ENTRIES', request.param)


def loop_covered(points, centres, k):
    covered = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                covered += 1
                break
    return covered / len(points)


@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_against_a_plain_loop(blocks, k):
    rng = np.random.default_rng(k)
    real, samples = rng.normal(size=(30, 4)), 0.7 * rng.normal(size=(22, 4)) + 0.6
    precision, recall = precision_recall(real, samples, k=k)
    assert precision == pytest.approx(loop_covered(samples, real, k))
    assert recall == pytest.approx(loop_covered(real, samples, k))
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_extreme_cases(blocks):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(20, 3)) - 50, rng.normal(size=(20, 3)) + 50
    both = np.concatenate([left, right])
    assert precision_recall(both, both) == (1, 1)
    assert precision_recall(left, right) == (0, 0)
    # All samples are real but cover one mode of two: precise, half the recall. Then the reverse.
    assert precision_recall(both, left) == (1, 0.5)
    assert precision_recall(left, both) == (0.5, 1)


def test_a_point_is_not_its_own_neighbour_and_the_ball_is_closed():
    real = np.array([[0.0], [1.0], [10.0]])  # r_1 = 1, 1, 9
    samples = np.array([[-1.0], [-1.5], [19.0], [19.5]])
    assert precision_recall(real, samples, k=1).precision == 0.5


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match='3 points have no neighbour number 3'):
        precision_recall(np.eye(3), np.eye(5)[:, :3])


def test_copies_are_memorised_and_far_points_are_not(blocks):
    train = np.random.default_rng(1).normal(size=(40, 6))
    assert memorisation(train, train).fraction == 1
    assert memorisation(train + 1e-9, train).fraction == 1
    assert memorisation(train + 100, train).fraction == 0
    np.testing.assert_array_equal(memorisation(train[:3], train).ratios, 0)


def test_the_threshold_is_half_and_strict():
    train = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 40.0]])  # r_1 = 8, 8, 40
    samples = np.array([[0.0, -4.0], [0.0, -3.75], [0.0, -4.25], [0.0, 61.0]])
    fraction, ratios = memorisation(samples, train)
    np.testing.assert_allclose(ratios, [0.5, 3.75 / 8, 4.25 / 8, 21 / 40])
    assert fraction == 0.25


def test_any_train_image_counts_and_not_the_nearest_alone():
    # The nearest train image, at 2, is close to its own neighbour (r_1 = 1); the isolated one at 3 has r_1 = 5.
    train = np.array([[0.0], [1.0], [6.0]])
    fraction, ratios = memorisation(np.array([[3.9]]), train)
    assert ratios[0] == pytest.approx(2.1 / 5) and fraction == 1


def test_a_copy_of_a_train_image_that_occurs_twice_is_noticed():
    train = np.array([[0.1, 0.2], [0.1, 0.2], [3.1, 4.2]])
    fraction, ratios = memorisation(np.array([[0.1, 0.2], [0.1, 2.7]]), train)
    assert fraction == 0.5
    np.testing.assert_allclose(ratios, [0, 0.5])
    with pytest.raises(ValueError, match='All the points are equal'):
        memorisation(train, train[:2])


def test_ratios_against_a_plain_loop(blocks):
    rng = np.random.default_rng(2)
    samples, train = rng.normal(size=(15, 5)), rng.normal(size=(25, 5))
    reach = [min(np.linalg.norm(x - y) for j, y in enumerate(train) if j != i) for i, x in enumerate(train)]
    expected = [min(np.linalg.norm(s - x) / r for x, r in zip(train, reach)) for s in samples]
    np.testing.assert_allclose(memorisation(samples, train).ratios, expected, rtol=1e-10)
