"""Inception-I3D: counts against the paper, borders and pools in plain loops, the head against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import I3D, i3d
from diffjax.nets.i3d import ConvUnit, Pool, Unit

pytestmark = pytest.mark.usefixtures('fast_compilation')

CLIPS = np.random.default_rng(0).integers(0, 256, (2, 17, 10, 14, 3), dtype=np.uint8)
NETWORK = I3D(size=32)  # 17 frames become 3, and 32 x 32 become 1 x 1


@pytest.fixture(scope='module')
def network():
    """(params with noise on all of them, the network compiled for 17 frames: (features, output of the last block))."""
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), CLIPS)['params']
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return noise * np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        return np.abs(1 + 0.2 * noise) if path[-1].key in ('var', 'scale') else 0.2 * noise

    @jax.jit
    def apply(params, x):
        out, kept = NETWORK.apply({'params': params}, x, capture_intermediates=True)
        return out, kept['intermediates']['Mixed_5c']['__call__'][0]

    return jax.tree_util.tree_map_with_path(draw, shapes), apply


def test_published_counts():
    """Table 1 of the paper: 25 M parameters in two streams, one of RGB and one of flow, which has two channels."""
    params = jax.eval_shape(I3D().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 224, 224, 3), np.uint8))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    trained = sum(np.prod(leaf.shape) for path, leaf in leaves if path[-1].key not in ('mean', 'var'))
    assert trained == 12_697_264
    assert round((2 * trained - 64 * 7**3) / 1e6) == 25
    assert len(i3d.unit_names()) == len(set(i3d.unit_names())) == 57  # with the logits 58 convolutions, as in figure 3
    assert 3 + 9 * 6 + 1 == 58


def test_outputs(network):
    params, apply = network
    out, _ = apply(params, CLIPS)
    assert (out.pool.shape, out.logits.shape) == ((2, 1024), (2, 400))
    assert all(a.dtype == jnp.float32 and np.std(a) > 0.1 for a in out)
    assert np.std(out.pool[0] - out.pool[1]) > 0.02
    swapped, _ = apply(params, CLIPS[::-1])
    np.testing.assert_allclose(swapped.logits, out.logits[::-1], rtol=1e-3, atol=1e-3)
    backwards, _ = apply(params, CLIPS[:, ::-1])  # time is no set of frames
    assert np.std(backwards.pool - out.pool) > 0.02


def test_the_head_takes_neighbouring_frames_together(network):
    """As published: windows of two frames and the whole picture, logits of each, and the mean of these over time."""
    params, apply = network
    out, h = apply(params, CLIPS)
    assert h.shape == (2, 3, 1, 1, 1024)
    h = np.asarray(h, np.float64)
    windows = [h[:, t : t + 2].mean((1, 2, 3)) for t in (0, 1)]
    np.testing.assert_allclose(out.pool, np.mean(windows, 0), rtol=1e-4, atol=1e-5)
    logits = [window @ np.asarray(params['logits_kernel'], np.float64) + params['logits_bias'] for window in windows]
    np.testing.assert_allclose(out.logits, np.mean(logits, 0), rtol=1e-3, atol=1e-4)
    assert np.abs(out.pool - h.mean((1, 2, 3))).max() > 1e-2  # the mean of three frames is another one


def test_grey_clips_are_colour_with_equal_channels(network):
    params, apply = network
    grey = CLIPS[..., :1]
    colour, _ = apply(params, np.repeat(grey, 3, -1))
    found = jax.jit(lambda params, x: NETWORK.apply({'params': params}, x))(params, grey)
    np.testing.assert_allclose(found.logits, colour.logits, rtol=1e-3, atol=1e-3)


def same(n, kernel, stride):
    """(first position of each window): TensorFlow's 'SAME', as its documentation has it."""
    total = max(kernel - stride if n % stride == 0 else kernel - n % stride, 0)
    return [i * stride - total // 2 for i in range(-(-n // stride))]


def windows(shape, kernel, stride):
    """(place in the result, slices of the input inside the border, slices of the kernel there)."""
    starts = [same(n, k, s) for n, k, s in zip(shape, kernel, stride)]
    for place in np.ndindex(*map(len, starts)):
        first = [starts[axis][i] for axis, i in enumerate(place)]
        inside = tuple(slice(max(f, 0), min(f + k, n)) for f, k, n in zip(first, kernel, shape))
        yield place, inside, tuple(slice(s.start - f, s.stop - f) for s, f in zip(inside, first))


@pytest.mark.parametrize('unit', [Unit('a', 4, 7, 2), Unit('b', 4, 3), Unit('c', 4)])
def test_a_unit_is_its_equation(unit):
    """(1) in plain loops in float64; sizes even and odd, so that borders are unequal in one and equal in the other."""
    x = np.random.default_rng(2).normal(size=(1, 4, 5, 6, 3)).astype(np.float32)
    module = ConvUnit(unit)
    params = module.init(jax.random.key(0), x)['params']
    params = {k: v + 0.3 * np.arange(1, 1 + v.size).reshape(v.shape) % 1 for k, v in params.items()}
    out = module.apply({'params': params}, x)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    assert out.shape == (1, *(len(same(n, unit.kernel, unit.stride)) for n in x.shape[1:4]), 4)
    for place, inside, part in windows(x.shape[1:4], (unit.kernel,) * 3, (unit.stride,) * 3):
        h = np.einsum('thwc,thwco->o', x[0][inside], p['kernel'][part])
        h = (h - p['mean']) / np.sqrt(p['var'] + 1e-3)
        np.testing.assert_allclose(out[0][place], np.maximum(0, h * p['scale'] + p['bias']), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('pool', [step for step in i3d.STEPS if isinstance(step, Pool)] + [Pool((3, 3, 3), (1, 1, 1))])
@pytest.mark.parametrize('size', [(3, 4, 5), (4, 5, 6)])
def test_pools_in_plain_loops(pool, size):
    """The border never wins, not over negative values either."""
    x = np.random.default_rng(3).normal(size=(2, *size, 2)).astype(np.float32) - 5
    out = i3d._maximum(jnp.asarray(x), pool)
    places = list(windows(size, *pool))
    assert out.shape == (2, *np.add(places[-1][0], 1), 2)
    for place, inside, _ in places:
        np.testing.assert_array_equal(out[(slice(None), *place)], x[(slice(None), *inside)].max((1, 2, 3)))


def test_mistakes_are_told():
    for options, message in (
        ({'resize': 'pillow'}, "resize='pillow'.*'tensorflow', 'pytorch'"),
        ({'size': 0}, 'got 0'),
    ):
        with pytest.raises(ValueError, match=message):
            I3D(**options)
    for shape, message in (
        ((2, 16, 32, 3), r'\[B, T, H, W, 3\], got \(2, 16, 32, 3\)'),
        ((2, 16, 32, 32, 4), r'1 for grey, got \(2, 16, 32, 32, 4\)'),
        ((2, 8, 32, 32, 3), 'at least 9 frames, got 8'),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(I3D().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.uint8))
    jax.eval_shape(I3D().init, jax.random.key(0), jax.ShapeDtypeStruct((2, 9, 32, 32, 1), np.uint8))
