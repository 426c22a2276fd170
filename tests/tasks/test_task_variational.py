"""The variational bound where the truth is known: a linear-Gaussian model has its posterior and likelihood closed."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy import integrate, special, stats
from sklearn.datasets import load_digits

from diffjax.nets.generative import PictureEncoder, PictureGenerator
from diffjax.tasks import Variational

pytestmark = pytest.mark.usefixtures('fast_compilation')

SHAPE, LATENTS, STD = (2, 3, 1), 2, 0.3
RNG = np.random.default_rng(0)
MEANS = RNG.normal(0, 0.1, (4, 6))  # one for each class
WEIGHT = np.linalg.qr(RNG.normal(size=(6, LATENTS)))[0] * [0.3, 0.2]  # orthogonal: the posterior is diagonal
X = RNG.normal(0, 0.3, SHAPE).astype(np.float32)
LABEL = 3


class LinearGenerator(nn.Module):
    latent_size: int = LATENTS

    @nn.compact
    def __call__(self, z, label, shape):
        weight = self.param('weight', lambda key: jnp.asarray(WEIGHT, jnp.float32))
        return (z @ weight.T + jnp.asarray(MEANS, jnp.float32)[label]).reshape(-1, *shape)


class GivenEncoder(nn.Module):
    """The same for every picture."""

    mean: tuple
    variance: tuple
    out_features: int = 2 * LATENTS

    @nn.compact
    def __call__(self, x, label):
        numbers = self.param('numbers', lambda key: jnp.array([*self.mean, *np.log(self.variance)], jnp.float32))
        return jnp.tile(numbers, (len(x), 1))


def posterior():
    """Mean and variances of z given X and its class (Bishop 2006, equation 12.42)."""
    precision = np.eye(LATENTS) + WEIGHT.T @ WEIGHT / STD**2
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    return covariance @ WEIGHT.T @ (X.ravel() - MEANS[LABEL]) / STD**2, np.diag(covariance)


def linear(mean, variance, **changes):
    encoder = GivenEncoder(tuple(mean), tuple(variance))
    fields = {'num_classes': 4, 'std': STD} | changes
    return Variational(generator=LinearGenerator(), encoder=encoder, **fields)


def batch(count):
    return {'x0': np.broadcast_to(X, (count, *SHAPE)), 'label': np.full(count, LABEL)}


def bounds(task, count=20_000, params=None):
    params = task.init(jax.random.key(0), batch(1))[0] if params is None else params
    return jax.jit(task.bound)(params, batch(count), jax.random.split(jax.random.key(1), count))


def exact():
    return stats.multivariate_normal(MEANS[LABEL], WEIGHT @ WEIGHT.T + STD**2 * np.eye(6)).logpdf(X.ravel())


def test_the_bound_is_the_likelihood_at_the_posterior():
    """There every draw gives it, since p(x, z) / q(z) is p(x) whatever z is; less the KL, which is a mean over z."""
    mean, variance = posterior()
    values = np.asarray(bounds(linear(mean, variance))[0], np.float64)
    assert values.mean() == pytest.approx(exact(), abs=5 * values.std() / np.sqrt(len(values)))
    assert 5 * values.std() / np.sqrt(len(values)) < 0.05


@pytest.mark.parametrize(('shift', 'stretch'), [(0.5, 1.0), (0.0, 3.0), (-0.4, 0.4)])
def test_elsewhere_it_falls_short_by_the_divergence_from_the_posterior(shift, stretch):
    mean, variance = posterior()
    values = np.asarray(bounds(linear(mean + shift, variance * stretch))[0], np.float64)
    gap = 0.5 * np.sum(stretch + shift**2 / variance - 1 - np.log(stretch))
    error = 5 * values.std() / np.sqrt(len(values))
    assert values.mean() == pytest.approx(exact() - gap, abs=error) and values.mean() < exact() - gap / 2


def test_divergence_and_beta():
    """By numerical integration; beta takes it off so many times."""
    mean, variance = (0.7, -1.2), (0.3, 2.5)
    expected = 0.0
    for m, v in zip(mean, variance):
        q, p = stats.norm(m, np.sqrt(v)), stats.norm()
        density = functools.partial(lambda z, q, p: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), q=q, p=p)
        expected += integrate.quad(density, -15, 15)[0]
    value, parts = bounds(linear(mean, variance), 8)
    np.testing.assert_allclose(parts['kl'], expected, rtol=1e-5)
    stronger, _ = bounds(linear(mean, variance, beta=4.0), 8)
    np.testing.assert_allclose(np.asarray(value) - stronger, 3 * expected, rtol=1e-4)


def test_a_learned_width_settles_at_the_error():
    task = linear(*posterior(), std=0.0)
    params = task.init(jax.random.key(0), batch(1))[0]
    keys = jax.random.split(jax.random.key(1), 64)
    z = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (LATENTS,)))(keys))
    mean, variance = posterior()
    y = (mean + np.sqrt(variance) * z) @ WEIGHT.T + MEANS[LABEL]
    error = np.sqrt(np.mean((y - X.ravel()) ** 2))
    slope = jax.jit(jax.grad(lambda p: task.loss(p, (), (), batch(64), 0, keys)[0]))
    for width, sign in ((error, 0), (1.2 * error, 1), (0.8 * error, -1)):
        found = float(slope(params | {'log_std': jnp.float32(np.log(width))})['log_std'])
        assert abs(found) < 1e-5 if sign == 0 else found * sign > 0.1


def test_bernoulli_likelihood():
    x = ((X - X.min()) / np.ptp(X) * 2 - 1).astype(np.float32)  # to -1 and 1
    task = linear((0.0, 0.0), (1e-20, 1e-20), std=0.0, likelihood='bernoulli')  # z is 0
    params = task.init(jax.random.key(0), batch(1))[0]
    given = {'x0': x[None], 'label': np.array([LABEL])}
    _, parts = task.bound(params, given, jax.random.split(jax.random.key(1), 1))
    p, v = special.expit(MEANS[LABEL]), (x.ravel() + 1) / 2
    assert float(parts['log_likelihood'][0]) == pytest.approx(np.sum(special.xlogy(v, p) + special.xlogy(1 - v, 1 - p)))
    keys = jax.random.split(jax.random.key(2), 20_000)
    draw = jax.jit(lambda labels, keys: task.sample(params, (), labels, keys, SHAPE))
    drawn = np.asarray(draw(np.full(len(keys), LABEL), keys)).reshape(-1, 6)
    z = RNG.standard_normal((100_000, LATENTS))
    expected = 2 * special.expit(z @ WEIGHT.T + MEANS[LABEL]) - 1
    np.testing.assert_allclose(drawn.mean(0), expected.mean(0), atol=0.005)
    np.testing.assert_allclose(drawn.std(0), expected.std(0), atol=0.005)


@pytest.mark.parametrize('samples', ['mean', 'draw'])
def test_samples_have_the_model_s_moments(samples):
    task = linear((0.0, 0.0), (1.0, 1.0), samples=samples, std=0.05)
    keys, labels = jax.random.split(jax.random.key(3), 40_000), np.arange(40_000) % 4
    params = task.init(jax.random.key(0), batch(1))[0]
    draw = jax.jit(lambda labels, keys: task.sample(params, (), labels, keys, SHAPE))
    drawn = np.asarray(draw(labels, keys)).reshape(-1, 6)
    for label in range(4):
        np.testing.assert_allclose(drawn[labels == label].mean(0), MEANS[label], atol=0.01)
    covariance = WEIGHT @ WEIGHT.T + (0.05**2 * np.eye(6) if samples == 'draw' else 0)
    np.testing.assert_allclose(np.cov((drawn - MEANS[labels]).T), covariance, atol=1e-3)


def real(**changes):
    """(task, params) of the networks that a config names."""
    fields = {'num_classes': 10, 'hidden_size': 64, 'depth': 1}
    generator = PictureGenerator(**fields, latent_size=8)
    task = Variational(
        generator=generator, encoder=PictureEncoder(**fields, out_features=16), num_classes=10, **changes
    )
    return task, jax.jit(task.init)(jax.random.key(0), {'x0': np.zeros((1, 8, 8, 1)), 'label': np.zeros(1, np.int32)})[
        0
    ]


@pytest.mark.parametrize('samples', ['mean', 'draw'])
def test_a_sample_depends_on_its_key_and_label_alone(samples):
    task, params = real(samples=samples)
    keys, labels = jax.random.split(jax.random.key(1), 6), np.array([3, 1, 4, 1, 5, 9])
    draw = jax.jit(lambda labels, keys: task.sample(params, (), labels, keys, (8, 8, 1)))
    whole = np.asarray(draw(labels, keys))
    np.testing.assert_allclose(draw(labels[2:], keys[2:]), whole[2:], atol=1e-5)
    changed = np.asarray(draw(np.array([3, 1, 4, 1, 5, 2]), keys))
    np.testing.assert_allclose(changed[:5], whole[:5], atol=1e-6)
    assert np.abs(changed[5] - whole[5]).max() > 0.01 < np.abs(whole[1] - whole[3]).max()


def test_it_learns_the_digits():
    """More than a Gaussian of one width around each class's mean can say, whose likelihood is closed."""
    digits, labels = load_digits(return_X_y=True)
    x = (digits.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    task, params = real()
    adam = optax.adam(3e-3)

    @jax.jit
    def step(params, opt, i):
        rows = 64 * (i % 28) + jnp.arange(64)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 64)
        some = {'x0': jnp.asarray(x)[rows], 'label': jnp.asarray(labels)[rows]}
        found, (_, metrics) = task.gradients(params, (), (), some, i, keys)
        updates, opt = adam.update(found, opt)
        return optax.apply_updates(params, updates), opt, metrics['loss']

    opt, losses = adam.init(params), []
    for i in range(400):
        params, opt, loss = step(params, opt, i)
        losses.append(float(loss))
    error = np.concatenate([x[labels == c] - x[labels == c].mean(0) for c in range(10)]).std()
    assert -np.mean(losses[-28:]) > -0.5 * np.log(2 * np.pi * np.e * error**2) + 0.1  # nats for each pixel


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'likelihood': 'laplace'}, "likelihood is one of 'gaussian', 'bernoulli'; got 'laplace'"),
        ({'samples': 'median'}, "samples is one of 'mean', 'draw'; got 'median'"),
        ({'std': -1.0}, 'at least 0, got -1.0'),
        ({'beta': float('nan')}, 'at least 0, got 0.0 and nan'),
        ({'likelihood': 'bernoulli', 'std': 0.1}, "are for likelihood='gaussian'"),
        ({'likelihood': 'bernoulli', 'samples': 'draw'}, "are for likelihood='gaussian'"),
        ({'encoder': PictureEncoder(out_features=3)}, 'of each of 8 latents: 16 features, got 3'),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(real()[0], **change)
