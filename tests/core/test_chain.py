"""One-step kernels and posteriors against composition, DDPM's betas, and Gaussian conditioning by matrix algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import chain, schedules

BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
STEP = np.array([2, 3, 10, 500, 999, 1000])  # i + 1, so that abar_s = ABAR[STEP - 2]


def test_kernels_compose_to_the_closed_form(schedule):
    times = np.sort(np.append(np.random.default_rng(0).uniform(0, 1, 30), [0.0, 1.0]))
    factor, variance = 1.0, 0.0
    for s, t in zip(times[:-1], times[1:]):
        f, v = chain.kernel(schedule, s, t)
        factor, variance = factor * f, f**2 * variance + v
        assert v > 0
        np.testing.assert_allclose(factor, schedule.alpha(t), rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(variance, schedule.sigma(t) ** 2, rtol=1e-10)


def test_the_linear_kernels_are_ddpms():
    factor, variance = chain.kernel(schedules.Linear(), (STEP - 1) / 1000, STEP / 1000)
    np.testing.assert_allclose(variance, BETAS[STEP - 1], rtol=1e-8)
    np.testing.assert_allclose(factor, np.sqrt(1 - BETAS[STEP - 1]), rtol=1e-8)


def test_the_linear_posterior_is_ddpms():
    """FORMULAS: mean and variance of q(x_s | x_t, x0) in betas."""
    of_x, of_x0, variance = chain.posterior(schedules.Linear(), (STEP - 1) / 1000, STEP / 1000)
    beta, abar_t, abar_s = BETAS[STEP - 1], ABAR[STEP - 1], ABAR[STEP - 2]
    np.testing.assert_allclose(of_x, np.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t), rtol=1e-8)
    np.testing.assert_allclose(of_x0, np.sqrt(abar_s) * beta / (1 - abar_t), rtol=1e-8)
    np.testing.assert_allclose(variance, beta * (1 - abar_s) / (1 - abar_t), rtol=1e-8)
    span = chain.log_variance_range(schedules.Linear(), (STEP - 1) / 1000, STEP / 1000)
    np.testing.assert_allclose(span, np.log(beta / variance), rtol=1e-7)


@pytest.mark.parametrize(('s', 't'), [(0.3, 0.7), (0.01, 0.9), (0.5, 0.501), (0.9, 1.0), (0.001, 0.002)])
def test_posterior_is_gaussian_conditioning(schedule, s, t):
    """(x_s, x_t) given x0 is one Gaussian; conditioned on x_t by its 2 x 2 covariance, which we build from noise."""
    alpha_s, alpha_t, sigma_s, sigma_t = (f(np.float64(u)) for f in (schedule.alpha, schedule.sigma) for u in (s, t))
    fresh = np.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
    mix = np.array([[sigma_s, 0], [alpha_t / alpha_s * sigma_s, fresh]])  # (x_s, x_t) = alpha x0 + mix (z1, z2)
    cov = mix @ mix.T
    gain = np.linalg.solve(cov[1:, 1:], cov[1:, :1])[0, 0]
    of_x, of_x0, variance = chain.posterior(schedule, np.float64(s), np.float64(t))
    np.testing.assert_allclose(of_x, gain, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(of_x0, alpha_s - gain * alpha_t, rtol=1e-6)
    np.testing.assert_allclose(variance, cov[0, 0] - gain * cov[0, 1], rtol=1e-6)


def test_posterior_at_both_ends(schedule):
    """At s = 0 it is x0 itself, with no variance; where alpha_t = 0, q(x_s | x0)."""
    np.testing.assert_allclose(chain.posterior(schedule, np.float64(0), np.float64(0.5)), [0, 1, 0], atol=1e-15)
    whole = chain.posterior(schedule, np.float64(0), np.float64(1))
    np.testing.assert_allclose(whole, [0, 1, 0], atol=1e-15)
    assert chain.log_variance_range(schedule, np.float64(0), np.float64(0.5)) == np.inf
    if schedule.alpha(np.float64(1)) == 0:
        s = np.float64(0.6)
        last = chain.posterior(schedule, s, np.float64(1))
        np.testing.assert_allclose(last, [0, schedule.alpha(s), schedule.sigma(s) ** 2], rtol=1e-12)


def test_posterior_in_float32(schedule):
    """What the bound's loss uses: steps of a thousandth in float32, one by one."""
    t = np.arange(1, 1001, dtype=np.float32) / np.float32(1000)
    s = np.arange(0, 1000, dtype=np.float32) / np.float32(1000)
    rounded = jax.jit(lambda s, t: chain.posterior(schedule, s, t))(jnp.asarray(s), jnp.asarray(t))
    exact = chain.posterior(schedule, s.astype(np.float64), t.astype(np.float64))
    for value, truth in zip(rounded, exact):
        np.testing.assert_allclose(value, truth, rtol=2e-3, atol=1e-7)
