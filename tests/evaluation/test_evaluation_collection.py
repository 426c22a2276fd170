"""Streamed and sharded collection against everything at once, and the Inception Score against its formula."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.evaluation import collection
from diffjax.evaluation.collection import collect
from diffjax.evaluation.image_sets import image_array
from diffjax.evaluation.spaces import Features, network_space, pixels

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
PARAMS = RNG.integers(-3, 4, (48, 20)).astype(np.float32)


def apply(params, x):
    """A small network: 20 points, 48 spatial ones, 20 classes. Whole numbers are exact, in whatever order they add."""
    x = x.astype(jnp.float32).reshape(len(x), -1)
    h = jnp.matmul(x, params, precision='highest')
    return Features(h, x * x, h / 1024)


def space(batch_size=64):
    return network_space('tiny', apply, lambda: PARAMS, lambda shape: (20, 48), batch_size)


@pytest.fixture(scope='module')
def whole():
    return jax.tree.map(np.asarray, jax.jit(apply)(PARAMS, IMAGES))


def check(found, whole):
    """To 1e-10 of everything at once in NumPy, with the same float32 features."""
    assert found.count == 700
    np.testing.assert_array_equal(found.points, whole.points)
    for mine, values in ((found.moments, whole.points), (found.spatial, whole.spatial)):
        values = values.astype(np.float64)
        np.testing.assert_allclose(mine.statistics.mean, values.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(mine.statistics.covariance, np.cov(values, rowvar=False), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize('batch_size', [24, 64, 700])
def test_streamed_is_all_at_once(batch_size, whole):
    check(collect(image_array('x', IMAGES), space(batch_size)), whole)


def test_one_device_finds_what_eight_find(whole, monkeypatch):
    assert jax.local_device_count() == 8 and space(3).batch_size == 8 and space(17).batch_size == 24
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, 'local_devices', lambda: devices)
    assert space(3).batch_size == 3
    check(collect(image_array('x', IMAGES), space(50)), whole)


def test_parts_are_split_over_the_devices():
    out = space(16).extract(IMAGES[:11])
    assert out.points.shape == (16, 20) and len({shard.device for shard in out.points.addressable_shards}) == 8
    assert {shard.data.shape for shard in out.points.addressable_shards} == {(2, 20)}


def test_nothing_is_compiled_or_loaded_twice(compiles):
    loads = []
    one = network_space('tiny', apply, lambda: loads.append(1) or PARAMS, lambda shape: (20, 48), 32)
    assert not loads
    collect(image_array('x', IMAGES[:70]), one)
    with compiles() as programs:
        collect(image_array('x', IMAGES[:50]), one)
    assert programs == [] and loads == [1]


def score(p):
    """exp of the mean Kullback-Leibler divergence to the marginal, in plain loops."""
    marginal = p.mean(0)
    return np.exp(np.mean([sum(a * np.log(a / m) for a, m in zip(row, marginal)) for row in p]))


@pytest.mark.parametrize('split', [5000, 300])
def test_inception_score(whole, split, monkeypatch):
    """Of stretches of images in their order, the last one shorter."""
    monkeypatch.setattr(collection, 'SPLIT', split)
    logits = whole.logits.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.mean([score(p[i : i + split]) for i in range(0, 700, split)])
    found = collect(image_array('x', IMAGES), space(48))
    assert found.inception_score == pytest.approx(expected, rel=1e-10)
    assert expected > 1.2


def test_certain_and_balanced_classes_score_their_number():
    """Also where probabilities are exactly zero."""
    logits = 1e4 * np.tile(np.eye(5), (4, 1))
    certain = pixels(batch_size=6)._replace(extract=lambda x: Features(x[:, 0, 0], logits=logits[x[:, 0, 0, 0]]))
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    assert collect(image_array('x', images), certain).inception_score == pytest.approx(5, rel=1e-12)
    alike = certain._replace(extract=lambda x: Features(x[:, 0, 0], logits=logits[0 * x[:, 0, 0, 0]]))
    assert collect(image_array('x', images), alike).inception_score == pytest.approx(1, rel=1e-12)


def test_points_are_kept_up_to_a_limit(whole, monkeypatch):
    monkeypatch.setattr(collection, 'KEPT', 100)
    found = collect(image_array('x', IMAGES), space(64))
    np.testing.assert_array_equal(found.points, whole.points[:100])
    assert found.count == 700


@pytest.mark.parametrize('num_images', [700, 4])
def test_processes_find_together_what_one_finds(num_images, monkeypatch):
    """Each with its stretch, of 4 images 2, 2 and none. The exchange is faked here; `test_main` has a real one."""
    images, parts = IMAGES[:num_images], []
    monkeypatch.setattr(collection, 'SPLIT', 300)
    monkeypatch.setattr(collection, 'KEPT', 500)
    alone = collect(image_array('x', images), space())
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    monkeypatch.setattr(collection, '_from_all', lambda arrays: parts.append(arrays) or parts)
    for index in range(3):
        monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
        with np.errstate(invalid='ignore'):  # before the last one has come, some stretches are empty
            together = collect(image_array('x', images), space())
    assert [len(part.get('kept', ())) for part in parts] == {700: [234, 234, 32], 4: [2, 2, 0]}[num_images]
    assert together.count == alone.count == num_images
    np.testing.assert_array_equal(together.points, alone.points)
    for mine, whole in ((together.moments, alone.moments), (together.spatial, alone.spatial)):
        np.testing.assert_allclose(mine.statistics.covariance, whole.statistics.covariance, rtol=1e-10, atol=1e-8)
    assert together.inception_score == pytest.approx(alone.inception_score, rel=1e-12)


def test_pixels_are_a_space():
    flat = IMAGES.reshape(700, -1) / 127.5 - 1
    mine = collect(image_array('x', IMAGES), pixels(batch_size=99))
    np.testing.assert_allclose(mine.moments.statistics.covariance, np.cov(flat, rowvar=False), rtol=1e-10, atol=1e-12)
    assert mine.spatial is None and mine.inception_score is None
    assert pixels().dimensions((4, 4, 3)) == (48, 0) and mine.images_per_second > 0


def test_too_few_images_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match='x holds 1 image: moments need at least 2'):
        collect(image_array('x', IMAGES[:1]), pixels())
    with pytest.raises(ValueError, match='batch_size is at least 1, got 0'):
        space(0)


def test_speed_leaves_out_the_first_part_which_compiles():
    def extract(images):
        time.sleep(1.0 if not calls else 0.01)
        calls.append(1)
        return Features(images[:, 0, 0])

    calls = []
    slow = pixels(batch_size=100)._replace(extract=extract)
    assert 600 / 0.9 < collect(image_array('x', IMAGES), slow).images_per_second < 600 / 0.05
    calls.clear()
    assert collect(image_array('x', IMAGES[:100]), slow).images_per_second < 100 / 1.0


def test_progress_shows_rate_and_time_left(capsys):
    collect(image_array('digits', IMAGES), pixels(batch_size=100), progress=True)
    shown = capsys.readouterr().err
    assert 'digits' in shown and '700/700' in shown and 'image/s' in shown
