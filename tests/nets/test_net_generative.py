"""Generators and encoders of small pictures, against the same in NumPy."""

import jax
import numpy as np
import pytest

from diffjax.nets import count_parameters
from diffjax.nets.generative import PictureEncoder, PictureGenerator

pytestmark = pytest.mark.usefixtures('fast_compilation')

FIELDS = {'hidden_size': 6, 'depth': 2}
RNG = np.random.default_rng(0)
LABELS = np.array([2, 0, 2])


def by_hand(trunk, h, labels):
    def dense(name, x):
        return x @ trunk[name]['kernel'] + trunk[name]['bias']

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    if labels is not None:
        h = np.concatenate([h, trunk['label']['embedding'][labels]], 1)
    h = dense('in', h)
    for i in range(2):
        h = h + dense(f'block_out_{i}', leaky(dense(f'block_in_{i}', leaky(h))))
    return dense('out', leaky(h))


@pytest.mark.parametrize('num_classes', [0, 3])
def test_both_are_what_they_say(num_classes):
    labels = LABELS if num_classes else None
    z, x = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(3, 2, 5, 1)).astype(np.float32)
    generator = PictureGenerator(**FIELDS, num_classes=num_classes, latent_size=4)
    encoder = PictureEncoder(**FIELDS, num_classes=num_classes, out_features=7)
    for network, inputs, flat, shape in (
        (generator, (z, labels, (2, 5, 1)), z, (3, 2, 5, 1)),
        (encoder, (x, labels), x.reshape(3, -1), (3, 7)),
    ):
        params = network.init(jax.random.key(0), *inputs)['params']
        ins, outs, wide = flat.shape[1] + 32 * bool(num_classes), np.prod(shape[1:]), 6 * 6 + 6
        assert count_parameters(params) == 32 * num_classes + (ins + 1) * 6 + 4 * wide + 7 * outs
        first = np.asarray(network.apply({'params': params}, *inputs))
        still = jax.tree.map(np.asarray, params['trunk'])
        assert all((still[f'block_out_{i}']['kernel'] == 0).all() for i in range(2))
        params = jax.tree.map(lambda a: a + 0.3 * RNG.standard_normal(a.shape).astype(np.float32), params)
        found = np.asarray(network.apply({'params': params}, *inputs))
        assert found.shape == shape and found.dtype == np.float32 and np.abs(found - first).max() > 0.1
        expected = by_hand(jax.tree.map(np.asarray, params['trunk']), flat, labels)
        np.testing.assert_allclose(found.reshape(3, -1), expected, atol=1e-4)


@pytest.mark.parametrize(
    ('network', 'inputs', 'message'),
    [
        (PictureGenerator(latent_size=4), (np.zeros((1, 4, 1)), None, (2, 2, 1)), r'shape \[B, L\], got \(1, 4, 1\)'),
        (PictureEncoder(out_features=1), (np.zeros((1, 4)), None), r'shape \[B, H, W, C\], got \(1, 4\)'),
    ],
)
def test_wrong_ranks_are_refused(network, inputs, message):
    with pytest.raises(ValueError, match=message):
        network.init(jax.random.key(0), *inputs)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'latent_size': 0}, 'latent_size is at least 1, got 0'),
        ({'hidden_size': 0}, 'hidden_size is at least 1, got 0'),
        ({'depth': -1}, 'depth is at least 0, got -1'),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PictureGenerator(**change)
