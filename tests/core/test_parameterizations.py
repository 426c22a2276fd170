"""Targets against their papers' formulas, and the solve that turns every one of them into every other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.core import parameterizations, schedules
from diffjax.core.denoisers import network_denoiser
from diffjax.core.parameterizations import check_times, estimate, target

RNG = np.random.default_rng(0)
X0, EPS = RNG.standard_normal((2, 5, 3, 2))
TARGETS = [getattr(parameterizations, name)() for name in parameterizations.__all__]
SCHEDULES = [getattr(schedules, name)() for name in schedules.__all__ if name != 'Shifted']
SCHEDULES += [schedules.Shifted(base=base, shift=3.0) for base in SCHEDULES]


def at(schedule, t):
    t = np.float64(t)
    return schedule.alpha(t), schedule.sigma(t)


@pytest.mark.parametrize('logsnr', [-7.0, -0.3, 2.0, 8.0])
def test_target_is_the_papers(schedule, parameterization, formula, logsnr):
    t = min(float(schedule.t_of_logsnr(np.float64(logsnr))), 0.999)  # some do not reach every level
    y = target(parameterization, schedule, X0, EPS, np.full(5, t))
    expected = formula(type(parameterization).__name__, schedule, X0, EPS, t)
    kink = isinstance(parameterization, parameterizations.Velocity) and isinstance(schedule, schedules.Discrete)
    np.testing.assert_allclose(y, expected, rtol=1e-3 if kink else 1e-6, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(TARGETS), st.sampled_from(TARGETS), st.sampled_from(SCHEDULES), st.floats(-7.5, 9))
def test_every_target_gives_back_every_other(first, second, schedule, logsnr):
    t = np.full(5, schedule.t_of_logsnr(np.float64(logsnr)))
    alpha, sigma = at(schedule, t[0])
    x = alpha * X0 + sigma * EPS
    guess = estimate(first, schedule, x, t, target(first, schedule, X0, EPS, t))
    np.testing.assert_allclose(guess.x0, X0, atol=1e-9 * max(1, sigma / alpha))
    np.testing.assert_allclose(guess.eps, EPS, atol=1e-9 * max(1, alpha / sigma))
    again = target(second, schedule, guess.x0, guess.eps, t)
    truth = target(second, schedule, X0, EPS, t)
    np.testing.assert_allclose(again, truth, rtol=1e-8, atol=1e-8 * np.abs(truth).max())


def test_a_wrong_output_still_adds_up(schedule, parameterization):
    """x = alpha x0 + sigma eps holds for whatever a network says."""
    t = np.full(5, schedule.t_of_logsnr(np.float64(0.4)))
    alpha, sigma = at(schedule, t[0])
    x, y = np.random.default_rng(1).standard_normal((2, 5, 3, 2))
    guess = estimate(parameterization, schedule, x, t, y)
    np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, x, atol=1e-11)


def test_one_time_for_all_or_one_each():
    flow, v = schedules.Flow(), parameterizations.V()
    t = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    together = target(v, flow, X0, EPS, t)
    for i in range(5):
        np.testing.assert_allclose(target(v, flow, X0[i : i + 1], EPS[i : i + 1], t[i]), together[i : i + 1])


def test_known_special_cases():
    flow, cosine = schedules.Flow(), schedules.Cosine()
    velocity, v = parameterizations.Velocity(), parameterizations.V()
    t = np.full(5, 0.35)
    np.testing.assert_allclose(target(velocity, flow, X0, EPS, t), EPS - X0, atol=1e-14)
    alpha, sigma = at(cosine, 0.35)
    np.testing.assert_allclose(target(v, cosine, X0, EPS, t), alpha * EPS - sigma * X0, atol=1e-14)
    # on the cosine, the angle's rate is constant: the velocity is v times it
    np.testing.assert_allclose(
        target(velocity, cosine, X0, EPS, t), np.pi / 2 * target(v, cosine, X0, EPS, t), atol=1e-12
    )


@pytest.mark.parametrize('sigma', [0.002, 0.3, 5.0, 80.0])
def test_edm_is_karras_preconditioning(sigma):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022, Eq. 7 and Table 1."""
    edm = parameterizations.EDM(sigma_data=0.7)
    schedule = schedules.EDM()
    told = {}

    def network(x, time, cond):
        told.update(x=x, time=time)
        return np.sin(3 * x) + cond

    x = sigma * np.random.default_rng(2).standard_normal((4, 6))
    t = np.full(4, sigma / 80)
    guess, _ = network_denoiser(network, schedule, edm).apply((), x, t, 0.2)
    c_skip = 0.7**2 / (sigma**2 + 0.7**2)
    c_out = sigma * 0.7 / np.sqrt(0.7**2 + sigma**2)
    c_in = 1 / np.sqrt(sigma**2 + 0.7**2)
    np.testing.assert_allclose(told['x'], c_in * x, rtol=1e-6)
    np.testing.assert_allclose(told['time'], np.full(4, np.log(sigma) / 4), rtol=1e-6)
    expected = c_skip * x + c_out * (np.sin(3 * c_in * x) + 0.2)
    np.testing.assert_allclose(guess.x0, expected, rtol=1e-5, atol=1e-6)


def test_the_input_has_bounded_size(schedule, parameterization):
    """Data and noise of unit variance never reach the network larger than that (with sigma_data = 1)."""
    if isinstance(parameterization, parameterizations.EDM):
        parameterization = parameterizations.EDM(sigma_data=1.0)
    t = np.linspace(0, 1, 21)
    size = parameterization.input_scale(schedule, t) * np.hypot(schedule.alpha(t), schedule.sigma(t))
    assert (size <= 1 + 1e-12).all() and (size > 0.7).all()


def able(schedule, end):
    """Which targets can be used at an end, from their definitions.

    Eps and Score say nothing of x0 where alpha = 0 (and the score is unbounded at sigma = 0), X0 nothing of eps where
    sigma = 0. The velocity is the path's: unbounded where alpha or sigma leaves 0 like a root of the time.
    """
    names = {'V', 'EDM', 'Velocity', 'Eps', 'Score', 'X0'}
    roots = {0: ('VP', 'VE', 'LinearAbar', 'InverseCosine', 'Sigmoid'), 1: ('LinearAbar', 'InverseCosine', 'Sigmoid')}
    if type(schedule).__name__ in roots[end]:
        names -= {'Velocity'}
    if end == 0:
        names -= {'Score', 'X0'}
    elif schedule.alpha(np.float64(1)) == 0:
        names -= {'Eps', 'Score'}
    return names


@pytest.mark.parametrize('end', [0, 1])
def test_impossible_times_are_refused(schedule, parameterization, end):
    name, names = type(parameterization).__name__, able(schedule, end)
    if name in names:
        check_times(parameterization, schedule, [0.5, end])
        return
    with pytest.raises(ValueError, match=f'target {name} cannot be used at t = {end}') as error:
        check_times(parameterization, schedule, [0.5, end])
    offered = str(error.value).split('Targets that can: ')[1].split(';')[0]
    assert set(offered.split(', ')) == names


def test_a_zero_terminal_table_needs_another_target_than_eps():
    """At its last entry an eps network says nothing of x0; at the plain table's, where some signal is left, it does."""
    eps, ends = parameterizations.Eps(), [1.0, 0.5]
    check_times(eps, schedules.ScaledLinear(), ends)
    for table in (
        schedules.ScaledLinear(zero_terminal=True),
        schedules.Shifted(base=schedules.Linear(zero_terminal=True), shift=2.0),
    ):
        with pytest.raises(ValueError, match='Eps cannot be used at t = 1.*Targets that can: X0, V, Velocity, EDM;'):
            check_times(eps, table, ends)


def test_inner_times_are_accepted(schedule, parameterization):
    check_times(parameterization, schedule, schedule.t_of_logsnr(np.linspace(-8, 10, 30)))
