"""The feature space of the embedded shapes: real scenes lie near to real ones, and what is wrong is seen by degrees."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffjax.data.shapes.rendering import draw
from diffjax.data.shapes.scenes import scene
from diffjax.evaluation.collection import collect
from diffjax.evaluation.distances import frechet_distance
from diffjax.evaluation.image_sets import image_array
from diffjax.evaluation.spaces import shapes

NUMBER = 200
RNG = np.random.default_rng(0)


@functools.cache
def space():
    return shapes(batch_size=100)


@functools.cache
def scenes(split):
    return [scene(split, i) for i in range(1000, 1000 + NUMBER)]


@functools.cache
def pictures(split='test'):
    return np.stack([draw(what).image for what in scenes(split)])


def features(images):
    return collect(image_array('images', images), space()).points


@functools.cache
def real(split='test'):
    return features(pictures(split))


def distance(images):
    """To the real scenes of the test split, of which they are changed copies: 0 for no change."""
    return frechet_distance(features(images), real())


@functools.cache
def between_splits():
    """What a perfect model would have: other scenes, the bias of so few of them, combinations that one split lacks."""
    return frechet_distance(real('train'), real())


def blurred(radius):
    return np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius))) for p in pictures()])


def noisy(scale):
    noise = np.random.default_rng(1).standard_normal(pictures().shape)
    return np.clip(pictures() + scale * noise, 0, 255).astype(np.uint8)


def changed(change, share):
    """Scenes of which a share is drawn otherwise."""
    wrong = [draw(change(what)).image for what in scenes('test')[: int(share * NUMBER)]]
    return np.concatenate([np.reshape(wrong, (-1, 64, 64, 3)).astype(np.uint8), pictures()[len(wrong) :]])


def other_colors(what):
    return what._replace(objects=tuple(t._replace(color=(t.color + 3) % 2) for t in what.objects))


def without_objects(what):
    return what._replace(objects=())


def without_the_front(what):
    return what._replace(objects=what.objects[:-1])


def pushed_up(what):
    """Everything into the upper half, where it still fits."""
    return what._replace(objects=tuple(t._replace(y=max(t.radius, t.y / 2)) for t in what.objects))


def smaller(what):
    return what._replace(objects=tuple(t._replace(size=0) for t in what.objects))


def test_features_are_means_of_the_last_map():
    assert real().shape == (NUMBER, space().dimensions((64, 64, 3))[0]) and space().dimensions((64, 64, 3))[1] == 0
    np.testing.assert_allclose(features(pictures()[:7]), real()[:7], rtol=1e-4, atol=1e-5)  # padded otherwise
    grey = RNG.integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    np.testing.assert_allclose(features(grey), features(np.repeat(grey, 3, -1)), rtol=1e-5, atol=1e-6)


def test_real_scenes_lie_near_to_real_ones():
    """Against how far they lie apart: the trace of their covariance, the distance of all of them to their mean."""
    assert between_splits() < 0.1 * real().var(0).sum()
    assert distance(pictures()) < 1e-3 * between_splits()


@pytest.mark.parametrize(('make', 'levels'), [(blurred, (0.7, 1.5, 3.0)), (noisy, (8, 20, 50))])
def test_worse_pictures_are_farther_away(make, levels):
    found = [distance(pictures()), *(distance(make(level)) for level in levels)]
    assert (np.diff(found) > 0).all() and found[-1] > 10 * found[1], found


@pytest.mark.parametrize('change', [other_colors, without_objects, without_the_front, pushed_up, smaller])
def test_scenes_with_other_contents_are_farther_away(change):
    found = [distance(changed(change, share)) for share in (0.0, 0.25, 0.5, 1.0)]
    assert (np.diff(found) > 0).all() and found[-1] > 0.05 * real().var(0).sum(), (found, between_splits())


def test_swapped_channels_and_scenes_upside_down_are_seen():
    half = pictures().copy()
    half[::2] = half[::2, ::-1]
    whole = distance(np.ascontiguousarray(pictures()[:, ::-1]))
    assert 0 < distance(half) < whole and whole > between_splits()
    assert distance(np.ascontiguousarray(pictures()[..., ::-1])) > between_splits()
