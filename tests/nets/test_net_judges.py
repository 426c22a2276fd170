"""The discriminator of patches and the small recogniser: published counts, and what a distance measures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from diffjax.nets import count_parameters
from diffjax.nets.discriminator import PatchDiscriminator
from diffjax.nets.recognizer import ClipRecognizer, Recognizer, perceptual_distance

RNG = np.random.default_rng(0)


def test_scores_stand_where_the_published_ones_do():
    """30 x 30 of them for 256 x 256 pixels (Isola et al. 2017, section 3.2.2)."""
    judge = PatchDiscriminator(base_channels=2, depth=3)
    x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    assert jax.eval_shape(judge.init_with_output, jax.random.key(0), x)[0].shape == (2, 30, 30, 1)


def test_the_published_discriminator_has_its_parameters():
    """2.77 M for three strides and 64 channels, of convolutions and norms counted by hand."""
    params = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
    widths = [3, 64, 128, 256, 512, 1]
    by_hand = sum(16 * a * b + b for a, b in zip(widths, widths[1:])) + 2 * (128 + 256 + 512)
    assert count_parameters(params) == by_hand and round(by_hand / 1e6, 2) == 2.77


def test_a_verdict_does_not_depend_on_the_batch():
    judge = PatchDiscriminator(base_channels=4, depth=1)
    x = RNG.standard_normal((3, 16, 16, 1)).astype(np.float32)
    params = judge.init(jax.random.key(0), x)
    np.testing.assert_allclose(judge.apply(params, x)[:1], judge.apply(params, x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'shape', 'message'),
    [
        ({}, (1, 16, 64, 3), 'needs pictures of 32x32 at least, got 16x64: lower its depth'),
        ({}, (64, 64, 3), r'\[B, H, W, C\]'),
    ],
)
def test_pictures_that_are_too_small_are_refused(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(PatchDiscriminator(**fields).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(ValueError, match='at least 1, got 64 and 0'):
        PatchDiscriminator(depth=0)


def test_the_distance_is_its_equation():
    """In plain loops over positions, with weights and without."""
    a, b = ([RNG.standard_normal((2, n, n, c)).astype(np.float32) for n, c in ((4, 3), (2, 5))] for _ in range(2))
    weights = [RNG.uniform(0, 1, c).astype(np.float32) for c in (3, 5)]

    def by_hand(i, weights):
        total = 0.0
        for f, g, w in zip(a, b, weights):
            places = [(y, x) for y in range(f.shape[1]) for x in range(f.shape[2])]
            for place in places:
                u, v = (h[(i, *place)] / np.linalg.norm(h[(i, *place)]) for h in (f, g))
                total += (w * (u - v) ** 2).sum() / len(places)
        return total

    np.testing.assert_allclose(perceptual_distance(a, b, weights), [by_hand(i, weights) for i in (0, 1)], rtol=1e-5)
    halves = [np.full(c, 0.5) for c in (3, 5)]
    np.testing.assert_allclose(perceptual_distance(a, b), [by_hand(i, halves) for i in (0, 1)], rtol=1e-5)
    np.testing.assert_array_equal(perceptual_distance(a, a), 0)


def test_a_stride_and_coordinates_change_what_is_seen():
    """Half the size from the first map on; two more channels, whose values a first convolution gives back."""
    x = RNG.standard_normal((2, 8, 12, 3)).astype(np.float32)
    net = Recognizer(num_outputs=2, channels=(4, 4), num_groups=2, first_stride=2, coordinates=True)
    params = net.init(jax.random.key(0), x)['params']
    assert [m.shape for m in net.apply({'params': params}, x, method='features')] == [(2, 4, 6, 4), (2, 2, 3, 4)]
    assert params['stages_0']['conv_in']['kernel'].shape == (3, 3, 3 + 2, 4)

    picture = jnp.ones((1, 8, 12, 1))
    one = Recognizer(num_outputs=1, channels=(4,), num_groups=4, coordinates=True)
    params = jax.tree.map(jnp.zeros_like, one.init(jax.random.key(0), picture)['params'])
    stage = params['stages_0'] | {'norm_in': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}}
    for channel, line in ((1, np.linspace(-1, 1, 8)[:, None]), (2, np.linspace(-1, 1, 12)[None])):
        kernel = jnp.zeros((3, 3, 3, 4)).at[1, 1, channel].set(1)  # one coordinate, as it is
        found = one.apply(
            {'params': params | {'stages_0': stage | {'conv_in': {'kernel': kernel, 'bias': jnp.zeros(4)}}}},
            picture,
            method='features',
        )[0]
        normed = np.broadcast_to(line / np.sqrt((line**2).mean() + 1e-6), (8, 12))
        np.testing.assert_allclose(found[0, ..., 0], normed / (1 + np.exp(-normed)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('fields', [{'first_stride': 4}, {'channels': ()}, {'channels': (12,)}])
def test_recognisers_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match='first_stride is 1 or 2, and channels .* multiples of num_groups; got'):
        Recognizer(num_outputs=2, **fields)


def test_clips_are_seen_frame_by_frame_and_whole():
    """Answers for a frame are of this frame alone, and those for the clip of all; any number of frames is taken."""
    net = ClipRecognizer(
        num_outputs=4 * 5 + 6,
        num_frames=4,
        num_frame_outputs=5,
        num_kinds=2,
        num_choices=3,
        channels=(4,),
        temporal_channels=(4, 4),
        num_groups=2,
    )
    x = RNG.standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    logits = np.asarray(net.apply(variables, x))
    other = net.apply(variables, np.concatenate([x[:, :1], RNG.standard_normal(x[:, 1:].shape)], 1))
    np.testing.assert_allclose(other[:, :5], logits[:, :5], rtol=1e-4, atol=1e-5)
    assert (np.abs(other[:, 5:20] - logits[:, 5:20]) > 1e-3).mean() > 0.9
    turned = np.asarray(net.apply(variables, x[:, ::-1]))
    frames, back = logits[:, :20].reshape(2, 4, 5), turned[:, :20].reshape(2, 4, 5)
    np.testing.assert_allclose(back, frames[:, ::-1], rtol=1e-4, atol=1e-5)
    assert (np.abs(turned[:, 20:] - logits[:, 20:]) > 1e-4).mean() > 0.9  # time has a direction
    features, number, kinds = net.apply(variables, x, method='summary')
    assert features.shape == (2, 4 + 4)
    np.testing.assert_allclose(number, logits[:, -3:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kinds, frames[..., :2], rtol=1e-4, atol=1e-5)
    longer = np.concatenate([x, x], 1)
    assert [a.shape for a in net.apply(variables, longer, method='summary')] == [(2, 8), (2, 3), (2, 8, 2)]
    still = net.apply(variables, x[:, :1].repeat(4, 1), method='summary')[0]
    np.testing.assert_allclose(still[:, 4:], 0, atol=1e-6)  # nothing changes
    np.testing.assert_allclose(net.apply(variables, x[:, ::-1], method='summary')[0][:, 4:], features[:, 4:], rtol=1e-4)
    with pytest.raises(ValueError, match=r'temporal_channels are .* multiples of num_groups=8; got \(12,\)'):
        ClipRecognizer(
            num_outputs=2, num_frames=1, num_frame_outputs=1, num_kinds=1, num_choices=1, temporal_channels=(12,)
        )


def test_it_learns_to_tell_digits_apart(fast_compilation):
    digits = load_digits()
    x, y = (digits.images[..., None] / 8 - 1).astype(np.float32), digits.target
    net, adam = Recognizer(num_outputs=10, channels=(8, 16)), optax.adam(1e-2)
    params = jax.jit(net.init)(jax.random.key(0), x[:1])

    @jax.jit
    def step(params, opt, x, y):
        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(net.apply(p, x), y).mean()

        updates, opt = adam.update(jax.grad(loss)(params), opt)
        return optax.apply_updates(params, updates), opt

    opt = adam.init(params)
    for i in range(60):
        rows = slice(64 * (i % 20), 64 * (i % 20) + 64)
        params, opt = step(params, opt, x[rows], y[rows])
    logits = jax.jit(net.apply)(params, x[1400:])
    assert (np.argmax(logits, -1) == y[1400:]).mean() > 0.7
    maps = net.apply(params, x[:2], method='features')
    assert [m.shape for m in maps] == [(2, 8, 8, 8), (2, 4, 4, 16)]
    np.testing.assert_allclose(net.apply(params, x[:2], method='embed'), maps[-1].mean((1, 2)), rtol=1e-6)
