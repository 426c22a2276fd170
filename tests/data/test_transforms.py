"""Bytes to [-1, 1] and back, bins of bytes, and flips."""

import jax
import numpy as np
from scipy.stats import kstest

from diffjax.data import BYTE_WIDTH, dequantize, prepare, to_uint8

EVERY_BYTE = {'image': np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)}


def test_bytes_map_linearly_and_return_exactly():
    x0 = jax.jit(prepare, static_argnames='flip')(EVERY_BYTE, jax.random.key(0), flip=False)['x0']
    assert x0.dtype == np.float32
    np.testing.assert_allclose(np.ravel(x0), np.linspace(-1, 1, 256), atol=1e-6)
    np.testing.assert_array_equal(jax.jit(to_uint8)(x0), EVERY_BYTE['image'])


def test_to_uint8_rounds_and_clips():
    x = np.array([-7, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1 - 0.51 / 127.5, 1.001, 9], np.float32)
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 0, 1, 254, 255, 255])


def test_each_example_is_flipped_or_not_about_half_of_them_by_the_key():
    images = np.random.default_rng(0).integers(0, 256, (400, 4, 6, 3), dtype=np.uint8)
    run = jax.jit(lambda key: prepare({'image': images}, key, flip=True)['x0'])
    back = np.asarray(to_uint8(run(jax.random.key(0))))
    same = (back == images).all((1, 2, 3))
    mirrored = (back == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    np.testing.assert_array_equal(back, to_uint8(run(jax.random.key(0))))
    assert (back != np.asarray(to_uint8(run(jax.random.key(1))))).any()


def test_labels_pass_and_are_zero_where_there_are_none():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    labelled = prepare({'image': images, 'label': np.array([4, 0, 9], np.int32)}, jax.random.key(0), flip=True)
    np.testing.assert_array_equal(labelled['label'], [4, 0, 9])
    unlabelled = prepare({'image': images}, jax.random.key(0), flip=False)
    assert unlabelled['label'].dtype == np.int32
    np.testing.assert_array_equal(unlabelled['label'], [0, 0, 0])


def test_a_byte_is_spread_evenly_over_its_bin():
    """Uniform, centred on what is trained on, a bin as wide as the distance of two bytes; each image by its own key."""
    images = np.repeat(EVERY_BYTE['image'], 64, 0)
    keys = jax.random.split(jax.random.key(0), 64)
    x = np.asarray(jax.jit(dequantize)(images, keys), np.float64)
    assert x.shape == images.shape
    place = (x - (images / 127.5 - 1)) / (2 / 255)  # in units of a bin
    assert -0.501 < place.min() < -0.49 and 0.49 < place.max() < 0.501
    assert kstest(place.ravel()[::7] + 0.5, 'uniform').pvalue > 1e-3
    assert len(np.unique(x[:, 0, 0, 0])) == 64
    np.testing.assert_allclose(dequantize(images[5:6], keys[5:6])[0], x[5], atol=1e-6)
    np.testing.assert_allclose(BYTE_WIDTH, np.diff(np.linspace(-1, 1, 256)), rtol=1e-12)
