"""The variational bound and the hybrid loss, in the letters of DDPM's betas and with SciPy's normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffjax.core import parameterizations, schedules, times, weights
from diffjax.core.losses import Loss, binned_nll, bound_term, prior_term, split_variance
from diffjax.core.types import Estimate

BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
LINEAR = schedules.Linear()


@jax.jit
def bound(s, t, x0, guess):
    return bound_term(LINEAR, s, t, x0, guess, half_bin=1 / 255)


@jax.jit
def nats_of_a_bin(x, mean, std):
    return binned_nll(x, mean, std, 1 / 255)


def gaussian_kl(mean1, var1, mean2, var2):
    """KL(N1 || N2) in bits."""
    return 0.5 * (np.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1) / np.log(2)


def ddpm_terms(x0, guess, fraction, x, i):
    """KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i)), i from 0: both Gaussians written in betas."""
    abar, before, beta = ABAR[i], ABAR[i - 1], BETAS[i]
    lower = beta * (1 - before) / (1 - abar)
    variance = np.exp(fraction * np.log(beta) + (1 - fraction) * np.log(lower))

    def mean(start):
        return np.sqrt(before) * beta / (1 - abar) * start + np.sqrt(1 - beta) * (1 - before) / (1 - abar) * x

    return gaussian_kl(mean(x0), lower, mean(guess), variance)


@pytest.mark.parametrize('i', [1, 2, 40, 500, 999])
def test_bound_is_the_kl_of_two_gaussians(i):
    x0, guess, x = np.random.default_rng(i).standard_normal((3, 4, 5))
    fraction = np.random.default_rng(0).uniform(0, 1, (4, 5))
    with jax.enable_x64(True):
        s, t = jnp.full(4, i / 1000), jnp.full(4, (i + 1) / 1000)
        learned = bound(s, t, x0, Estimate(guess, x, fraction))
        fixed = bound(s, t, x0, Estimate(guess, x))
    np.testing.assert_allclose(learned, ddpm_terms(x0, guess, fraction, x, i).mean(1), rtol=1e-6)
    np.testing.assert_allclose(fixed, ddpm_terms(x0, guess, 0.0, x, i).mean(1), rtol=1e-6)


def test_the_ends_of_the_learned_variance():
    """Output -1 is beta~, output 1 is beta: the bound then equals that of the fixed Gaussian."""
    i, x0, guess, x = 300, *np.random.default_rng(1).standard_normal((3, 4, 5))
    with jax.enable_x64(True):
        for raw, fraction in ((-1.0, 0.0), (1.0, 1.0), (0.0, 0.5)):
            output = jnp.concatenate([jnp.asarray(guess), jnp.full((4, 5), raw)], -1)
            y, variance = split_variance(output)
            np.testing.assert_array_equal(y, guess)
            np.testing.assert_allclose(variance, fraction)
            s, t = jnp.full(4, i / 1000), jnp.full(4, (i + 1) / 1000)
            value = bound(s, t, x0, Estimate(y, x, variance))
            np.testing.assert_allclose(value, ddpm_terms(x0, guess, fraction, x, i).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    'fraction, variance', [(None, BETAS[1] * (1 - ABAR[0]) / (1 - ABAR[1])), (1.0, BETAS[0])], ids=['lower', 'upper']
)
def test_the_first_term_is_the_likelihood_of_a_bin(fraction, variance):
    """s = 0: a discretised likelihood; variances from beta~ of the step above to beta of this one (IDDPM)."""
    x0 = (2 * np.array([[0, 3, 128, 254, 255]]) / 255 - 1).repeat(4, 0)
    guess = x0 + np.random.default_rng(2).normal(0, 0.01, x0.shape)
    with jax.enable_x64(True):
        zero, t = jnp.zeros(4), jnp.full(4, 1e-3)
        learned = None if fraction is None else jnp.full_like(x0, fraction)
        value = bound(zero, t, x0, Estimate(guess, x0, learned))
    std = np.sqrt(variance)
    high = np.where(x0 == 1, np.inf, x0 + 1 / 255)
    low = np.where(x0 == -1, -np.inf, x0 - 1 / 255)
    expected = -np.log2(norm.cdf(high, guess, std) - norm.cdf(low, guess, std))
    np.testing.assert_allclose(value, expected.mean(1), rtol=1e-6)


def test_bins_against_scipy():
    """Inside, at both edges, and far out in either tail, where SciPy's survival function keeps the digits."""
    half = 1 / 255
    x = np.array([-1, 1, 0.0, 2 / 255, 0.5, -0.5, 0.3, 0.3])
    mean = np.array([-0.9, 0.95, 0.001, 0.0, 0.45, -0.6, -0.2, 0.9])
    std = np.array([0.1, 0.02, 0.01, 1.0, 0.005, 0.01, 0.05, 0.05])
    low, high = (np.clip(x, -1 + half, 1 - half) + sign * half for sign in (-1, 1))
    low, high = np.where(x == -1, -np.inf, (x - half - mean) / std), np.where(x == 1, np.inf, (x + half - mean) / std)
    left, right = norm.cdf(high) - norm.cdf(low), norm.sf(low) - norm.sf(high)
    expected = -np.log(np.where(low + high > 0, right, left))
    with jax.enable_x64(True):
        np.testing.assert_allclose(nats_of_a_bin(x, mean, std), expected, rtol=1e-7)
    np.testing.assert_allclose(nats_of_a_bin(*map(jnp.float32, (x, mean, std))), expected, rtol=1e-3)
    assert np.exp(-expected[:2]).max() <= 1


def test_all_bins_add_up_to_one():
    pixels = jnp.asarray(2 * np.arange(256) / 255 - 1)
    for mean, std in ((0.1, 0.3), (-0.98, 0.05), (1.4, 0.2)):
        total = jnp.exp(-nats_of_a_bin(pixels, jnp.float32(mean), jnp.float32(std))).sum()
        assert float(total) == pytest.approx(1, abs=2e-3)


def test_bin_gradients_are_finite():
    def value(mean, log_std):
        return nats_of_a_bin(jnp.asarray([-1.0, 1.0, 0.0, 0.9]), mean, jnp.exp(log_std)).sum()

    gradient = jax.jit(jax.grad(value, argnums=(0, 1)))
    for mean in (0.0, 5.0, -5.0):
        slopes = gradient(jnp.full(4, mean), jnp.full(4, -3.0))
        assert all(np.isfinite(s).all() for s in slopes)


def test_the_prior_term(schedule):
    x0 = np.random.default_rng(3).standard_normal((4, 5))
    alpha, sigma = schedule.alpha(np.float64(1)), schedule.sigma(np.float64(1))
    expected = gaussian_kl(alpha * x0, sigma**2, 0.0, sigma**2).mean(1)
    np.testing.assert_allclose(prior_term(schedule, jnp.asarray(x0, jnp.float32)), expected, rtol=1e-5, atol=1e-10)


def hybrid(**options):
    return Loss(
        schedule=LINEAR,
        parameterization=parameterizations.Eps(),
        times=times.Discrete(),
        weight=weights.eps,
        **options,
    )


def test_the_hybrid_loss_stops_the_means_gradient():
    """The first half's gradient is the plain loss's; the second half's is that of the bound alone (FORMULAS)."""
    rng = np.random.default_rng(4)
    x0, eps, y, raw = (jnp.asarray(rng.uniform(-1, 1, (6, 2, 3)), jnp.float32) for _ in range(4))
    t = jnp.asarray([1, 2, 3, 100, 500, 1000]) / 1000

    loss, without = hybrid(bound_scale=0.001), hybrid()

    def total(y, raw):
        return loss.at(lambda x, time: jnp.concatenate([y, raw], -1), x0, t, eps)[0].sum()

    of_y, of_raw = jax.jit(jax.grad(total, argnums=(0, 1)))(y, raw)
    plain = jax.grad(lambda y: without.at(lambda x, time: y, x0, t, eps)[0].sum())(y)
    np.testing.assert_allclose(of_y, plain, rtol=1e-6)
    assert np.isfinite(of_raw).all() and (np.abs(of_raw) > 0).any()

    i = np.array([1, 2, 99, 499, 999])  # the KL terms: d/df, f = (raw + 1) / 2, by differences in betas
    x0, eps, y = (np.asarray(a, np.float64) for a in (x0, eps, y))
    x = np.sqrt(ABAR[i])[:, None, None] * x0[1:] + np.sqrt(1 - ABAR[i])[:, None, None] * eps[1:]
    guess = (x - np.sqrt(1 - ABAR[i])[:, None, None] * y[1:]) / np.sqrt(ABAR[i])[:, None, None]

    def bits(shift):
        fraction = 0.5 * (np.asarray(raw, np.float64)[1:] + 1 + shift)
        rows = [ddpm_terms(x0[1 + k], guess[k], fraction[k], x[k], step) for k, step in enumerate(i)]
        return np.stack(rows)

    slope = 0.001 * 1000 * (bits(1e-4) - bits(-1e-4)) / 2e-4 / 6
    np.testing.assert_allclose(of_raw[1:], slope, rtol=2e-2, atol=1e-4)


def test_the_hybrid_loss_adds_the_bound():
    x0 = jnp.asarray(np.random.default_rng(5).uniform(-1, 1, (4, 2, 3)), jnp.float32)
    t = jnp.asarray([1, 2, 400, 1000]) / 1000
    output = jnp.concatenate([x0, 0.2 * x0], -1)
    loss = hybrid(bound_scale=0.002)
    value, metrics = jax.jit(lambda x0, t: loss.at(lambda x, time: output, x0, t, 0.5 * x0))(x0, t)
    np.testing.assert_allclose(value, metrics['mse'] + 0.002 * 1000 * metrics['bound'], rtol=1e-5)


def test_a_learned_variance_needs_discrete_times():
    with pytest.raises(ValueError, match='needs discrete times, got Uniform'):
        Loss(
            schedule=LINEAR,
            parameterization=parameterizations.Eps(),
            times=times.Uniform(low=1e-3),
            weight=weights.eps,
            bound_scale=0.001,
        )


def true_fractions(var):
    """The fraction at which each reverse step has the variance of q(x_s | x_t), for Gaussian data. [1000]."""
    left = var * (1 - ABAR) / (ABAR * var + 1 - ABAR)  # the variance of x0 given x_t
    lower = BETAS[1:] * (1 - ABAR[:-1]) / (1 - ABAR[1:])
    exact = lower + (np.sqrt(ABAR[:-1]) * BETAS[1:] / (1 - ABAR[1:])) ** 2 * left[1:]
    lower, exact = np.append(lower[0], lower), np.append(left[0], exact)  # the last draw has x0's own variance
    upper = np.append(BETAS[1], BETAS[1:])
    return np.log(exact / lower) / np.log(upper / lower)


def test_the_bound_is_the_likelihood():
    """Data N(0.1, 0.3^2) in 8-bit bins: all 1000 terms and the prior, with the exact mean and the exact variance, are
    -log2 P(bin) at every x0 to 0.5 %; with the lower variance they are more. Expectations over eps are Gauss-Hermite
    sums: a KL is quadratic in eps, so that they are exact.
    """
    mean, var, half = 0.1, 0.3**2, 1 / 255
    x0 = 2 * np.array([60, 127, 140, 200]) / 255 - 1
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(16)
    node_weights = node_weights / node_weights.sum()
    t = (np.arange(1000) + 1) / 1000
    start, time, eps = np.stack(np.meshgrid(x0, t, nodes, indexing='ij')).reshape(3, -1, 1)
    alpha, sigma = LINEAR.alpha(time), LINEAR.sigma(time)
    x = alpha * start + sigma * eps
    guess = mean + alpha * var * (x - alpha * mean) / (alpha**2 * var + sigma**2)
    fraction = np.broadcast_to(true_fractions(var)[:, None], (4, 1000, 16)).reshape(-1, 1)

    def bits(fraction):
        s = np.round(1000 * time[:, 0] - 1) / 1000
        terms = bound(s, time[:, 0], start, Estimate(guess, eps, fraction))
        prior = prior_term(LINEAR, jnp.asarray(x0[:, None]))
        return (np.asarray(terms).reshape(4, 1000, 16) @ node_weights).sum(1) + np.asarray(prior)

    exact = -np.log2(norm.cdf(x0 + half, mean, 0.3) - norm.cdf(x0 - half, mean, 0.3))
    with jax.enable_x64(True):
        np.testing.assert_allclose(bits(fraction), exact, rtol=5e-3)
        assert (bits(0 * fraction) > exact + 0.1).all()
