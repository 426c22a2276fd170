"""The mixture against quadrature, automatic differentiation, sampling, and the single Gaussian's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffjax.core import oracles, schedules
from diffjax.core.oracles import GaussianMixture

LEVELS = [(0.99, 0.1), (0.6, 0.8), (1.0, 5.0), (0.05, 0.999)]
ONE = GaussianMixture(
    weights=np.array([0.3, 0.5, 0.2]),
    means=np.array([[-1.0], [0.4], [1.5]]),
    variances=np.array([[0.05], [0.2], [0.01]]),
)


def quadrature(mixture, x, alpha, sigma, member=None):
    """E[x0 | x], E[eps | x] and p(x) by a sum over x0 on a fine grid of [-4, 4]^D. x: [D]."""
    dims = mixture.means.shape[1]
    axis = np.linspace(-4, 4, 8001 if dims == 1 else 401)
    x0 = np.stack(np.meshgrid(*[axis] * dims, indexing='ij'), -1).reshape(-1, dims)
    weights = mixture.weights if member is None else mixture.weights * member / (mixture.weights @ member)
    prior = sum(w * norm.pdf(x0, m, np.sqrt(v)).prod(-1) for w, m, v in zip(weights, mixture.means, mixture.variances))
    joint = prior * norm.pdf(x, alpha * x0, sigma).prod(-1)
    total = joint.sum()
    mean = (joint[:, None] * x0).sum(0) / total
    return mean, (x - alpha * mean) / sigma, total * (axis[1] - axis[0]) ** dims


@pytest.mark.parametrize(('alpha', 'sigma'), LEVELS)
@pytest.mark.parametrize('mixture', [ONE, oracles.gmm2d()], ids=['1d', '2d'])
def test_posterior_by_quadrature(mixture, alpha, sigma):
    rng = np.random.default_rng(0)
    x = alpha * mixture.means[:3] + np.hypot(sigma, 0.2 * alpha) * rng.standard_normal((3, mixture.means.shape[1]))
    guess = mixture.posterior(x, alpha, sigma)
    log_p, score = mixture.log_density(x, alpha, sigma), mixture.score(x, alpha, sigma)
    for i in range(3):
        x0, eps, density = quadrature(mixture, x[i], alpha, sigma)
        np.testing.assert_allclose(guess.x0[i], x0, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(guess.eps[i], eps, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.exp(log_p[i]), density, rtol=1e-6)
        np.testing.assert_allclose(score[i], -eps / sigma, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('mixture', [oracles.gmm2d(), oracles.gmm64()], ids=['gmm2d', 'gmm64'])
def test_score_is_the_gradient_of_the_log_density(mixture):
    x = np.random.default_rng(1).standard_normal((4, mixture.means.shape[1]))
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(lambda x: mixture.log_density(x, 0.7, 0.4).sum()))(jnp.asarray(x))
    np.testing.assert_allclose(mixture.score(x, 0.7, 0.4), slope, rtol=1e-9, atol=1e-11)


def test_the_estimate_adds_up_at_both_ends(schedule):
    """x = alpha x0 + sigma eps, finite; at t = 0, x itself and at alpha = 0 the data's mean."""
    mixture, x = oracles.gmm2d(), np.random.default_rng(2).standard_normal((5, 2))
    for t in (np.float64(0), np.float64(1e-4), np.float64(0.4), np.float64(1)):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        guess = mixture.posterior(x, alpha, sigma)
        np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, x, atol=1e-9)
    np.testing.assert_allclose(mixture.posterior(x, 1.0, 0.0).x0, x, atol=1e-12)
    np.testing.assert_allclose(mixture.posterior(x, 0.0, 1.0).x0, np.tile(mixture.mean, (5, 1)), atol=1e-12)


def test_one_level_for_all_or_one_each():
    mixture, x = oracles.gmm2d(), np.random.default_rng(3).standard_normal((4, 2))
    alpha, sigma = np.linspace(0.9, 0.2, 4), np.linspace(0.1, 1, 4)
    each = mixture.posterior(x, alpha, sigma)
    for i in range(4):
        alone = mixture.posterior(x[i : i + 1], alpha[i], sigma[i])
        np.testing.assert_allclose(each.x0[i], alone.x0[0])
        np.testing.assert_allclose(each.eps[i], alone.eps[0])


def test_a_condition_restricts_to_its_class():
    mixture, x = oracles.gmm2d(), np.random.default_rng(4).standard_normal((4, 2))
    cond = np.array([2, 0, -1, 3])
    guess, log_p = mixture.posterior(x, 0.8, 0.5, cond), mixture.log_density(x, 0.8, 0.5, cond)
    for i, c in enumerate(cond):
        member = np.ones(8) if c < 0 else (mixture.classes == c).astype(float)
        x0, _, density = quadrature(mixture, x[i], 0.8, 0.5, member)
        np.testing.assert_allclose(guess.x0[i], x0, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(np.exp(log_p[i]), density, rtol=1e-6)


@pytest.mark.parametrize('ends', [(1.0, 0.0), (0.8, 0.1), (0.1, 0.9)])
def test_flow_of_one_gaussian(schedule, ends):
    """x_s = alpha_s mu + sqrt(d_s / d_t) (x_t - alpha_t mu), d = alpha^2 v + sigma^2."""
    mean, variance = np.array([0.5, -1.0]), np.array([0.3, 0.02])
    gaussian = GaussianMixture(weights=np.ones(1), means=mean[None], variances=variance[None])
    (a_t, s_t), (a_s, s_s) = ((schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t))) for t in ends)
    x = a_t * mean + s_t * np.random.default_rng(5).standard_normal((3, 2))
    ratio = np.sqrt((a_s**2 * variance + s_s**2) / (a_t**2 * variance + s_t**2))
    flowed = gaussian.flow(schedule, x, *ends)
    np.testing.assert_allclose(flowed, a_s * mean + ratio * (x - a_t * mean), rtol=1e-7, atol=1e-8)


def test_flow_there_and_back():
    mixture = oracles.gmm2d()
    x = np.random.default_rng(6).standard_normal((4, 2))
    back = mixture.flow(schedules.Cosine(), mixture.flow(schedules.Cosine(), x, 0.9, 0.2), 0.2, 0.9)
    np.testing.assert_allclose(back, x, atol=1e-7)


@pytest.mark.parametrize('mixture', [oracles.gmm2d(), oracles.gmm64()], ids=['gmm2d', 'gmm64'])
def test_samples_have_the_moments(mixture):
    """4,000 samples: mean, covariance and the components' shares within 5 standard errors."""
    num = 4000
    x, component = map(np.asarray, mixture.sample(jax.random.key(0), num))
    centred = x - mixture.mean
    assert (np.abs(centred.mean(0)) < 5 * x.std(0) / np.sqrt(num)).all()
    products = np.einsum('ni,nj->nij', centred, centred)
    assert (np.abs(products.mean(0) - mixture.covariance) < 5 * products.std(0) / np.sqrt(num)).all()
    share = np.bincount(component, minlength=len(mixture.weights)) / num
    assert (np.abs(share - mixture.weights) < 5 * np.sqrt(mixture.weights / num)).all()


def test_numpy_and_jax_agree():
    mixture, x = oracles.gmm64(), np.random.default_rng(7).standard_normal((4, 64)).astype(np.float32)
    exact = mixture.posterior(x.astype(np.float64), 0.9, 0.3)
    rounded = jax.jit(lambda x: mixture.posterior(x, 0.9, 0.3))(x)
    np.testing.assert_allclose(rounded.x0, exact.x0, atol=1e-4)
    np.testing.assert_allclose(rounded.eps, exact.eps, rtol=1e-3, atol=1e-4)
