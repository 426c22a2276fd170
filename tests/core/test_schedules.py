"""Schedules against formulas written from the papers, numeric derivatives, and tables of betas multiplied out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit

from diffjax.core import schedules

INSIDE = np.array([0.0003, 0.00417, 0.0333, 0.20005, 0.5003, 0.76543, 0.96191, 0.9997])  # between a table's entries
ENTRIES = (np.arange(1000) + 1) / 1000
SD_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def vp_integral(t):
    return np.array([quad(lambda s: 0.1 + 19.9 * s, 0, time)[0] for time in t])


def of_betas(betas):
    """t -> (alpha, sigma) by the cumulative product."""
    abar = np.cumprod(1 - np.asarray(betas, np.longdouble))

    def look_up(t):
        entry = abar[np.round(1000 * t).astype(int) - 1]
        return np.sqrt(entry).astype(float), np.sqrt(1 - entry).astype(float)

    return look_up


def cosine_betas():
    """Nichol & Dhariwal 2021, Eq. 17, entry by entry."""

    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    return [min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)]


def of_abar(abar):
    return lambda t: (np.sqrt(abar(t)), np.sqrt(1 - abar(t)))


def rin_sigmoid(t):
    """Jabri et al. 2022: start = -3, end = 3, tau = 1."""
    return (expit(3) - expit(6 * t - 3)) / (expit(3) - expit(-3))


def shifted_cosine(t):
    """logsnr = -2 log tan(pi t / 2) - 1.4, on the unit circle."""
    ratio = np.tan(np.pi * t / 2) * np.exp(0.7)
    return np.cos(np.arctan(ratio)), np.sin(np.arctan(ratio))


FORMULAS = {  # t -> (alpha, sigma); t in thousandths
    'Flow': lambda t: (1 - t, t),
    'Cosine': lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
    'InverseCosine': of_abar(lambda t: np.arccos(2 * t - 1) / np.pi),
    'LinearAbar': of_abar(lambda t: 1 - t),
    'Sigmoid': of_abar(rin_sigmoid),
    'VP': lambda t: (np.exp(-vp_integral(t) / 2), np.sqrt(1 - np.exp(-vp_integral(t)))),
    'VE': lambda t: (np.ones_like(t), np.sqrt((0.01 * 5000.0**t) ** 2 - 0.01**2)),
    'EDM': lambda t: (np.ones_like(t), 80 * t),
    'Linear': of_betas(np.linspace(1e-4, 0.02, 1000)),
    'ScaledLinear': of_betas(SD_BETAS),
    'SquaredCos': of_betas(cosine_betas()),
    'SigmoidBetas': of_betas(1e-4 + (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, 1000)))),
    'Shifted': shifted_cosine,
}


def is_table(schedule):
    return isinstance(getattr(schedule, 'base', schedule), schedules.Discrete)


def test_formulas(schedule):
    t = np.array([1, 2, 10, 57, 100, 400, 500, 900, 999, 1000]) / 1000
    alpha, sigma = FORMULAS[type(schedule).__name__](t)
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-10)
    with np.errstate(divide='ignore'):
        expected = np.log(alpha**2 / sigma**2)
    np.testing.assert_allclose(schedule.logsnr(t)[:-1], expected[:-1], rtol=1e-9, atol=1e-9)


def test_ends(any_schedule):
    zero, one = np.float64(0), np.float64(1)
    assert any_schedule.alpha(zero) == 1 and any_schedule.sigma(zero) == 0
    assert any_schedule.logsnr(zero) == np.inf
    assert 0 <= any_schedule.alpha(one) <= 1 and any_schedule.sigma(one) > 0.99
    if any_schedule.alpha(one) == 0:
        assert any_schedule.logsnr(one) == -np.inf


def test_known_tables():
    """abar_T = 4e-5 for DDPM (FORMULAS); Stable Diffusion's sigma / alpha from 0.0292 to 14.6146."""
    linear, sd = schedules.Linear(), schedules.ScaledLinear()
    assert linear.alpha(np.float64(1)) ** 2 == pytest.approx(4.0358e-5, rel=1e-4)
    rough = np.exp(-10 * ENTRIES**2 - 0.1 * ENTRIES)  # the integral of 1000 (1e-4 + 0.0199 t)
    assert np.abs(linear.alpha(ENTRIES) ** 2 - rough).max() < 0.005
    assert sd.alpha(np.float64(1)) ** 2 == pytest.approx(0.0047, abs=5e-5)
    assert sd.sigma(np.float64(1)) / sd.alpha(np.float64(1)) == pytest.approx(14.6146, abs=5e-5)
    assert sd.sigma(np.float64(0.001)) / sd.alpha(np.float64(0.001)) == pytest.approx(0.0292, abs=5e-5)
    for table in (linear, sd, schedules.SquaredCos(), schedules.SigmoidBetas()):
        alpha, _ = FORMULAS[type(table).__name__](ENTRIES)
        np.testing.assert_allclose(table.alpha(ENTRIES), alpha, rtol=1e-9)


def test_discrete_interpolation():
    """Log-SNR is linear between two entries; sigma / alpha is linear before the first."""
    linear = schedules.Linear()
    for t in (np.array([0.2, 0.20025, 0.2005, 0.201]), np.array([0.999, 0.99925, 0.9995, 1.0])):
        value = linear.logsnr(t)
        between = [0.75 * value[0] + 0.25 * value[3], 0.5 * (value[0] + value[3])]
        np.testing.assert_allclose(value[1:3], between, rtol=1e-12)
    early = np.linspace(0, 1e-3, 7)
    ratio = linear.sigma(early) / linear.alpha(early)
    np.testing.assert_allclose(ratio, early / 1e-3 * np.sqrt(1e-4 / (1 - 1e-4)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ['Linear', 'ScaledLinear', 'SquaredCos', 'SigmoidBetas'])
def test_zero_terminal_snr(name):
    """Lin et al. 2024, Algorithm 1: the first entry stays, the last has no signal, the others are moved linearly in
    sqrt(abar); in the last cell alpha / sigma falls linearly to 0.
    """
    plain, table = getattr(schedules, name)(), getattr(schedules, name)(zero_terminal=True)
    root, _ = FORMULAS[name](ENTRIES)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(table.alpha(ENTRIES), expected, rtol=1e-9, atol=1e-15)
    assert table.alpha(np.float64(1)) == 0 and table.sigma(np.float64(1)) == 1
    assert table.alpha(ENTRIES[0]) == pytest.approx(plain.alpha(ENTRIES[0]), rel=1e-14)
    late = 1 - np.linspace(0, 1e-3, 7)
    ratio = table.alpha(late) / table.sigma(late)
    np.testing.assert_allclose(ratio, (1 - late) / 1e-3 * ratio[-1], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(table.t_of_logsnr(table.logsnr(late[1:])), late[1:], rtol=1e-12)
    assert table.t_of_logsnr(np.float64(-np.inf)) == 1


def test_small_tables():
    """Two entries are enough, the second being the terminal one."""
    for zero_terminal in (False, True):
        table = schedules.Linear(num_timesteps=2, beta_start=0.3, beta_end=0.6, zero_terminal=zero_terminal)
        t = np.array([0, 0.25, 0.5, 0.75, 1])
        alpha = table.alpha(t)
        last = 0 if zero_terminal else np.sqrt(0.7 * 0.4)
        np.testing.assert_allclose(alpha[[0, 2, 4]], [1, np.sqrt(0.7), last], rtol=1e-12, atol=1e-15)
        assert (np.diff(alpha) < 0).all() and (np.diff(table.logsnr(t)) < 0).all()


def test_integer_timesteps():
    """A discrete table tells the network i at t = (i + 1) / T, in float32 too; the others run from 0 to 1000."""
    for num_timesteps in (1000, 4000, 50):
        table = schedules.Linear(num_timesteps=num_timesteps)
        steps = np.arange(num_timesteps)
        for told_by in (table, schedules.Shifted(base=table, shift=2.0)):
            told = np.asarray(told_by.timestep(jnp.asarray((steps + 1) / num_timesteps, jnp.float32)))
            np.testing.assert_allclose(told, steps, atol=3e-7 * num_timesteps)
            np.testing.assert_array_equal(np.round(told), steps)
            assert told_by.first_time == 1 / num_timesteps
    for continuous in (schedules.Flow(), schedules.Shifted(base=schedules.Flow(), shift=2.0)):
        assert continuous.timestep(np.float64(0.25)) == 250 and continuous.first_time == 0


# Shifts.


def test_a_flow_shift_by_hand():
    """SD3's t' = 3 t / (1 + 2 t): 0.1 -> 0.25, 0.25 -> 0.5, 0.5 -> 0.75, and both ends stay."""
    shifted = schedules.Shifted(base=schedules.Flow(), shift=3.0)
    t = np.array([0.0, 0.1, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(shifted.sigma(t), [0, 0.25, 0.5, 0.75, 1], rtol=1e-14)
    np.testing.assert_allclose(shifted.alpha(t), [1, 0.75, 0.5, 0.25, 0], rtol=1e-14)
    again = schedules.Shifted(base=shifted, logsnr_shift=2 * np.log(3))
    np.testing.assert_allclose(again.sigma(t), t, rtol=1e-14, atol=1e-15)


def test_shifts_by_their_papers(schedule):
    """logsnr + s; logsnr + 2 log(64 / 256) = logsnr - 4 log 2 (Hoogeboom et al. 2023); logsnr - 2 log s (SD3)."""
    t = np.array([0.003, 0.2, 0.5, 0.9])
    for options, moved in (
        ({'logsnr_shift': 0.7}, 0.7),
        ({'resolution': 256}, -2.7725887222397811),
        ({'resolution': 32, 'base_resolution': 128}, 2.7725887222397811),
        ({'shift': 3.0}, -2.1972245773362196),
    ):
        shifted = schedules.Shifted(base=schedule, **options)
        alpha, sigma = shifted.alpha(t), shifted.sigma(t)
        expected = np.log(schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2) + moved
        np.testing.assert_allclose(np.log(alpha**2 / sigma**2), expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(shifted.logsnr(t), expected, rtol=1e-10, atol=1e-10)


def test_a_shift_keeps_the_family(any_schedule):
    t = np.linspace(0, 1, 33)
    alpha, sigma = (f(t) for s in [schedules.Shifted(base=any_schedule, shift=2.5)] for f in (s.alpha, s.sigma))
    unshifted = any_schedule.alpha(t), any_schedule.sigma(t)
    if np.allclose(unshifted[0], 1):
        np.testing.assert_array_equal(alpha, 1)
    elif np.allclose(sum(unshifted), 1):
        np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-14)
    else:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, 'give one of logsnr_shift, resolution .* got none'),
        ({'shift': 3.0, 'logsnr_shift': 1.0}, 'got logsnr_shift = 1.0, shift = 3.0'),
        ({'shift': 0.0}, 'shift must be a finite number, above 0 .* got 0.0'),
        ({'resolution': -64}, 'resolution must be .* got -64'),
        ({'resolution': 64, 'base_resolution': 0}, 'base_resolution must be .* got 0'),
        ({'logsnr_shift': float('nan')}, 'logsnr_shift must be a finite number'),
        ({'base': 'cosine', 'shift': 3.0}, "base is a schedule, got 'cosine'"),
    ],
)
def test_bad_shifts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        schedules.Shifted(**{'base': schedules.Flow(), **options})


def test_bad_settings_are_refused():
    for options, message in (
        ({'num_timesteps': 1}, 'num_timesteps is at least 2, got 1'),
        ({'beta_end': 1.5}, 'betas lie between 0 and 1, got 0.0001 to 1.5'),
        ({'beta_start': 0.0}, 'betas lie between 0 and 1, got 0 to 0.02'),
        ({'zero_terminal': 'no'}, "zero_terminal is True or False, got 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.Linear(**options)
    for options in ({'start': 3.0, 'end': -3.0}, {'tau': 0.0}):
        with pytest.raises(ValueError, match='start < end and tau > 0'):
            schedules.Sigmoid(**options)


@pytest.mark.parametrize('offset', [-1.0, np.inf])
def test_a_refusal_is_all_that_is_said(offset, recwarn):
    with pytest.raises(ValueError, match='betas lie between 0 and 1, got nan to nan'):
        schedules.SquaredCos(offset=offset)
    assert not recwarn.list


def test_sigmoid_settings():
    """Chen 2023, Algorithm 1 with start = 0, end = 3, tau = 0.7."""
    t = np.array([0.01, 0.3, 0.5, 0.99])
    abar = (expit(3 / 0.7) - expit(3 * t / 0.7)) / (expit(3 / 0.7) - 0.5)
    np.testing.assert_allclose(schedules.Sigmoid(start=0.0, end=3.0, tau=0.7).alpha(t) ** 2, abar, rtol=1e-10)


# Derivatives and inverses.


def test_derivatives_by_automatic_differentiation(any_schedule):
    with jax.enable_x64(True):
        t = jnp.asarray(INSIDE)
        both = jax.jit(
            lambda t: jax.jvp(lambda t: (any_schedule.alpha(t), any_schedule.sigma(t)), (t,), (jnp.ones_like(t),))[1]
        )
        for derivative, slope in zip((any_schedule.alpha_prime, any_schedule.sigma_prime), both(t)):
            np.testing.assert_allclose(derivative(INSIDE), slope, rtol=1e-8, atol=1e-12)


def test_derivatives_by_differences(any_schedule):
    t, h = INSIDE, 1e-5 * np.minimum(INSIDE, 1 - INSIDE)
    schedule = any_schedule
    for function, derivative in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
        slope = (function(t + h) - function(t - h)) / (2 * h)
        np.testing.assert_allclose(derivative(t), slope, rtol=2e-6, atol=2e-7)
    speed = np.abs(schedule.logsnr(t + h) - schedule.logsnr(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.log_speed(t), np.log(speed), atol=1e-5)


def test_derivatives_at_the_ends(any_schedule):
    """The one-sided limits; the infinite slope of a root is a very large number."""
    for end, h in ((0.0, 1e-16), (1.0, -(2.0**-52))):
        end = np.float64(end)
        for function, derivative in (
            (any_schedule.alpha, any_schedule.alpha_prime),
            (any_schedule.sigma, any_schedule.sigma_prime),
        ):
            steep = (function(end + h) - function(end)) / h
            if abs(steep) > 1e6:
                assert derivative(end) * np.sign(steep) > 1e6
                continue
            near = 1e-6 * np.sign(h)
            slope = (-3 * function(end) + 4 * function(end + near) - function(end + 2 * near)) / (2 * near)  # order 2
            loose = 2e-3 if np.abs(any_schedule.sigma_prime(end)) > 1e6 else 1e-6  # the other one's root is in it
            assert derivative(end) == pytest.approx(slope, rel=1e-4, abs=loose)
    for ends in (np.array([0.0, 1.0]), jnp.asarray([0.0, 1.0])):
        for function in (any_schedule.log_speed, any_schedule.alpha_prime, any_schedule.sigma_prime):
            assert np.isfinite(function(ends)).all()


def test_tables_have_gradients_everywhere(any_schedule):
    """At both ends, at entries and in every cell: times are learned through alpha and sigma."""
    if not is_table(any_schedule):
        pytest.skip('of tables, whose cells are chosen by comparison')
    t = jnp.asarray([0.0, 4e-4, 1e-3, 0.3, 0.5, 0.9985, 0.999, 0.9995, 1.0])
    for function in (any_schedule.alpha, any_schedule.sigma):
        assert np.isfinite(jax.vmap(jax.grad(function))(t)).all()


def test_inverse_of_logsnr(any_schedule):
    t = np.linspace(1e-3, 1 - 1e-3, 101)
    np.testing.assert_allclose(any_schedule.t_of_logsnr(any_schedule.logsnr(t)), t, rtol=1e-9)
    lowest = any_schedule.logsnr(np.float64(1 - 1e-7))  # beyond it t itself has too few digits for some
    level = np.linspace(max(-14.0, lowest), 14.0, 101)
    np.testing.assert_allclose(any_schedule.logsnr(any_schedule.t_of_logsnr(level)), level, rtol=1e-8, atol=1e-8)


def test_unreachable_logsnr_gives_the_nearer_end(any_schedule):
    far = any_schedule.t_of_logsnr(np.array([-200.0, 200.0]))
    np.testing.assert_allclose(far, [1, 0], atol=1e-9)
    far = any_schedule.t_of_logsnr(jnp.asarray([-80.0, 80.0]))
    np.testing.assert_allclose(far, [1, 0], atol=1e-6)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_monotone_and_bounded(any_schedule, t):
    t = np.sort(np.array(t))
    alpha, sigma = any_schedule.alpha(t), any_schedule.sigma(t)
    assert (np.diff(alpha) <= 1e-15).all() and (np.diff(sigma) >= -1e-15).all()
    assert ((alpha >= 0) & (alpha <= 1)).all() and (sigma >= 0).all()
    apart = np.diff(t) > 1e-6
    with np.errstate(invalid='ignore'):
        assert (np.diff(any_schedule.logsnr(t))[apart] < 0).all()
    power = {'Flow': 1, 'VE': 0, 'EDM': 0}.get(type(getattr(any_schedule, 'base', any_schedule)).__name__, 2)
    np.testing.assert_allclose(alpha**power + sigma**power if power else alpha, 1, atol=1e-12)


def test_numpy_and_jax_agree(any_schedule):
    """float32 under jit against float64 NumPy, relative to each value: both ends keep their digits."""
    t = np.concatenate([np.linspace(0, 1, 257), np.logspace(-4, -1, 20), 1 - np.logspace(-4, -1, 20)])
    t = t.astype(np.float32)
    names = 'alpha', 'sigma', 'logsnr', 'alpha_prime', 'sigma_prime', 'log_speed'
    in_jax = jax.jit(lambda t: [getattr(any_schedule, name)(t) for name in names])(t)
    for name, rounded in zip(names, in_jax):
        if name.endswith('prime') and is_table(any_schedule):
            continue  # piecewise constant factors: rounding picks the neighbour at an entry
        exact, inner = np.asarray(getattr(any_schedule, name)(t.astype(np.float64))), t > 0
        rounded = np.asarray(rounded)
        assert rounded.dtype == np.float32 and not np.isnan(rounded).any()
        if name == 'log_speed' and is_table(any_schedule):
            inner &= np.abs(1000 * t - np.round(1000 * t)) > 1e-2
        finite = np.isfinite(exact) & inner & (np.abs(exact) < 1e5)
        np.testing.assert_allclose(rounded[finite], exact[finite], rtol=1e-5, atol=2e-6 if 'log' in name else 0)


def test_tables_in_float32_at_their_entries(any_schedule):
    """Entry by entry, where rounding decides to which cell a time belongs."""
    if not is_table(any_schedule):
        pytest.skip('of tables')
    t = ENTRIES.astype(np.float32)
    exact = any_schedule.logsnr(t.astype(np.float64))
    rounded = np.asarray(jax.jit(any_schedule.logsnr)(t))
    np.testing.assert_allclose(rounded[:-1], exact[:-1], rtol=1e-5, atol=2e-5)
