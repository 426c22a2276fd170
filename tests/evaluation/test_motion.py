"""Motion measured on clips whose motion is known, and on clips built to fail."""

import numpy as np
import pytest

from diffjax.evaluation.motion import bounce_residual, centres, constancy, flicker, frame_classes

RNG = np.random.default_rng(0)


def disc(place, side=32, radius=5):
    """A soft grey disc, drawn between pixels too: [side, side, 1]."""
    y, x = np.mgrid[:side, :side] + 0.5
    distance = np.hypot(y - place[0], x - place[1])
    return (255 * np.clip(radius + 0.5 - distance, 0, 1)).round().astype(np.uint8)[..., None]


def reflected(start, velocity, low, high, num_frames=16):
    """A flight stepped frame by frame, as a ball is."""
    place, velocity, path = np.array(start, float), np.array(velocity, float), []
    for _ in range(num_frames):
        path.append(place.copy())
        place = place + velocity
        for axis in range(2):
            if not low <= place[axis] <= high:
                place[axis] = 2 * (low if place[axis] < low else high) - place[axis]
                velocity[axis] *= -1
    return np.array(path)


@pytest.fixture(scope='module')
def paths():
    speeds, angles = RNG.uniform(0.7, 2.2, 12), RNG.uniform(0, 2 * np.pi, 12)
    return np.array(
        [reflected(RNG.uniform(6, 26, 2), (s * np.sin(a), s * np.cos(a)), 5.0, 27.0) for s, a in zip(speeds, angles)]
    )


@pytest.fixture(scope='module')
def clips(paths):
    return np.array([[disc(place) for place in path] for path in paths])


def test_the_centre_of_light_is_where_the_disc_is(paths, clips):
    np.testing.assert_allclose(centres(clips), paths, atol=0.06)
    np.testing.assert_array_equal(centres(np.zeros((1, 2, 8, 6, 1), np.uint8)), [[[4, 3], [4, 3]]])


def test_flights_between_walls_fit_and_others_do_not(paths):
    assert bounce_residual(paths, 22.0, 2.5).max() < 0.02
    moved = paths + np.array([1.5, -0.7])  # where the walls are is fitted
    assert bounce_residual(moved, 22.0, 2.5).max() < 0.02
    noisy = paths + RNG.normal(0, 0.5, paths.shape)
    assert 0.4 < bounce_residual(noisy, 22.0, 2.5).mean() < 0.75  # 0.5 on each of two axes, less what the fit takes
    teleported = paths.copy()
    teleported[:, 8:] = teleported[:, :7:-1] + 4
    assert np.median(bounce_residual(teleported, 22.0, 2.5)) > 0.5
    shuffled = paths[:, RNG.permutation(16)]
    assert bounce_residual(shuffled, 22.0, 2.5).min() > 0.5


def test_motion_by_whole_pixels_is_no_flicker():
    picture = RNG.integers(0, 256, (48, 48, 3)).astype(np.uint8)
    clip = np.stack([picture[4 + k : 36 + k, 10 - k : 42 - k] for k in range(4)])[None]
    inner = flicker(clip)
    still = flicker(np.repeat(clip[:, :1], 4, axis=1))
    assert still == 0 and inner < 0.35 * flicker(clip, reach=0)  # what comes in at the edges was not there before


def test_flicker_is_what_is_no_motion(clips):
    real = flicker(clips).mean()
    bright = np.clip(clips * RNG.uniform(0.6, 1.0, (*clips.shape[:2], 1, 1, 1)), 0, 255).astype(np.uint8)
    noisy = np.clip(clips + RNG.normal(0, 8, clips.shape), 0, 255).astype(np.uint8)
    unrelated = clips.reshape(-1, *clips.shape[2:])[RNG.permutation(clips.shape[0] * 16)].reshape(clips.shape)
    assert flicker(bright).mean() > 1.6 * real
    assert flicker(noisy).mean() > 1.3 * real
    assert flicker(unrelated).mean() > 3 * real
    np.testing.assert_allclose(flicker(np.full((1, 2, 8, 8, 1), 9, np.uint8) * [[[[[1]]], [[[2]]]]]), [9])


def test_identity_over_time():
    classes = np.array([[3, 3, 3], [1, 1, 1], [2, 2, 4], [0, 5, 5]])
    assert constancy(classes) == 0.5
    clips = np.broadcast_to(classes[:, :, None, None, None], (4, 3, 2, 2, 1)).astype(np.uint8)
    np.testing.assert_array_equal(frame_classes(clips, lambda frames: frames.max((1, 2, 3))), classes)


def test_refuses():
    with pytest.raises(ValueError, match='multiples of 8, got shape'):
        flicker(np.zeros((1, 4, 12, 16, 1), np.uint8))
    with pytest.raises(ValueError, match='at least 2 frames'):
        flicker(np.zeros((1, 1, 16, 16, 1), np.uint8))
