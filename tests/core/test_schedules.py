"""Schedules against formulas written from the papers, numeric derivatives, and the table of DDPM's betas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from diffjax.core import schedules

INSIDE = np.array([0.0003, 0.00417, 0.0333, 0.20005, 0.5003, 0.76543, 0.96191])  # between the entries of a table
ALL = [getattr(schedules, name)() for name in schedules.__all__]


def vp_integral(t):
    return np.array([quad(lambda s: 0.1 + 19.9 * s, 0, time)[0] for time in t])


def table_abar(t):
    """DDPM's cumulative product at t = (i + 1) / 1000, multiplied out."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return abar[np.round(1000 * t).astype(int) - 1]


FORMULAS = {  # t -> (alpha, sigma); t in thousandths
    'Flow': lambda t: (1 - t, t),
    'Cosine': lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
    'VP': lambda t: (np.exp(-vp_integral(t) / 2), np.sqrt(1 - np.exp(-vp_integral(t)))),
    'VE': lambda t: (np.ones_like(t), np.sqrt((0.01 * 5000.0**t) ** 2 - 0.01**2)),
    'EDM': lambda t: (np.ones_like(t), 80 * t),
    'Linear': lambda t: (np.sqrt(table_abar(t)), np.sqrt(1 - table_abar(t))),
}


def test_formulas(schedule):
    t = np.array([1, 2, 10, 57, 100, 400, 500, 900, 999, 1000]) / 1000
    alpha, sigma = FORMULAS[type(schedule).__name__](t)
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-10)
    with np.errstate(divide='ignore'):
        expected = np.log(alpha**2 / sigma**2)
    np.testing.assert_allclose(schedule.logsnr(t)[:-1], expected[:-1], rtol=1e-9, atol=1e-9)


def test_ends(schedule):
    zero, one = np.float64(0), np.float64(1)
    assert schedule.alpha(zero) == 1 and schedule.sigma(zero) == 0
    assert schedule.logsnr(zero) == np.inf
    assert 0 <= schedule.alpha(one) <= 1 and schedule.sigma(one) > 0.99
    if schedule.alpha(one) == 0:
        assert schedule.logsnr(one) == -np.inf


def test_the_linear_table():
    linear = schedules.Linear()
    assert linear.alpha(np.float64(1)) ** 2 == pytest.approx(4.0358e-5, rel=1e-4)  # FORMULAS: abar_T = 4e-5
    t = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(linear.alpha(t) ** 2, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-11)
    rough = np.exp(-10 * t**2 - 0.1 * t)  # the integral of 1000 (1e-4 + 0.0199 t)
    assert np.abs(linear.alpha(t) ** 2 - rough).max() < 0.005


def test_discrete_interpolation():
    """Log-SNR is linear between two entries; sigma / alpha is linear before the first."""
    linear = schedules.Linear()
    t = np.array([0.2, 0.20025, 0.2005, 0.201])
    value = linear.logsnr(t)
    np.testing.assert_allclose(value[1:3], [0.75 * value[0] + 0.25 * value[3], 0.5 * (value[0] + value[3])], rtol=1e-12)
    early = np.linspace(0, 1e-3, 7)
    ratio = linear.sigma(early) / linear.alpha(early)
    np.testing.assert_allclose(ratio, early / 1e-3 * np.sqrt(1e-4 / (1 - 1e-4)), rtol=1e-9, atol=1e-12)


def test_integer_timesteps():
    """A discrete table tells the network i at t = (i + 1) / T, in float32 too; the others run from 0 to 1000."""
    for num_timesteps in (1000, 4000, 50):
        table = schedules.Linear(num_timesteps=num_timesteps)
        steps = np.arange(num_timesteps)
        told = np.asarray(table.timestep(jnp.asarray((steps + 1) / num_timesteps, jnp.float32)))
        np.testing.assert_allclose(told, steps, atol=3e-7 * num_timesteps)
        np.testing.assert_array_equal(np.round(told), steps)
    assert schedules.Flow().timestep(np.float64(0.25)) == 250


def test_derivatives_by_automatic_differentiation(schedule):
    with jax.enable_x64(True):
        t = jnp.asarray(INSIDE)
        both = jax.jit(
            lambda t: jax.jvp(lambda t: (schedule.alpha(t), schedule.sigma(t)), (t,), (jnp.ones_like(t),))[1]
        )
        for derivative, slope in zip((schedule.alpha_prime, schedule.sigma_prime), both(t)):
            np.testing.assert_allclose(derivative(INSIDE), slope, rtol=1e-8, atol=1e-12)


def test_derivatives_by_differences(schedule):
    t, h = INSIDE, 1e-5 * INSIDE
    for function, derivative in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
        slope = (function(t + h) - function(t - h)) / (2 * h)
        np.testing.assert_allclose(derivative(t), slope, rtol=1e-6, atol=1e-7)
    speed = np.abs(schedule.logsnr(t + h) - schedule.logsnr(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.log_speed(t), np.log(speed), atol=1e-6)


def test_derivatives_at_the_ends(schedule):
    """The one-sided limits; a square root's infinite slope at t = 0 is a very large number."""
    tiny = np.float64(1e-16)
    slope = schedule.sigma(tiny) / tiny
    at_zero = schedule.sigma_prime(np.float64(0))
    assert at_zero > 1e6 if slope > 1e6 else at_zero == pytest.approx(slope, rel=1e-6)
    h = 1e-6
    for function, derivative in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
        one = np.float64(1)
        slope = (3 * function(one) - 4 * function(one - h) + function(one - 2 * h)) / (2 * h)  # one-sided, order 2
        assert derivative(one) == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert np.isfinite(schedule.log_speed(np.array([0.0, 1.0]))).all()


def test_inverse_of_logsnr(schedule):
    t = np.linspace(1e-3, 1 - 1e-3, 101)
    np.testing.assert_allclose(schedule.t_of_logsnr(schedule.logsnr(t)), t, rtol=1e-9)
    level = np.linspace(max(-14.0, schedule.logsnr(np.float64(1))), 14.0, 101)
    np.testing.assert_allclose(schedule.logsnr(schedule.t_of_logsnr(level)), level, rtol=1e-8, atol=1e-8)


def test_unreachable_logsnr_gives_the_nearer_end(schedule):
    far = schedule.t_of_logsnr(np.array([-200.0, 200.0]))
    np.testing.assert_allclose(far, [1, 0], atol=1e-9)
    far = schedule.t_of_logsnr(jnp.asarray([-80.0, 80.0]))
    np.testing.assert_allclose(far, [1, 0], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALL), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_monotone_and_bounded(schedule, t):
    t = np.sort(np.array(t))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (np.diff(alpha) <= 1e-15).all() and (np.diff(sigma) >= -1e-15).all()
    assert ((alpha >= 0) & (alpha <= 1)).all() and (sigma >= 0).all()
    apart = np.diff(t) > 1e-6
    with np.errstate(invalid='ignore'):
        assert (np.diff(schedule.logsnr(t))[apart] < 0).all()
    if not isinstance(schedule, (schedules.Flow, schedules.VE, schedules.EDM)):
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-12)


def test_numpy_and_jax_agree(schedule):
    """float32 under jit against float64 NumPy, relative to each value: both ends keep their digits."""
    t = np.concatenate([np.linspace(0, 1, 257), np.logspace(-4, -1, 20), 1 - np.logspace(-4, -1, 20)])
    t = t.astype(np.float32)
    names = 'alpha', 'sigma', 'logsnr', 'alpha_prime', 'sigma_prime', 'log_speed'
    in_jax = jax.jit(lambda t: [getattr(schedule, name)(t) for name in names])(t)
    for name, rounded in zip(names, in_jax):
        if name.endswith('prime') and isinstance(schedule, schedules.Discrete):
            continue  # piecewise constant factors: rounding picks the neighbour at an entry
        exact, inner = np.asarray(getattr(schedule, name)(t.astype(np.float64))), t > 0
        rounded = np.asarray(rounded)
        assert rounded.dtype == np.float32 and not np.isnan(rounded).any()
        if name == 'log_speed' and isinstance(schedule, schedules.Discrete):
            inner &= np.abs(1000 * t - np.round(1000 * t)) > 1e-2
        finite = np.isfinite(exact) & inner & (np.abs(exact) < 1e5)
        np.testing.assert_allclose(rounded[finite], exact[finite], rtol=1e-5, atol=2e-6 if 'log' in name else 0)
