"""Likelihood and integration against closed forms (mixtures, Gaussians), SciPy's integrator, the probes' own law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from diffjax.core import likelihood, oracles, schedules
from diffjax.core.denoisers import stateless
from diffjax.core.likelihood import (
    Exact,
    Gaussian,
    Rademacher,
    bits_per_dimension,
    integrate,
    log_likelihood,
    normal_prior,
)
from diffjax.core.sampling import sample_keys
from diffjax.core.transforms import zero_init
from diffjax.core.types import Estimate

pytestmark = pytest.mark.usefixtures('fast_compilation')


def draws(mixture, num, seed=0):
    """Points of a mixture, float64."""
    rng = np.random.default_rng(seed)
    which = rng.choice(len(mixture.weights), num, p=mixture.weights)
    return mixture.means[which] + np.sqrt(mixture.variances[which]) * rng.standard_normal((num, mixture.means.shape[1]))


def ends(schedule):
    """(alpha, sigma) at t = 1."""
    return tuple(float(f(np.float64(1))) for f in (schedule.alpha, schedule.sigma))


def run(function, *arrays, x64=True):
    """The function, compiled, on float64 (or float32) arrays; NumPy results."""
    with jax.enable_x64(x64):
        arrays = [
            jnp.asarray(a, (jnp.float64 if x64 else jnp.float32) if a.dtype.kind == 'f' else None) for a in arrays
        ]
        return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


def exactly(mixture, schedule, x, **options):
    """The likelihood under the exact denoiser, from the noised mixture's own density at t = 1."""
    alpha, sigma = ends(schedule)
    options = {'prior': lambda x1: mixture.log_density(x1, alpha, sigma), **options}
    return log_likelihood(mixture.denoiser(schedule), schedule, x, **options)


def test_a_mixture_has_its_own_density_on_every_schedule(schedule):
    """To 1e-7 nats; what is promised is 1e-3."""
    mixture, x = oracles.gmm2d(), draws(oracles.gmm2d(), 6)
    result = run(lambda x: exactly(mixture, schedule, x), x)
    np.testing.assert_allclose(result.log_density, mixture.log_density(x), atol=1e-7)


def test_sixty_four_dimensions(solver_schedule):
    """Scales over two decades: still to 1e-6 nats."""
    mixture, x = oracles.gmm64(), draws(oracles.gmm64(), 4)
    result = run(lambda x: exactly(mixture, solver_schedule, x), x)
    np.testing.assert_allclose(result.log_density, mixture.log_density(x), atol=1e-6)


def test_float32_is_as_good_as_promised():
    mixture, x = oracles.gmm64(), draws(oracles.gmm64(), 4).astype(np.float32)
    result = run(lambda x: exactly(mixture, schedules.VP(), x), x, x64=False)
    assert result.log_density.dtype == result.x1.dtype == np.float32
    np.testing.assert_allclose(result.log_density, mixture.log_density(x.astype(np.float64)), atol=1e-3)


def test_the_prior_at_the_noise_end():
    """The normal density of SciPy; the noised data's own where alpha(1) = 0; nearer to it with the data's moments."""
    mixture, x1 = oracles.gmm2d(), 3 * np.random.default_rng(1).standard_normal((5, 2))
    moments = mixture.mean, np.diag(mixture.covariance)
    with jax.enable_x64(True):
        for schedule in (schedules.VE(), schedules.ScaledLinear(), schedules.Flow()):
            alpha, sigma = ends(schedule)
            own = mixture.log_density(x1, alpha, sigma)
            standard, closer = (
                prior(jnp.asarray(x1)) for prior in (normal_prior(schedule), normal_prior(schedule, *moments))
            )
            np.testing.assert_allclose(standard, norm.logpdf(x1, 0, sigma).sum(-1), rtol=1e-12)
            spread = np.sqrt(alpha**2 * moments[1] + sigma**2)
            np.testing.assert_allclose(closer, norm.logpdf(x1, alpha * moments[0], spread).sum(-1), rtol=1e-12)
            if alpha:
                assert np.abs(closer - own).max() < 0.3 * np.abs(standard - own).max()
            else:
                np.testing.assert_allclose(standard, own, rtol=1e-12)


def test_the_default_prior_is_the_standard_one():
    """On VP, where that is not what the noised data are, log p moves by the ratio of the two."""
    mixture, schedule, x = oracles.gmm2d(), schedules.VP(), draws(oracles.gmm2d(), 4)
    result = run(lambda x: log_likelihood(mixture.denoiser(schedule), schedule, x), x)
    alpha, sigma = ends(schedule)
    shift = norm.logpdf(result.x1, 0, sigma).sum(-1) - mixture.log_density(result.x1, alpha, sigma)
    np.testing.assert_allclose(result.log_density, mixture.log_density(x) + shift, atol=1e-7)
    assert np.abs(shift).max() > 1e-4


def test_a_positive_first_time_blurs():
    """The density of x_t / alpha: components as wide as v + (sigma / alpha)^2."""
    t_min = 0.15
    mixture, schedule, x = oracles.gmm2d(), schedules.Cosine(), draws(oracles.gmm2d(), 4)
    result = run(lambda x: exactly(mixture, schedule, x, t_min=t_min), x)
    blurred = oracles.GaussianMixture(
        weights=mixture.weights, means=mixture.means, variances=mixture.variances + np.tan(0.5 * np.pi * t_min) ** 2
    )
    np.testing.assert_allclose(result.log_density, blurred.log_density(x), atol=1e-7)


def test_conditions_images_and_the_rest_of_the_batch():
    """log p(x | class) of x as [8, 8, 1] images; each sample's result is what it is alone, to the last evaluation."""
    mixture, schedule, x = oracles.gmm64(), schedules.Flow(), draws(oracles.gmm64(), 3, seed=2)
    labels = np.array([7, -1, 2])
    base = mixture.denoiser(schedule)

    def pictures(x, t, cond):
        guess, _ = base.apply((), x.reshape(-1, 64), t, cond)
        return Estimate(guess.x0.reshape(x.shape), guess.eps.reshape(x.shape))

    def measure(x, labels):
        return log_likelihood(stateless(pictures), schedule, x, labels)

    whole = run(measure, x.reshape(3, 8, 8, 1), labels)
    np.testing.assert_allclose(whole.log_density, mixture.log_density(x, cond=labels), atol=1e-6)
    assert whole.x1.shape == (3, 8, 8, 1)
    alone = run(measure, x[1:2].reshape(1, 8, 8, 1), labels[1:2])
    np.testing.assert_allclose(alone.log_density, whole.log_density[1:2], atol=1e-9)
    np.testing.assert_array_equal(alone.num_evaluations, whole.num_evaluations[1:2])


# One Gaussian with correlated dimensions: everything is linear, and each probe's own answer is known.

BASIS = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
SPREAD = np.array([2.0, 0.7, 0.2, 0.05])  # the covariance's eigenvalues


def gaussian_denoiser(schedule):
    """E[x0 | x] = alpha C (alpha^2 C + sigma^2)^-1 x and E[eps | x] = sigma (alpha^2 C + sigma^2)^-1 x."""

    def denoise(x, t, cond):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        along = x @ BASIS / (alpha**2 * SPREAD + sigma**2)
        return Estimate((alpha * SPREAD * along) @ BASIS.T, sigma * along @ BASIS.T)

    return stateless(denoise)


@pytest.mark.parametrize('trace', [Rademacher(), Rademacher(num_probes=3), Gaussian(num_probes=2), Exact()])
def test_each_probe_has_the_answer_of_its_own(trace):
    """The flow scales the covariance's axes by sqrt(d1 / d0): the divergence along it is v' log(d1 / d0) / 2 v."""
    schedule, x, keys = schedules.Cosine(), np.random.default_rng(4).standard_normal((6, 4)), jax.random.key(5)

    def measure(x):
        keys_ = sample_keys(keys, 6)
        directions = jax.vmap(lambda key: trace.directions(key, (4,), x.dtype))(keys_)
        return log_likelihood(gaussian_denoiser(schedule), schedule, x, trace=trace, keys=keys_), directions

    result, v = run(measure, x)
    x1 = (x @ BASIS / np.sqrt(SPREAD)) @ BASIS.T
    np.testing.assert_allclose(result.x1, x1, atol=1e-6)
    growth = BASIS @ np.diag(-0.5 * np.log(SPREAD)) @ BASIS.T  # d = cos^2 C + sin^2, from C at phi = 0 to 1 at pi / 2
    gain = np.einsum('bki,ij,bkj->b', v, growth, v)
    np.testing.assert_allclose(result.log_density, norm.logpdf(x1).sum(-1) + gain, atol=1e-6)
    if isinstance(trace, Exact):
        exact = multivariate_normal.logpdf(x, cov=BASIS @ np.diag(SPREAD) @ BASIS.T)
        np.testing.assert_allclose(result.log_density, exact, atol=1e-6)
    else:
        assert len(np.unique(gain)) > 2  # each sample has probes of its own


@pytest.mark.parametrize('trace', [Rademacher(), Rademacher(num_probes=4), Gaussian(), Gaussian(num_probes=4)])
def test_probes_are_unbiased_with_the_variance_of_theory(trace):
    """E[v' J v] = tr J; for one probe the variance is 2 sum J_ij^2, for signs without the diagonal."""
    j, num = np.array([[2.0, 0.5, -1.0], [0.5, -1.0, 0.3], [-1.0, 0.3, 0.7]]), 4000
    keys = jax.random.split(jax.random.key(0), num)
    v = np.asarray(jax.vmap(lambda key: trace.directions(key, (3,), jnp.float32))(keys), np.float64)
    assert v.shape == (num, trace.num_directions(3), 3) and trace.num_directions(3) == trace.num_probes
    estimates = np.einsum('nki,ij,nkj->n', v, j, v)
    off = j if isinstance(trace, Gaussian) else j - np.diag(np.diag(j))
    variance = 2 * (off**2).sum() / trace.num_probes
    assert abs(estimates.mean() - np.trace(j)) < 5 * np.sqrt(variance / num)
    np.testing.assert_allclose(estimates.var(), variance, rtol=0.2)
    if not isinstance(trace, Gaussian):
        np.testing.assert_allclose(np.abs(v), trace.num_probes**-0.5, rtol=1e-6)


# Integration alone.


@pytest.mark.parametrize(('t', 's'), [(0.0, 1.0), (1.0, 0.0), (0.8, 0.3)])
def test_integration_is_the_exact_flow(t, s):
    """SciPy's integrator of the same mixture, in both directions, to ten times the tolerance."""
    mixture, schedule = oracles.gmm2d(), schedules.Flow()
    x = schedule.alpha(np.float64(t)) * draws(mixture, 5) + schedule.sigma(np.float64(t)) * np.ones(2)
    cond = np.array([0, 1, 2, 3, -1])

    flowed, _ = run(lambda x, cond: integrate(mixture.denoiser(schedule), schedule, x, t, s, cond), x, cond)
    np.testing.assert_allclose(flowed, mixture.flow(schedule, x, t, s, cond), atol=1e-7)


def test_the_tolerance_is_what_it_costs():
    mixture, schedule, x = oracles.gmm2d(), schedules.Flow(), draws(oracles.gmm2d(), 5)

    def measure(x):
        return integrate(mixture.denoiser(schedule), schedule, x, 0.0, 1.0, tolerance=1e-3)

    coarse, count = run(measure, x)
    error = np.abs(coarse - mixture.flow(schedule, x, 0.0, 1.0)).max()
    assert 1e-7 < error < 2e-2 and (count < 120).all()


def test_evaluations_are_counted():
    """As many as the denoiser itself counts, one sample at a time; none of them between other times than asked."""
    schedule, times = schedules.VP(), []
    base = oracles.gmm2d().denoiser(schedule)

    def apply(state, x, t, cond):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return base.apply(state, x, t, cond)

    x = draws(oracles.gmm2d(), 1)
    _, count = run(lambda x: integrate(base._replace(apply=apply), schedule, x, 0.9, 0.2), x)
    jax.effects_barrier()
    assert count.tolist() == [len(times)]
    assert 0.2 <= min(times) < 0.25 and 0.85 < max(times) <= 0.9


def test_running_out_of_steps_is_nan(monkeypatch):
    monkeypatch.setattr(likelihood, 'MAX_STEPS', 3)
    mixture, schedule = oracles.gmm2d(), schedules.Flow()
    x1, _ = run(lambda x: integrate(mixture.denoiser(schedule), schedule, x, 0.0, 1.0), draws(mixture, 2))
    assert np.isnan(x1).all()
    result = run(lambda x: log_likelihood(mixture.denoiser(schedule), schedule, x), draws(mixture, 2))
    assert np.isnan(result.log_density).all() and np.isnan(result.x1).all()


def test_bits_of_a_uniform_image():
    """Every byte equally likely is 8 bits: one density over 256 bins of width 2 / 255."""
    num, width = 12, 2 / 255
    log_density = -num * np.log(256 * width)
    np.testing.assert_allclose(bits_per_dimension(log_density, num, width), 8, rtol=1e-12)
    twice = log_density + num * np.log(2)  # half of the bytes: a bit less
    np.testing.assert_allclose(bits_per_dimension(np.array([twice]), num, width), [7], rtol=1e-12)


def test_what_cannot_be_is_said():
    schedule, x = schedules.Flow(), jnp.zeros((2, 2))
    denoiser = oracles.gmm2d().denoiser(schedule)
    with pytest.raises(ValueError, match='this denoiser remembers its calls'):
        log_likelihood(zero_init(denoiser, schedule, 1), schedule, x)
    with pytest.raises(ValueError, match='this denoiser remembers its calls'):
        integrate(zero_init(denoiser, schedule, 1), schedule, x, 0.0, 1.0)
    with pytest.raises(ValueError, match='Gaussian probes are random: give keys, one for each sample'):
        log_likelihood(denoiser, schedule, x, trace=Gaussian())
    for kind in (Rademacher, Gaussian):
        with pytest.raises(ValueError, match='num_probes must be at least 1, got 0'):
            kind(num_probes=0)
