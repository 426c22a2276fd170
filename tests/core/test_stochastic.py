"""Stochastic solvers in distribution: a Gaussian's moments carried through the plan by hand, the exact mean and
covariance of the data reached within stated confidence intervals, and a mixture's distribution, sliced.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, oracles, schedules, solvers
from diffjax.core.denoisers import stateless
from diffjax.core.oracles import GaussianMixture
from diffjax.core.sampling import pad, sample, sample_keys, starting_noise
from diffjax.core.types import Estimate

NUM = 4096
ERRORS = 4.5  # standard errors: one test in 150,000 fails by chance, and the seed is fixed
MEAN, VARIANCE = np.array([0.6, -0.4]), np.array([0.5, 0.04])
GAUSSIAN = GaussianMixture(weights=np.ones(1), means=MEAN[None], variances=VARIANCE[None])
LINEAR = schedules.Linear()
DISTILLED = 'consistency', 'lcm', 'tcd'


def sampler(denoiser, num=NUM, rows=1000, remembered=5, noises=2):
    """One compiled program for every plan of up to `rows` rows."""

    @jax.jit
    def run(plan, keys):
        x = starting_noise(plan, keys, (2,))
        return sample(denoiser, plan, x, None, keys)[0]

    keys = sample_keys(jax.random.key(11), num)
    return lambda plan: np.asarray(run(pad(plan, rows, remembered, noises), keys), np.float64)


@pytest.fixture(scope='module')
def gaussian_samples():
    return sampler(GAUSSIAN.denoiser(LINEAR))


def carried(plan, schedule, estimate=None):
    """Mean and variance in each dimension after any plan, for Gaussian data, by hand. [2], [2].

    With an estimate that is affine in x, a row maps s = (x, anchor, K remembered) to A s + b + noise: the mean goes to
    A mean + b and the covariance to A cov A^T + C.

    estimate: (alpha, sigma) -> the slope and the shift of x0 in x; of the exact denoiser by default.
    """
    size = 2 + plan.num_remembered
    mean, cov = np.zeros((2, size)), np.zeros((2, size, size))
    cov[:, :2, :2] = plan.start[1] ** 2  # x and the anchor are the same noise at first
    for m in range(len(plan.t)):
        alpha, sigma = schedule.alpha(plan.t[m]), schedule.sigma(plan.t[m])
        d = alpha**2 * VARIANCE + sigma**2
        slope, shift = alpha * VARIANCE / d, MEAN - alpha**2 * VARIANCE * MEAN / d
        if estimate:
            slope, shift = estimate(alpha, sigma)
        p, q = plan.remember[m]
        new_slope = p * slope + q * (1 - alpha * slope) / sigma
        new_shift = p * shift - q * alpha * shift / sigma
        table = np.stack([plan.to_x[m], plan.to_anchor[m]])
        now = np.zeros((2, size, size))  # (x, anchor, new estimate, older ones) from s
        now[:, [0, 1], [0, 1]] = 1
        now[:, range(3, size), range(2, size - 1)] = 1
        now[:, 2, 0] = new_slope
        step = np.eye(size)
        step[:2] = table[:, :size]
        a = step @ now
        b = step[:, 2] * new_shift[:, None]
        noise = np.zeros((size, plan.num_noises))
        noise[:2] = table[:, size:]
        mean = np.einsum('dij,dj->di', a, mean) + b
        cov = a @ cov @ a.transpose(0, 2, 1) + noise @ noise.T
    return mean[:, 0], cov[:, 0, 0]


def check_moments(x, mean, covariance):
    """Sample mean and covariance within ERRORS standard errors, the covariance's from the products' own spread."""
    assert np.isfinite(x).all()
    centred = x - mean
    assert (np.abs(centred.mean(0)) < ERRORS * x.std(0) / np.sqrt(len(x))).all()
    products = np.einsum('ni,nj->nij', centred, centred)
    assert (np.abs(products.mean(0) - covariance) < ERRORS * products.std(0) / np.sqrt(len(x))).all()


def only_stochastic(solver):
    if not solver.stochastic:
        pytest.skip('deterministic')


def test_moments_are_carried_exactly(gaussian_samples, solver):
    """At 12 coarse steps, where every method is biased in its own way, the samples have the predicted moments."""
    only_stochastic(solver)
    plan = solver.make(LINEAR, np.append(LINEAR.t_of_logsnr(np.linspace(-9, 5, 12)), 0.0))
    mean, var = carried(plan, LINEAR)
    check_moments(gaussian_samples(plan), mean, np.diag(var))
    assert (np.abs(var / VARIANCE - 1) > 5e-3).any()  # coarse enough to tell methods apart


def test_steps_converge_to_the_data(solver):
    """The bias in distribution falls with order 1 or better, by hand, from alpha = 0 to sigma = 0."""
    only_stochastic(solver)
    if solver.name in DISTILLED:
        pytest.skip('made for a model that jumps to the data: see below')
    cosine, bias, more = schedules.Cosine(), [], {}
    for num_steps in (50, 200, 800):
        if solver.name == 'edm':  # by default it adds a little too much noise
            more = {'noise': 1.0}
        if solver.name == 'restart':  # its own steps must grow too
            more = {'num_steps': num_steps}
        mean, var = carried(solver.make(cosine, grids.softplus(cosine, num_steps), **more), cosine)
        bias.append(np.abs(mean - MEAN).max() + np.abs(var - VARIANCE).max())
    assert bias[0] > 3 * bias[1] > 9 * bias[2], bias
    assert bias[2] < 0.01


@pytest.mark.parametrize(('variance', 'bias'), [('small', 0.04), ('large', 0.02)])
def test_ddpm_reaches_the_gaussian(gaussian_samples, variance, bias):
    """1000 steps: by hand the moments are within the chain's small bias of the data's, and the samples' confidence
    interval holds the data's.
    """
    plan = solvers.ddpm(LINEAR, np.linspace(1, 0, 1001), variance=variance)
    mean, var = carried(plan, LINEAR)
    np.testing.assert_allclose(mean, MEAN, atol=5e-3)
    np.testing.assert_allclose(var, VARIANCE, rtol=bias)
    check_moments(gaussian_samples(plan), MEAN, np.diag(VARIANCE))


def test_ddpm_reaches_the_mixture():
    """Eight modes, 1000 steps: exact mean and covariance, and every mode's share, within 4.5 standard errors."""
    mixture = oracles.gmm2d()
    x = sampler(mixture.denoiser(LINEAR))(solvers.ddpm(LINEAR, np.linspace(1, 0, 1001)))
    check_moments(x, mixture.mean, mixture.covariance)
    nearest = np.argmin(((x[:, None] - mixture.means) ** 2).sum(-1), 1)
    share = np.bincount(nearest, minlength=8) / NUM
    assert (np.abs(share - mixture.weights) < ERRORS * np.sqrt(mixture.weights / NUM)).all()
    assert float(jnp.mean(mixture.log_density(jnp.asarray(x)))) == pytest.approx(
        float(jnp.mean(mixture.log_density(mixture.sample(jax.random.key(1), NUM)[0]))), abs=0.1
    )


def flow_map(alpha, sigma):
    """Where the probability flow of the Gaussian leads from x: to MEAN + sqrt(VARIANCE / d) (x - alpha MEAN)."""
    slope = np.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2))
    return slope, MEAN - slope * alpha * MEAN


@pytest.mark.parametrize('num_steps', [1, 2, 5])
def test_a_consistency_model_is_sampled_exactly(num_steps):
    """With the flow's own map for a model, jumping and noising again keeps the data's moments."""
    cosine = schedules.Cosine()
    plan = solvers.consistency(cosine, np.linspace(1, 0, num_steps + 1))
    mean, var = carried(plan, cosine, flow_map)
    np.testing.assert_allclose(mean, MEAN, atol=1e-12)
    np.testing.assert_allclose(var, VARIANCE, atol=1e-12)

    def jump(x, t, cond):
        alpha, sigma = cosine.alpha(t), cosine.sigma(t)
        slope = jnp.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)).astype(x.dtype)
        x0 = jnp.asarray(MEAN, x.dtype) + slope * (x - alpha * jnp.asarray(MEAN, x.dtype))
        return Estimate(x0, (x - alpha * x0) / sigma)

    check_moments(sampler(stateless(jump), rows=5)(plan), MEAN, np.diag(VARIANCE))


def slices(x):
    """x: [N, 2] seen along 12 directions, each sorted."""
    angle = np.pi * np.arange(12) / 12
    return np.sort(x.astype(np.float32) @ np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32), 0)


def distance(one, other):
    """The sliced 2-Wasserstein distance between two sets of `slices`."""
    return np.sqrt(((one - other) ** 2).mean())


@pytest.fixture(scope='module')
def mixture_samples():
    """(plan) -> 20,000 samples of the 2-D mixture on the cosine schedule, one program."""
    return sampler(oracles.gmm2d().denoiser(schedules.Cosine()), num=20_000, rows=128)


@pytest.fixture(scope='module')
def exact_sets():
    """(slices of six independent sets of 20,000 exact samples, the greatest distance between two of them)."""
    keys = jax.random.split(jax.random.key(3), 6)
    sets = [slices(np.asarray(oracles.gmm2d().sample(key, 20_000)[0])) for key in keys]
    return sets, max(distance(one, other) for one, other in itertools.combinations(sets, 2))


@pytest.mark.parametrize(
    ('make', 'each', 'options'),
    [
        (solvers.ddpm, 1, {}),
        (solvers.dpmpp_2m_sde, 1, {}),
        (solvers.dpmpp_sde, 2, {}),
        (solvers.euler_maruyama, 1, {'diffusion': 'sigma'}),
    ],
)
def test_the_mixture_is_reached(mixture_samples, exact_sets, make, each, options):
    """The sliced Wasserstein distance falls with evaluations (8, 32, 128) to the floor, which is that of two sets of
    exact samples.
    """
    cosine, (sets, floor), found = schedules.Cosine(), exact_sets, []
    for evaluations in (8, 32, 128):
        plan = make(cosine, grids.softplus(cosine, evaluations // each), **options)
        drawn = slices(mixture_samples(plan))
        found.append(np.mean([distance(drawn, exact) for exact in sets]))
    assert found[0] > 1.5 * found[1] and found[1] > 0.9 * found[2], found
    assert found[0] > floor > found[2], (found, floor)
