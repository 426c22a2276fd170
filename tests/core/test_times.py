"""Time distributions: what they sample must follow the density they claim, on every schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from diffjax.core import schedules, times


def claimed_mass(distribution, schedule, level):
    """The mass above each of `level`, by the trapezoid rule over exp(log_density) where samples can be."""
    ends = np.asarray(distribution.sample(schedule, jnp.asarray([1.0, 0.0])))
    with np.errstate(divide='ignore'):
        grid = np.linspace(*np.clip(schedule.logsnr(ends), -60, 60), 4000)
    t = jnp.asarray(schedule.t_of_logsnr(grid))
    density = np.exp(np.asarray(distribution.log_density(schedule, t)))
    density = np.where(np.isfinite(density), density, 0)
    below = np.append(0, np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(grid)))
    return below[-1], np.interp(level, grid, below[-1] - below)


def test_samples_follow_their_density(schedule, distribution):
    """Quantiles at 4,000 equal steps of u: the Kolmogorov-Smirnov distance to the integral of the claimed density."""
    with jax.enable_x64(True):
        u = (np.arange(4000) + 0.5) / 4000
        t = np.asarray(distribution.sample(schedule, jnp.asarray(u)))
        assert ((t >= 0) & (t <= 1)).all()
        assert (np.diff(t) >= 0).all()
        with np.errstate(divide='ignore'):
            level = np.asarray(schedule.logsnr(t))
        total, above = claimed_mass(distribution, schedule, np.clip(level, -59, 59))
    assert total == pytest.approx(1, abs=3e-3)
    assert np.abs(above - u).max() < 3e-3  # t rises with u, logsnr falls


def test_quantiles_by_their_papers():
    """SD3's logit-normal, EDM's log-normal sigma, a uniform logsnr: SciPy's quantiles, mapped by hand."""
    u = np.array([0.01, 0.2, 0.5, 0.77, 0.995])
    flow, edm = schedules.Flow(), schedules.EDM()
    with jax.enable_x64(True):
        t = times.LogitNormal(mean=0.4, std=0.8).sample(flow, jnp.asarray(u))
        np.testing.assert_allclose(np.log(t / (1 - t)), norm.ppf(u, 0.4, 0.8), rtol=1e-9)
        t = times.LogNormalSigma(mean=-1.2, std=1.2).sample(edm, jnp.asarray(u))
        np.testing.assert_allclose(np.log(80 * t), norm.ppf(u, -1.2, 1.2), rtol=1e-9)
        t = times.UniformLogSNR(low=-4, high=6).sample(flow, jnp.asarray(u))
        np.testing.assert_allclose(2 * np.log((1 - t) / t), 6 - 10 * u, rtol=1e-9)


def test_discrete_times_are_ddpms():
    u = jnp.asarray([0.0, 0.0999, 0.1001, 0.5, 1 - 2**-24])
    t = times.Discrete(num_timesteps=10).sample(schedules.Linear(), u)
    np.testing.assert_allclose(t, [0.1, 0.1, 0.2, 0.6, 1.0], rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([getattr(times, n)() for n in times.__all__]),
    st.lists(st.floats(0, 0.9999), min_size=4, max_size=4),
)
def test_quantiles_rise(distribution, u):
    t = np.asarray(distribution.sample(schedules.Flow(), jnp.sort(jnp.asarray(u, jnp.float32))))
    assert (np.diff(t) >= -1e-6).all() and (t >= 0).all() and (t <= 1).all()


@pytest.mark.parametrize(('low', 'high'), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5), (float('nan'), 1.0)])
def test_bounds_are_checked(low, high):
    with pytest.raises(ValueError, match='0 <= low < high <= 1'):
        times.Uniform(low=low, high=high)
