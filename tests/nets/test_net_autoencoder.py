"""Autoencoders: sizes, codes against plain loops, clips against images, and what is refused. Outputs: tests/parity."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets.autoencoder import Autoencoder, Gaussian, inflate
from diffjax.nets.patches import from_patches, to_patches
from diffjax.nets.quantization import fsq, fsq_tokens, fsq_values, nearest_codes, straight_through

TINY = dict(base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, num_groups=4, out_channels=3)  # noqa: C408
CLIP = TINY | {'frames': 3, 'temporal_downsampling': (0, 1), 'latent_channels': 2}
RNG = np.random.default_rng(0)


def randomised(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params)


@functools.cache
def network(**fields):
    """(encode, decode, params), compiled, with no parameter at its initial value."""
    module = Autoencoder(**(TINY | fields))
    x = jnp.zeros((1, *((5,) if module.frames > 1 else ()), 16, 16, 3))
    params = randomised(jax.jit(module.init)(jax.random.key(0), x)['params'])
    methods = (jax.jit(functools.partial(module.apply, method=name)) for name in ('encode', 'decode'))
    encode, decode = (lambda p, x, method=method: method({'params': p}, x) for method in methods)
    return encode, decode, params


def images(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(('multipliers', 'factor'), [((1, 2), 2), ((1, 2, 4), 4), ((1, 1, 2, 2), 8), ((1,) * 5, 16)])
def test_sizes(multipliers, factor):
    module = Autoencoder(**TINY | {'channel_multipliers': multipliers, 'latent_channels': 5})
    x = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert out.shape == x.shape and module.factor == factor
    code = jax.eval_shape(functools.partial(module.apply, method='encode'), variables, x)
    assert code.mean.shape == code.log_variance.shape == (2, 32 // factor, 64 // factor, 5)


def test_the_kl_divergence_is_the_integral():
    """Against quadrature of the density times the log ratio."""
    mean, log_variance = np.array([[0.3, -1.0]]), np.array([[-0.5, 0.7]])
    z = np.linspace(-15, 15, 60001)[:, None]
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(log_variance) + log_variance)
    expected = np.trapezoid(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q + 0.5 * z**2), z[:, 0], axis=0).sum()
    kl = Gaussian(jnp.asarray(mean), jnp.asarray(log_variance)).kl()
    assert kl.shape == (1,) and float(kl[0]) == pytest.approx(expected, rel=1e-5)


def test_the_nearest_code_is_nearest_and_its_gradient_passes_through():
    z, codebook = images(3, 4, 5), images(11, 5)
    tokens = nearest_codes(jnp.asarray(z), jnp.asarray(codebook))
    expected = [[min(range(11), key=lambda k: ((v - codebook[k]) ** 2).sum()) for v in row] for row in z]
    np.testing.assert_array_equal(tokens, expected)
    weight = images(3, 4, 5)
    gradient = jax.grad(lambda z: (straight_through(z, jnp.asarray(codebook)[tokens]) * weight).sum())(jnp.asarray(z))
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize('levels', [(8, 5, 5), (2, 3, 4)])
def test_fsq_has_every_combination_and_its_tokens_are_their_places(levels):
    ranges = [np.arange(n) - n // 2 for n in levels]
    values = np.array(list(itertools.product(*ranges))) / [n // 2 for n in levels]
    reached = fsq(jnp.asarray(RNG.uniform(-4, 4, (20_000, len(levels))).astype(np.float32)), levels)
    assert {tuple(v) for v in np.round(np.asarray(reached), 4)} == {tuple(v) for v in np.round(values, 4) + 0.0}
    tokens = fsq_tokens(jnp.asarray(values), levels)
    assert sorted(np.asarray(tokens)) == list(range(np.prod(levels)))
    np.testing.assert_allclose(fsq_values(tokens, levels), values, atol=1e-6)
    digits = (values * [n // 2 for n in levels]).round() + [n // 2 for n in levels]
    np.testing.assert_array_equal(tokens, digits @ np.cumprod([1, *levels[:-1]]))
    assert float(fsq(jnp.zeros((1, len(levels))), levels).max()) == 0
    slope = jax.grad(lambda z: fsq(z, levels).sum())(jnp.full((1, len(levels)), 0.3))
    assert (np.asarray(slope) > 0).all()


@pytest.mark.parametrize(
    'fields',
    [
        {'bottleneck': 'vq', 'codebook_size': 7, 'latent_channels': 4, 'code_size': 2, 'pointwise': True},
        {'bottleneck': 'fsq', 'levels': (5, 3), 'latent_channels': 2},
    ],
    ids=['vq', 'fsq'],
)
def test_tokens_are_enough_to_decode(fields):
    encode, decode, params = network(**fields)
    x = images(2, 16, 16, 3)
    code = encode(params, x)
    assert code.tokens.shape == (2, 4, 4) and code.tokens.dtype == jnp.int32 and len(np.unique(code.tokens)) > 2
    module = Autoencoder(**TINY | fields)
    z = module.apply({'params': params}, code.tokens, method='tokens_to_latents')
    np.testing.assert_allclose(z, code.quantised, atol=1e-6)
    np.testing.assert_allclose(decode(params, z), decode(params, code.quantised), atol=1e-5)


# Clips ----------------------------------------------------------------------------------------------------------------


def last_slices(params):
    return jax.tree.map(lambda a: a[-1] if a.ndim == 5 else a, params)


def test_one_frame_is_an_image():
    """Any clip network on one frame, against the image network with the last slice of each kernel."""
    encode, decode, params = network(**CLIP)
    image_encode, image_decode, _ = network(latent_channels=2)
    x, flat = images(2, 1, 16, 16, 3), last_slices(params)
    code, expected = encode(params, x), image_encode(flat, x[:, 0])
    np.testing.assert_allclose(code.mean[:, 0], expected.mean, rtol=1e-4, atol=1e-5)
    decoded = decode(params, code.mean)
    np.testing.assert_allclose(decoded[:, 0], image_decode(flat, expected.mean), rtol=1e-4, atol=1e-4)


def test_an_inflated_network_takes_frames_as_images_at_their_own_rate():
    _, decode, _ = network(**CLIP | {'temporal_downsampling': ()})
    _, image_decode, image_params = network(latent_channels=2)
    z = images(1, 5, 4, 4, 2)
    decoded = decode(inflate(image_params, 3), z)
    for i in range(5):
        np.testing.assert_allclose(decoded[:, i], image_decode(image_params, z[:, i]), rtol=1e-4, atol=1e-4)


def test_nothing_looks_ahead():
    encode, decode, params = network(**CLIP)
    x = images(1, 9, 16, 16, 3)
    changed = x.copy()
    changed[:, 5:] += 1
    a, b = encode(params, x).mean, encode(params, changed).mean
    assert a.shape == (1, 3, 4, 4, 2)
    np.testing.assert_array_equal(a[:, :2], b[:, :2])  # latent 1 has seen frames up to 4
    assert np.abs(a[:, 2] - b[:, 2]).max() > 1e-3
    z = np.array(a)
    z[:, 2] += 1
    before, after = decode(params, a), decode(params, z)
    assert before.shape == x.shape
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3


# Precision and refusals -----------------------------------------------------------------------------------------------


def test_bfloat16_stays_near():
    encode, decode, params = network()
    low_encode, low_decode, _ = network(compute_dtype='bfloat16')
    x = images(2, 16, 16, 3)
    z = encode(params, x).mean
    for full, low in ((z, low_encode(params, x).mean), (decode(params, z), low_decode(params, z))):
        assert low.dtype == jnp.float32
        assert np.abs(full - low).max() < 2e-2 * np.abs(full).max()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'bottleneck': 'vae'}, "bottleneck='vae' is not known; choose one of 'kl', 'vq', 'fsq'"),
        ({'bottleneck': 'vq'}, 'codebook_size of at least 2, got 0'),
        ({'bottleneck': 'fsq', 'levels': (5,)}, r'latent_channels=4; got \(5,\)'),
        ({'num_groups': 3}, 'num_groups=3 does not divide the 8 channels'),
        ({'attention_levels': (3,)}, '3 is not one of the levels 0 to 2'),
        ({'temporal_downsampling': (0,)}, 'needs frames > 1'),
        ({'frames': 3, 'temporal_downsampling': (2,)}, '2 is not one of the levels 0 to 1'),
        ({'code_size': 2}, "needs bottleneck='vq'"),
        ({'channel_multipliers': ()}, 'must be positive'),
    ],
)
def test_fields_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(**TINY | change)


@pytest.mark.parametrize(
    ('fields', 'shape', 'message'),
    [
        ({}, (1, 16, 18, 3), 'multiples of 4, got 16x18'),
        ({}, (1, 16, 16, 4), 'C = 3'),
        ({}, (1, 5, 16, 16, 3), r'\[B, H, W, C\]'),
        (CLIP, (1, 4, 16, 16, 3), '1 more than a multiple of 4, got 4'),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Autoencoder(**TINY | fields).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_a_gaussian_has_no_tokens():
    with pytest.raises(ValueError, match="'kl' has no tokens"):
        Autoencoder(**TINY).apply({'params': {}}, jnp.zeros((1, 2, 2), jnp.int32), method='tokens_to_latents')


def test_patches_are_squares_of_pixels():
    """Against loops; and the way back."""
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 4, 5)).astype(np.float32)
    patches = np.asarray(to_patches(jnp.asarray(x), 2))
    assert patches.shape == (2, 3, 3, 2, 20)
    for row in range(3):
        for column in range(2):
            square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[:, :, row, column], square.reshape(2, 3, 20))
    np.testing.assert_array_equal(from_patches(jnp.asarray(patches), 2), x)


def test_folding_patches_first_multiplies_the_factor():
    network = Autoencoder(patch_size=4, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2)
    assert network.factor == 8
    x = jnp.zeros((1, 16, 24, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)['params']
    assert shapes['encoder']['conv_in']['kernel'].shape == (3, 3, 48, 8)
    assert shapes['decoder']['conv_out']['kernel'].shape == (3, 3, 8, 48)
    code = jax.eval_shape(lambda p: network.apply({'params': p}, x, method='encode'), shapes)
    assert code.mean.shape == (1, 2, 3, 4)
    with pytest.raises(ValueError, match='multiples of 8, got 12x16'):
        network.init(jax.random.key(0), jnp.zeros((1, 12, 16, 3)))
