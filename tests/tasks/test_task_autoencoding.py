"""Autoencoding: who trains on what, the adaptive weight by another route, running codebooks by plain loops."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from diffjax.nets import Autoencoder
from diffjax.nets.discriminator import PatchDiscriminator
from diffjax.nets.recognizer import Recognizer, perceptual_distance
from diffjax.tasks import Autoencoding

FIELDS = dict(base_channels=4, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2, latent_channels=3)  # noqa: C408
KL = Autoencoder(**FIELDS, out_channels=1)
VQ = Autoencoder(**FIELDS, out_channels=1, bottleneck='vq', codebook_size=6)
JUDGE = PatchDiscriminator(base_channels=4, depth=1)
FEATURES = Recognizer(num_outputs=2, channels=(4, 4), num_groups=2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 8, 8, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7), 4)

pytestmark = pytest.mark.usefixtures('fast_compilation')


def perceptual(frozen, x, y):
    maps = (FEATURES.apply(frozen, a, method='features') for a in (x, y))
    return perceptual_distance(*maps)


@functools.cache
def setting(network=KL, **changes):
    """(task, params away from their initial values, task state, frozen)."""
    task = Autoencoding(network=network, discriminator=JUDGE, perceptual=perceptual, discriminator_start=5, **changes)
    params, state = jax.jit(task.init)(jax.random.key(0), {'x0': X})
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params)
    return task, params, state, jax.jit(FEATURES.init)(jax.random.key(3), X)


@functools.cache
def compiled(task):
    return jax.jit(task.gradients)


def gradients(task, params, state, frozen, step):
    return compiled(task)(params, state, frozen, {'x0': X}, step, KEYS)


@functools.cache
def compiled_encode(task):
    return jax.jit(task.encode)


def encoded(task, params):
    return compiled_encode(task)(params, X)


def norm(tree):
    return float(optax.global_norm(tree))


def test_each_side_is_a_constant_to_the_other():
    """Against the two losses of the paper, differentiated apart."""
    task, params, state, frozen = setting()
    found, (_, metrics) = gradients(task, params, state, frozen, 5)

    def pictures(autoencoder):
        both = {'autoencoder': autoencoder}
        code = task.encode(both, X)
        return code, task.decode(both, task.draw(code, KEYS))

    def score(judge, y):
        return JUDGE.apply({'params': judge}, y)

    def first(autoencoder):  # (1), with the adaptive weight as a number
        code, y = pictures(autoencoder)
        kl = 0.5 * (code.mean**2 + code.std**2 - 1 - code.log_variance).sum() / X.size
        pull = -score(params['discriminator'], y).mean() * float(metrics['adaptive_weight'])
        return jnp.abs(X - y).mean() + perceptual(frozen, X, y).mean() + 1e-6 * kl + 0.5 * pull

    def second(judge):  # (2)
        y = pictures(params['autoencoder'])[1]
        return 0.5 * (jnp.maximum(1 - score(judge, X), 0).mean() + jnp.maximum(1 + score(judge, y), 0).mean())

    expected = {
        'autoencoder': jax.jit(jax.grad(first))(params['autoencoder']),
        'discriminator': jax.jit(jax.grad(second))(params['discriminator']),
    }
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert min(norm(part) for part in found.values()) > 1e-3


def test_the_adaptive_weight_is_a_ratio_of_whole_gradients():
    """Differentiated by all parameters, of which the last layer's are then looked at."""
    task, params, state, frozen = setting()
    metrics = gradients(task, params, state, frozen, 5)[1][1]

    @jax.jit
    def last(autoencoder):
        def decoded(p):
            both = {'autoencoder': p}
            return task.decode(both, task.draw(task.encode(both, X), KEYS))

        def reconstruction(p):
            return jnp.abs(X - decoded(p)).mean() + perceptual(frozen, X, decoded(p)).mean()

        def adversarial(p):
            return -JUDGE.apply({'params': params['discriminator']}, decoded(p)).mean()

        return [jax.grad(f)(autoencoder)['decoder']['conv_out']['kernel'] for f in (reconstruction, adversarial)]

    a, b = (np.linalg.norm(gradient) for gradient in last(params['autoencoder']))
    assert float(metrics['adaptive_weight']) == pytest.approx(a / (b + 1e-4), rel=1e-4)


def test_before_its_start_the_discriminator_neither_learns_nor_judges():
    task, params, state, frozen = setting()
    early, (_, metrics) = gradients(task, params, state, frozen, 4)
    alone = replace(task, discriminator=None)
    expected = compiled(alone)({'autoencoder': params['autoencoder']}, state, frozen, {'x0': X}, 4, KEYS)[0]
    assert norm(early['discriminator']) == 0 and float(metrics['discriminator']) > 0
    chex.assert_trees_all_close(early['autoencoder'], expected['autoencoder'], rtol=1e-4, atol=1e-6)


def test_codes_learn_by_gradient_what_they_stand_for():
    """(5) without decay: the codebook's gradient by hand, and the encoder's commitment apart from it."""
    task, params, state, frozen = setting(VQ, discriminator_weight=0.0)
    task = replace(task, perceptual=None, discriminator=None)
    params = {'autoencoder': params['autoencoder']}
    found = compiled(task)(params, state, (), {'x0': X}, 0, KEYS)[0]['autoencoder']['codebook']
    code = encoded(task, params)
    z, tokens = np.asarray(code.z).reshape(-1, 3), np.asarray(code.tokens).reshape(-1)
    codes = np.asarray(params['autoencoder']['codebook'])
    expected = np.zeros_like(codes)
    for vector, k in zip(z, tokens):
        expected[k] += 2 * (codes[k] - vector) / z.size
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert len(np.unique(tokens)) > 1


def test_running_codes_are_the_means_of_what_they_stood_for():
    task, params, state, _ = setting(VQ, codebook_decay=0.9)
    task = replace(task, perceptual=None, discriminator=None)
    params = {'autoencoder': params['autoencoder']}
    found, (after, metrics) = compiled(task)(params, state, (), {'x0': X}, 0, KEYS)
    code = encoded(task, params)
    z, tokens = np.asarray(code.z).reshape(-1, 3), np.asarray(code.tokens).reshape(-1)
    counts, sums = 0.9 * np.asarray(state.counts), 0.9 * np.asarray(state.sums)
    for vector, k in zip(z, tokens):
        counts[k] += 0.1
        sums[k] += 0.1 * vector
    alive = counts >= 0.03 * len(z) / 6
    assert alive.any()
    np.testing.assert_allclose(after.counts[alive], counts[alive], rtol=1e-5)
    np.testing.assert_allclose(after.sums[alive], sums[alive], rtol=1e-4, atol=1e-5)
    assert norm(found['autoencoder']['codebook']) == 0
    projected = task.project(params, after)['autoencoder']
    np.testing.assert_allclose(projected['codebook'][alive], (sums / counts[:, None])[alive], rtol=1e-4, atol=1e-5)
    assert float(metrics['codes_used']) == pytest.approx(len(np.unique(tokens)) / 6)


def test_a_code_that_nothing_uses_is_moved_onto_an_encoding():
    task, params, state, _ = setting(VQ, codebook_decay=0.9)
    task = replace(task, perceptual=None, discriminator=None)
    codebook = params['autoencoder']['codebook'].at[2].set(1e3)
    params = {'autoencoder': params['autoencoder'] | {'codebook': codebook}}
    state = state._replace(counts=state.counts.at[2].set(1e-3))
    _, (after, metrics) = compiled(task)(params, state, (), {'x0': X}, 0, KEYS)
    z = np.asarray(encoded(task, params).z).reshape(-1, 3)
    moved = np.asarray(task.project(params, after)['autoencoder']['codebook'][2])
    assert np.abs(z - moved).max(-1).min() < 1e-5
    assert float(metrics['codes_moved']) >= 1 / 6


@pytest.mark.parametrize('network', [KL, VQ], ids=['kl', 'vq'])
def test_it_learns_the_digits(network):
    digits = (load_digits().images[:256, ..., None] / 8 - 1).astype(np.float32)
    task = Autoencoding(network=network, codebook_decay=0.9)
    params, state = jax.jit(task.init)(jax.random.key(0), {'x0': digits})
    adam = optax.adam(5e-3)

    @jax.jit
    def step(params, state, opt, i):
        batch = {'x0': jax.lax.dynamic_slice_in_dim(jnp.asarray(digits), 32 * (i % 8), 32)}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 32)
        found, (state, metrics) = task.gradients(params, state, (), batch, i, keys)
        updates, opt = adam.update(found, opt)
        return task.project(optax.apply_updates(params, updates), state), state, opt, metrics['mse']

    opt, errors = adam.init(params), []
    for i in range(60):
        params, state, opt, error = step(params, state, opt, i)
        errors.append(float(error))
    variance = digits.var()
    assert np.mean(errors[-8:]) < 0.6 * variance < errors[0]
    again = jax.jit(task.reconstruct)(params, digits[:16])
    assert float(((again - digits[:16]) ** 2).mean()) < 0.6 * variance


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'reconstruction': 'l3'}, "'l1' or 'l2', got 'l3'"),
        ({'codebook_decay': 1.0}, 'a decay below 1, got 1.0'),
        ({'kl_weight': -1.0}, 'kl_weight must be at least 0'),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Autoencoding(network=KL, **change)


def test_frames_of_clips_are_judged_one_by_one():
    """Discriminator and perceptual distance see each frame as a picture; codes count over space and time."""
    network = Autoencoder(
        **FIELDS, out_channels=1, bottleneck='vq', codebook_size=6, frames=2, temporal_downsampling=(0,)
    )
    task = Autoencoding(network=network, discriminator=JUDGE, perceptual=perceptual, codebook_decay=0.9)
    x, keys = RNG.standard_normal((2, 3, 8, 8, 1)).astype(np.float32), KEYS[:2]
    params, state = jax.jit(task.init)(jax.random.key(0), {'x0': x})
    frozen = jax.jit(FEATURES.init)(jax.random.key(3), X)

    @jax.jit
    def both(params, x):
        code, (_, (after, metrics)) = task.encode(params, x), task.loss(params, state, frozen, {'x0': x}, 0, keys)
        return code, task.decode(params, code.quantised), after, metrics

    code, y, after, metrics = both(params, x)
    assert code.tokens.shape == (2, 2, 4, 4) and y.shape == x.shape
    real, fake = (np.stack([clip[k] for clip in a for k in range(3)]) for a in (x, np.asarray(y)))
    judged = jax.jit(JUDGE.apply)({'params': params['discriminator']}, np.concatenate([real, fake]))
    np.testing.assert_allclose(metrics['real_score'], judged[:6].mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics['fake_score'], judged[6:].mean(), rtol=1e-4, atol=1e-6)
    distance = jax.jit(perceptual)(frozen, real, fake)
    assert distance.shape == (6,)
    np.testing.assert_allclose(metrics['perceptual'], distance.mean(), rtol=1e-4)
    used = np.bincount(np.ravel(code.tokens), minlength=6)
    np.testing.assert_allclose(metrics['codes_used'], (used > 0).mean())
    np.testing.assert_allclose(after.counts[used > 20], 0.9 + 0.1 * used[used > 20], rtol=1e-5)
