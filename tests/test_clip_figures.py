"""Figures of clips: by hand where they are counts, and the recogniser in the package on clips that were drawn here."""

import functools

import numpy as np
import pytest

from diffjax.clip_figures import PHYSICS, distance_figures, flicker_figures, identity_figures, path_figures
from diffjax.data.digits.digits_dataset_builder import split_digits
from diffjax.data.moving_digits.flights import DIGIT, SIDE, SPEEDS, draw, flights, path
from diffjax.evaluation.clip_spaces import Seen, recognizer
from diffjax.evaluation.distances import frechet_distance
from diffjax.weights.recognizer import MOVING_DIGITS, SHAPES

NUMBER = 120


@functools.cache
def digits():
    return split_digits()['test']


@functools.cache
def flown(single):
    """Flights of the test split, with one digit or with any number."""
    images = digits()[0]
    found = [flights('test', i, len(images)) for i in range(3 * NUMBER)]
    return [each for each in found if len(each) == 1 or not single][:NUMBER]


@functools.cache
def clips(single=False):
    images = digits()[0]
    return np.stack([draw(images[[f.digit for f in each]], [path(f)[0] for f in each]) for each in flown(single)])


@functools.cache
def classes():
    return np.array([digits()[1][each[0].digit] for each in flown(True)])


@functools.cache
def seen(single=False):
    return recognizer().see(clips(single))


# By hand --------------------------------------------------------------------------------------------------------------


def test_identity_is_counted_among_single_bodies():
    made = Seen(
        np.zeros((5, 2)),
        np.array([1, 1, 2, 1, 0]),
        np.array([[3, 3], [4, 5], [6, 7], [8, 8], [1, 1]]),
    )
    real = Seen(np.zeros((4, 2)), np.array([1, 2, 1, 1]), np.array([[0, 0], [1, 2], [3, 4], [5, 5]]))
    labels = np.array([3, 4, 6, 9, 1])
    assert identity_figures(made, real, labels) == {
        'single_clips': 0.6,
        'class_constancy': pytest.approx(2 / 3),
        'single_clips_real': 0.75,
        'class_constancy_real': pytest.approx(2 / 3),
        'single_class_accuracy': 0.5,  # 3, 3 and 4 of 6 frames
    }
    none = made._replace(number=np.zeros(5, int))
    assert identity_figures(none, real, None) == {
        'single_clips': 0.0,
        'single_clips_real': 0.75,
        'class_constancy_real': pytest.approx(2 / 3),
    }


def test_distances_are_those_of_points():
    rng = np.random.default_rng(0)
    made, known, train = (Seen(rng.standard_normal((30, 3)) + shift) for shift in (2.0, 0.0, 0.1))
    found = distance_figures(made, known, train)
    assert found['frechet_video_distance'] == frechet_distance(made.points, known.points) > 10
    assert found['frechet_video_distance_train'] == frechet_distance(train.points, known.points) < 1
    assert found['video_precision'] < 0.5


def test_flicker_is_held_against_real_clips():
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 256, (3, 1, 12, 12, 1), np.uint8), 4, 1)
    noisy = rng.integers(0, 256, (3, 4, 12, 12, 1), np.uint8)
    found = flicker_figures(noisy, still)
    assert found['flicker_real'] == 0 < found['flicker'] and found['flicker_ratio'] == np.inf
    assert flicker_figures(noisy, noisy)['flicker_ratio'] == 1


# Drawn here -----------------------------------------------------------------------------------------------------------


def test_the_walls_are_those_of_the_dataset():
    assert PHYSICS['moving_digits'].span == pytest.approx(1 - DIGIT / SIDE)
    assert PHYSICS['moving_digits'].max_speed == SPEEDS[1]


def test_real_paths_are_paths_and_shaken_ones_are_not():
    real = clips(single=True)[:20]
    shaken = real.copy()
    shaken[:, 1::2] = np.roll(shaken[:, 1::2], 2, axis=3)  # every second frame, two pixels to the right
    found = path_figures(shaken, real, PHYSICS['moving_digits'])
    assert found['path_residual_real'] < 0.2 and 0.7 < found['path_residual'] < 1.2  # +-1 pixel is off by 1


def test_the_one_in_the_package_recognises_digits_that_fly():
    """Digits of the test split, on which it has not been trained."""
    assert (seen(single=True).number == 1).mean() > 0.95
    numbers = np.array([len(each) for each in flown(False)])
    assert (seen().number == numbers).mean() > 0.95
    kinds = seen(single=True).kinds
    assert kinds.shape == (NUMBER, 16)
    assert (kinds == classes()[:, None]).mean() > 0.95
    assert (kinds == kinds[:, :1]).all(1).mean() > 0.85


def test_a_digit_that_turns_into_another_is_seen():
    images = digits()[0]
    halves = np.concatenate([clips(True)[:40, :8], clips(True)[:40, 8:]], 1)
    for i, each in enumerate(flown(True)[:40]):
        other = next(k for k in range(len(images)) if digits()[1][k] == (classes()[i] + 5) % 10)
        halves[i, 8:] = draw(images[[other]], [path(each[0])[0]])[8:]
    kinds = recognizer().see(halves).kinds
    assert (kinds == kinds[:, :1]).all(1).mean() < 0.1


def test_clips_that_move_wrongly_are_farther_away():
    """Than other real clips; all of them copies of real ones, with the same digits at the same places."""
    half, rng = NUMBER // 2, np.random.default_rng(0)
    real = seen().points
    near = frechet_distance(real[:half], real[half:])
    jumping = [[np.roll(frame, rng.integers(-3, 4, 2), (0, 1)) for frame in clip] for clip in clips()]
    wrong = {
        'shuffled': clips()[:, rng.permutation(16)],
        'frozen': np.repeat(clips()[:, :1], 16, 1),
        'noisy': np.clip(clips() + 40 * rng.standard_normal(clips().shape), 0, 255).astype(np.uint8),
        'jumping': np.array(jumping),
    }
    found = {
        name: frechet_distance(real, recognizer().see(np.ascontiguousarray(a)).points) for name, a in wrong.items()
    }
    assert min(found.values()) > 3 * near, (found, near)


def test_what_is_shown_counts_too():
    """Clips of 0 to 4 alone, as far as the others of the split: a third of how far clips lie apart."""
    low = np.array([max(digits()[1][f.digit] for f in each) < 5 for each in flown(False)])
    real = seen().points
    assert frechet_distance(real[low], real) > 0.3 * real.var(0).sum()


def test_parts_are_padded_and_other_lengths_taken():
    space = recognizer(batch_size=50)
    found = space.see(clips()[:7])
    np.testing.assert_allclose(found.points, seen().points[:7], rtol=1e-3, atol=1e-4)
    assert space.see(clips()[:2, :8]).kinds.shape == (2, 8)


def test_recognisers_of_images_are_refused():
    with pytest.raises(ValueError, match='recognises images; configs/recognizer_clips.py trains'):
        recognizer(weights=SHAPES)
    assert MOVING_DIGITS.stat().st_size < 1_000_000
