"""Adversarial training: who trains on what, penalties by hand, and the Dirac-GAN, whose fate is known."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffjax.nets.generative import PictureEncoder, PictureGenerator
from diffjax.tasks import Adversarial

pytestmark = pytest.mark.usefixtures('fast_compilation')

FIELDS = {'num_classes': 10, 'hidden_size': 16, 'depth': 1}
GENERATOR = PictureGenerator(**FIELDS, latent_size=4)
JUDGE = PictureEncoder(**FIELDS, out_features=1)
RNG = np.random.default_rng(0)
BATCH = {'x0': RNG.uniform(-1, 1, (6, 8, 8, 1)).astype(np.float32), 'label': np.array([3, 1, 4, 1, 5, 9])}
KEYS = jax.random.split(jax.random.key(7), 6)
GAMES = ('non_saturating', 'hinge', 'relativistic')


@functools.cache
def setting(**changes):
    """(task, params away from their initial values)."""
    task = Adversarial(generator=GENERATOR, discriminator=JUDGE, num_classes=10, **changes)
    params = jax.jit(task.init)(jax.random.key(0), BATCH)[0]
    rng = np.random.default_rng(1)
    return task, jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params)


def gradients(task, params, batch=BATCH, keys=KEYS):
    return jax.jit(task.gradients)(params, (), (), batch, 0, keys)


def norm(tree):
    return float(optax.global_norm(tree))


def papers_losses(game, real, fake):
    """(critic's, generator's), from probabilities where the papers have them."""
    sigmoid = jax.nn.sigmoid
    if game == 'non_saturating':  # Goodfellow et al. 2014, equation 1 and section 3
        return -jnp.log(sigmoid(real)) - jnp.log(1 - sigmoid(fake)), -jnp.log(sigmoid(fake))
    if game == 'hinge':
        return jnp.maximum(1 - real, 0) + jnp.maximum(1 + fake, 0), -fake
    return -jnp.log(sigmoid(real - fake)), -jnp.log(sigmoid(fake - real))  # Jolicoeur-Martineau 2019, equations 4 and 5


@pytest.mark.parametrize('game', GAMES)
def test_each_side_is_a_constant_to_the_other(game):
    """Against the two losses, each differentiated by its own side alone; slopes picture by picture."""
    task, params = setting(game=game, r1_weight=0.7, r2_weight=0.4)

    z = jnp.stack([jax.random.normal(key, (4,)) for key in KEYS])

    def pictures(generator):
        return GENERATOR.apply({'params': generator}, z, BATCH['label'], (8, 8, 1))

    def score(judge, x):
        return JUDGE.apply({'params': judge}, x, BATCH['label'])[:, 0]

    def slope(judge, x):
        def one(x, label):
            return JUDGE.apply({'params': judge}, x[None], label[None])[0, 0]

        return (jax.vmap(jax.grad(one))(x, BATCH['label']) ** 2).sum((1, 2, 3)).mean()

    def critic(judge):
        y = pictures(params['generator'])
        loss = papers_losses(game, score(judge, BATCH['x0']), score(judge, y))[0].mean()
        return loss + 0.35 * slope(judge, BATCH['x0']) + 0.2 * slope(judge, y)

    def generator(weights):
        judge = params['discriminator']
        return papers_losses(game, score(judge, BATCH['x0']), score(judge, pictures(weights)))[1].mean()

    found, (_, metrics) = gradients(task, params)
    expected = {
        'generator': jax.jit(jax.grad(generator))(params['generator']),
        'discriminator': jax.jit(jax.grad(critic))(params['discriminator']),
    }
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)
    assert min(norm(part) for part in found.values()) > 1e-2
    total = critic(params['discriminator']) + generator(params['generator'])
    assert float(metrics['loss']) == pytest.approx(float(total), rel=1e-4)


class LinearJudge(nn.Module):
    """D(x) = w x."""

    first: tuple
    out_features: int = 1

    @nn.compact
    def __call__(self, x, label):
        return (x.reshape(len(x), -1) @ self.param('w', lambda key: jnp.array(self.first)))[:, None]


class Point(nn.Module):
    """The same picture for every z."""

    first: tuple
    latent_size: int = 1

    @nn.compact
    def __call__(self, z, label, shape):
        return jnp.tile(self.param('x', lambda key: jnp.array(self.first)).reshape(1, *shape), (len(z), 1, 1, 1))


def test_penalties_of_a_linear_critic():
    """Its slope is w everywhere: each penalty is |w|^2, its gradient 2 w, at half their weights."""
    w, x = np.array([0.5, -1.0, 2.0], np.float32), RNG.normal(size=(4, 1, 3, 1)).astype(np.float32)
    batch, keys = {'x0': x, 'label': np.zeros(4, np.int32)}, KEYS[:4]
    task = Adversarial(generator=Point((0.1, 0.2, 0.3)), discriminator=LinearJudge(tuple(w.tolist())), r1_weight=0.0)
    task = replace(task, r2_weight=0.0)
    params = task.init(jax.random.key(0), batch)[0]
    without, (_, metrics) = gradients(task, params, batch, keys)
    assert float(metrics['r1']) == pytest.approx(5.25) and float(metrics['r2']) == pytest.approx(5.25)
    for weights, total in (((3.0, 0.0), 3.0), ((0.0, 2.0), 2.0), ((3.0, 2.0), 5.0)):
        charged = replace(task, r1_weight=weights[0], r2_weight=weights[1])
        found, (_, more) = gradients(charged, params, batch, keys)
        np.testing.assert_allclose(found['discriminator']['w'] - without['discriminator']['w'], total * w, rtol=1e-5)
        np.testing.assert_allclose(found['generator']['x'], without['generator']['x'], rtol=1e-6)
        assert float(more['loss'] - metrics['loss']) == pytest.approx(total / 2 * 5.25, rel=1e-5)


def test_a_critic_that_knows_nothing_loses_log_2_a_side():
    """f(0) = log 2 (Goodfellow et al. 2014, theorem 1: -log 4 is the sum over both pictures)."""
    batch = {'x0': np.ones((2, 1, 1, 1), np.float32), 'label': np.zeros(2, np.int32)}
    expected = {'non_saturating': (2 * np.log(2), np.log(2)), 'relativistic': (np.log(2), np.log(2)), 'hinge': (2, 0)}
    for game, values in expected.items():
        task = Adversarial(generator=Point((0.3,)), discriminator=LinearJudge((0.0,)), game=game)
        metrics = gradients(task, task.init(jax.random.key(0), batch)[0], batch, KEYS[:2])[1][1]
        np.testing.assert_allclose((metrics['discriminator'], metrics['generator']), values, rtol=1e-6)


@pytest.mark.parametrize('game', ['non_saturating', 'relativistic'])
def test_the_dirac_gan_settles_with_penalties_and_circles_without(game):
    """Mescheder et al. 2018, sections 2 and 4: one number against another, the data at 0; linear rate or none."""
    batch = {'x0': np.zeros((1, 1, 1, 1), np.float32), 'label': np.zeros(1, np.int32)}
    for weight in (0.0, 1.0):
        task = Adversarial(generator=Point((1.0,)), discriminator=LinearJudge((0.5,)), game=game, r1_weight=weight)
        task = replace(task, r2_weight=0.0)
        step = jax.jit(lambda p, task=task: jax.tree.map(lambda a, g: a - 0.1 * g, p, _only_gradients(task, p, batch)))
        params = task.init(jax.random.key(0), batch)[0]
        start = norm(params)
        for _ in range(400):
            params = step(params)
        assert norm(params) < 1e-3 * start if weight else norm(params) > 0.4 * start


def _only_gradients(task, params, batch):
    return task.gradients(params, (), (), batch, 0, KEYS[:1])[0]


def test_a_sample_depends_on_its_key_and_label_alone():
    task, params = setting()
    keys, labels = jax.random.split(jax.random.key(1), 6), np.array([3, 1, 4, 1, 5, 9])
    draw = jax.jit(lambda params, labels, keys: task.sample(params, (), labels, keys, (8, 8, 1)))
    whole = np.asarray(draw(params, labels, keys))
    np.testing.assert_allclose(draw(params, labels[2:], keys[2:]), whole[2:], atol=1e-5)
    changed = np.asarray(draw(params, np.array([3, 1, 4, 1, 5, 2]), keys))
    np.testing.assert_allclose(changed[:5], whole[:5], atol=1e-6)
    assert np.abs(changed[5] - whole[5]).max() > 0.01 < np.abs(whole[1] - whole[3]).max()
    assert np.abs(whole).max() == 1  # these generators overshoot: clipped
    other = params | {'discriminator': jax.tree.map(jnp.zeros_like, params['discriminator'])}
    np.testing.assert_array_equal(draw(other, labels, keys), whole)


def test_the_critic_sees_the_class():
    task, params = setting()
    judge = jax.jit(lambda label: task.scores(params['discriminator'], BATCH['x0'][:1], label)[0][0])
    scores = [judge(np.array([c])) for c in (0, 1)]
    assert abs(float(scores[0] - scores[1])) > 1e-3


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'game': 'wasserstein'}, "game is one of 'non_saturating', 'hinge', 'relativistic'; got 'wasserstein'"),
        ({'r1_weight': -1.0}, 'r1_weight must be at least 0, got -1.0'),
        ({'r2_weight': float('nan')}, 'r2_weight must be at least 0, got nan'),
        ({'discriminator': PictureEncoder(out_features=2)}, 'one score, got 2'),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(setting()[0], **change)
