"""Stochastic solvers in distribution: a Gaussian's moments carried through the plan by hand, and the exact mean and
covariance of the data reached, within stated confidence intervals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, schedules, solvers
from diffjax.core.oracles import GaussianMixture
from diffjax.core.sampling import pad, sample, sample_keys, starting_noise

NUM = 4096
ERRORS = 4.5  # standard errors: one test in 150,000 fails by chance, and the seed is fixed
MEAN, VARIANCE = np.array([0.6, -0.4]), np.array([0.5, 0.04])
GAUSSIAN = GaussianMixture(weights=np.ones(1), means=MEAN[None], variances=VARIANCE[None])


def sampler(mixture, schedule):
    """One compiled program for every plan of up to 1000 rows."""

    @jax.jit
    def run(plan, keys):
        x = starting_noise(plan, keys, (2,))
        return sample(mixture.denoiser(schedule), plan, x, None, keys)[0]

    return lambda plan: np.asarray(run(pad(plan, 1000, 1, 1), sample_keys(jax.random.key(11), NUM)), np.float64)


@pytest.fixture(scope='module')
def gaussian_samples():
    return sampler(GAUSSIAN, schedules.Linear())


def carried(plan, schedule):
    """Mean and variance after a plan of one remembered estimate and one draw, for Gaussian data. [2], [2]."""
    mean, var = np.zeros(2), np.full(2, plan.start[1] ** 2)
    for t, (p, q), (of_x, of_anchor, of_h, of_z) in zip(plan.t, plan.remember, plan.to_x):
        assert of_anchor == 0
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d = alpha**2 * VARIANCE + sigma**2
        slope = p * alpha * VARIANCE / d + q * sigma / d  # x0 and eps are affine in x
        shift = p * (MEAN - alpha**2 * VARIANCE * MEAN / d) - q * sigma * alpha * MEAN / d
        factor = of_x + of_h * slope
        mean, var = factor * mean + of_h * shift, factor**2 * var + of_z**2
    return mean, var


def check_moments(x, mean, covariance):
    """Sample mean and covariance within ERRORS standard errors, the covariance's from the products' own spread."""
    assert np.isfinite(x).all()
    centred = x - mean
    assert (np.abs(centred.mean(0)) < ERRORS * x.std(0) / np.sqrt(len(x))).all()
    products = np.einsum('ni,nj->nij', centred, centred)
    assert (np.abs(products.mean(0) - covariance) < ERRORS * products.std(0) / np.sqrt(len(x))).all()


@pytest.mark.parametrize(
    ('make', 'options'),
    [
        (solvers.ddpm, {'variance': 'small'}),
        (solvers.ddpm, {'variance': 'large'}),
        (solvers.ddim, {'eta': 0.6}),
        (solvers.ddim, {'eta': 1.0}),
    ],
)
def test_moments_are_carried_exactly(gaussian_samples, make, options):
    """At 12 coarse steps, where every method is biased in its own way, the samples have the predicted moments."""
    linear = schedules.Linear()
    plan = make(linear, np.linspace(1, 0, 13), **options)
    mean, var = carried(plan, linear)
    check_moments(gaussian_samples(plan), mean, np.diag(var))
    assert (np.abs(var / VARIANCE - 1) > 0.02).any()  # coarse enough to tell methods apart


@pytest.mark.parametrize(('variance', 'bias'), [('small', 0.04), ('large', 0.02)])
def test_ddpm_reaches_the_gaussian(gaussian_samples, variance, bias):
    """1000 steps: by hand the moments are within the chain's small bias of the data's, and the samples' confidence
    interval holds the data's.
    """
    linear = schedules.Linear()
    plan = solvers.ddpm(linear, np.linspace(1, 0, 1001), variance=variance)
    mean, var = carried(plan, linear)
    np.testing.assert_allclose(mean, MEAN, atol=5e-3)
    np.testing.assert_allclose(var, VARIANCE, rtol=bias)
    check_moments(gaussian_samples(plan), MEAN, np.diag(VARIANCE))


def test_steps_converge_to_the_data():
    """The bias in distribution falls with order 1 or better, by hand, on the cosine from alpha = 0 to sigma = 0."""
    cosine = schedules.Cosine()
    for variance in ('small', 'large'):
        bias = []
        for num_steps in (100, 400, 1600):
            mean, var = carried(solvers.ddpm(cosine, np.linspace(1, 0, num_steps + 1), variance=variance), cosine)
            bias.append(np.abs(mean - MEAN).max() + np.abs(var - VARIANCE).max())
        assert bias[0] > 2.5 * bias[1] > 6 * bias[2]


def test_ddpm_reaches_the_mixture():
    """Eight modes, 1000 steps: exact mean and covariance, and every mode's share, within 4.5 standard errors."""
    mixture, linear = oracles.gmm2d(), schedules.Linear()
    x = sampler(mixture, linear)(solvers.ddpm(linear, np.linspace(1, 0, 1001)))
    check_moments(x, mixture.mean, mixture.covariance)
    nearest = np.argmin(((x[:, None] - mixture.means) ** 2).sum(-1), 1)
    share = np.bincount(nearest, minlength=8) / NUM
    assert (np.abs(share - mixture.weights) < ERRORS * np.sqrt(mixture.weights / NUM)).all()
    assert float(jnp.mean(mixture.log_density(jnp.asarray(x)))) == pytest.approx(
        float(jnp.mean(mixture.log_density(mixture.sample(jax.random.key(1), NUM)[0]))), abs=0.1
    )
