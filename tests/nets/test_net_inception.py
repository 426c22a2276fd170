"""Inception-v3 of 2015: counts against torchvision's table, pools and resizes against other algorithms and Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.nets import Inception, inception, resizing
from diffjax.nets.inception import AVERAGE, MAXIMUM, SHRINK, ConvUnit, Unit
from diffjax.training.flops import count_flops

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def network():
    """(params with noise on all of them, the network compiled, for images of 9 x 14)."""
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), IMAGES)['params']
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        return np.abs(1 + 0.2 * noise) if path[-1].key in ('var', 'scale') else 0.2 * noise

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return params, jax.jit(lambda params, x: Inception().apply({'params': params}, x))


def test_published_counts():
    """torchvision's table: 27,161,264 parameters and 5.71 G multiply-adds, there with an auxiliary head of 3,326,696
    and 1000 classes. What is trained: all but the stored moments."""
    network, x = Inception(), jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    trained = sum(np.prod(leaf.shape) for path, leaf in leaves if path[-1].key not in ('mean', 'var'))
    assert trained == 27_161_264 - 3_326_696 + 8 * (2048 + 1) == 23_850_960
    flops = count_flops(jax.make_jaxpr(network.apply)(params, x))
    resize = 2 * 2 * 299**3 * 3  # two products of matrices, the identity at this size
    assert (flops - resize) / 2 == pytest.approx(5.71e9, rel=2e-3)
    assert len(inception.unit_names()) == len(set(inception.unit_names())) == 94


def test_outputs(network):
    params, apply = network
    out = apply(params, IMAGES)
    assert (out.pool.shape, out.spatial.shape, out.logits.shape) == ((2, 2048), (2, 17 * 17 * 7), (2, 1008))
    assert all(a.dtype == jnp.float32 and np.std(a) > 0.1 for a in out)
    np.testing.assert_allclose(out.logits - out.logits_unbiased, np.tile(params['fc_bias'], (2, 1)), atol=1e-4)
    assert np.std(out.pool[0] - out.pool[1]) > 0.02
    assert (np.asarray(out.spatial) >= 0).all() and 0.2 < np.mean(out.spatial == 0) < 0.8  # after ReLU
    swapped = apply(params, IMAGES[::-1])
    np.testing.assert_allclose(swapped.pool, out.pool[::-1], rtol=1e-3, atol=1e-3)


def test_spatial_features_are_seven_channels_of_mixed_6d(network):
    """The bias of one of the seven moves it alone, the bias of an eighth none; in the order height, width, channel."""
    params, apply = network
    out = apply(params, IMAGES).spatial.reshape(2, 17, 17, 7)
    block = params['Mixed_6d']
    for channel, changed in ((6, [6]), (7, [])):
        bias = np.array(block['branch1x1']['bias'])
        bias[channel] += 100
        moved = params | {'Mixed_6d': block | {'branch1x1': block['branch1x1'] | {'bias': bias}}}
        step = np.asarray(apply(moved, IMAGES).spatial.reshape(2, 17, 17, 7) - out)
        assert [i for i in range(7) if np.abs(step[..., i]).max() > 1e-3] == changed
        assert (step[..., changed] >= 90).all()


def test_a_unit_is_its_equation():
    """(1) with the moments in float64, and the two paddings."""
    x = np.random.default_rng(2).normal(size=(1, 7, 7, 3)).astype(np.float32)
    for unit, width, border in ((Unit('a', 4, 3), 7, 1), (Unit('b', 4, 3, 2, 'VALID'), 3, 0)):
        module = ConvUnit(unit)
        params = module.init(jax.random.key(0), x)['params']
        params = {k: v + 0.3 * np.arange(1, 1 + v.size).reshape(v.shape) % 1 for k, v in params.items()}
        out = module.apply({'params': params}, x)
        assert out.shape == (1, width, width, 4)
        padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
        p = {k: np.asarray(v, np.float64) for k, v in params.items()}
        for i, j in ((0, 0), (1, 2), (width - 1, width - 1)):
            window = padded[0, i * unit.stride : i * unit.stride + 3, j * unit.stride : j * unit.stride + 3]
            h = (np.einsum('ijc,ijco->o', window, p['kernel']) - p['mean']) / np.sqrt(p['var'] + 1e-3)
            np.testing.assert_allclose(out[0, i, j], np.maximum(0, h * p['scale'] + p['bias']), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [(7, 9), (8, 6)])
def test_pools_in_plain_loops(size):
    """Averages count the pixels inside alone; the maximum's border never wins, not over negative values either."""
    x = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32) - 5
    for kind, stride, reduce in ((AVERAGE, 1, np.mean), (MAXIMUM, 1, np.max), (SHRINK, 2, np.max)):
        out = inception._pool(jnp.asarray(x), kind)
        starts = [range(-1, n - 1) if stride == 1 else range(0, n - 2, 2) for n in size]
        assert out.shape == (2, *map(len, starts), 3)
        for i, top in enumerate(starts[0]):
            for j, left in enumerate(starts[1]):
                window = x[:, max(top, 0) : top + 3, max(left, 0) : left + 3]
                np.testing.assert_allclose(out[:, i, j], reduce(window, (1, 2)), rtol=1e-6)


def bilinear(x, size, position):
    """One image [H, W, C], pixel by pixel."""
    out = np.zeros((size, size, x.shape[-1]))
    places = [[min(max(position(i, n / size), 0), n - 1) for i in range(size)] for n in x.shape[:2]]
    for i, v in enumerate(places[0]):
        for j, u in enumerate(places[1]):
            (top, left), (a, b) = (int(v), int(u)), (v - int(v), u - int(u))
            below, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            upper = (1 - b) * x[top, left] + b * x[top, right]
            out[i, j] = (1 - a) * upper + a * ((1 - b) * x[below, left] + b * x[below, right])
    return out


@pytest.mark.parametrize('size', [5, 20])
@pytest.mark.parametrize(
    ('method', 'position'),
    [(resizing.tensorflow, lambda i, s: i * s), (resizing.pytorch, lambda i, s: (i + 0.5) * s - 0.5)],
)
def test_bilinear_resizes_in_plain_loops(method, position, size):
    mine = resizing.resize(jnp.asarray(IMAGES, jnp.float32), size, method)
    for image, expected in zip(mine, IMAGES):
        np.testing.assert_allclose(image, bilinear(expected.astype(float), size, position), atol=2e-4)


@pytest.mark.parametrize(('old', 'new'), [((9, 14), 299), ((9, 14), 5), ((64, 48), 31), ((400, 333), 299), ((7, 7), 7)])
def test_bicubic_is_pillows(old, new):
    """Of float images, enlarged and shrunk; where it overshoots, values are cut to 0..255."""
    x = np.random.default_rng(4).integers(0, 2, (*old, 2)).astype(np.float32) * 255
    channels = [Image.fromarray(x[..., c]).resize((new, new), Image.Resampling.BICUBIC) for c in range(2)]
    expected = np.stack([np.asarray(channel) for channel in channels], -1)
    assert old == (7, 7) or expected.max() > 256 or expected.min() < -1
    mine = resizing.resize(jnp.asarray(x)[None], new, resizing.pillow)[0]
    np.testing.assert_allclose(mine, np.clip(expected, 0, 255), atol=2e-3)


@pytest.mark.parametrize('name', resizing.__all__)
def test_a_resize_to_the_same_size_changes_nothing_and_weights_sum_to_one(name):
    method = getattr(resizing, name)
    np.testing.assert_allclose(method(299, 299), np.eye(299), atol=1e-6)
    for old, new in ((8, 299), (32, 299), (256, 299), (512, 299), (1, 3)):
        np.testing.assert_allclose(method(old, new).sum(1), 1, rtol=1e-5)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="resize='bicubic' is not known; .*'tensorflow', 'pytorch', 'pillow'"):
        Inception(resize='bicubic')
    for shape in ((9, 14, 3), (2, 9, 14, 1)):
        with pytest.raises(ValueError, match=r'Inception takes x of shape \[B, H, W, 3\], got \('):
            jax.eval_shape(Inception().init, jax.random.key(0), np.zeros(shape, np.uint8))
