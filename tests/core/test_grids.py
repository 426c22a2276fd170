"""Grids against the papers' formulas."""

import numpy as np
import pytest

from diffjax.core import grids, schedules


def test_shape_ends_and_direction(schedule, grid):
    for num_steps in (2, 5, 50):
        t = grid(schedule, num_steps)
        assert t.shape == (num_steps + 1,) and t.dtype == np.float64
        assert (np.diff(t) < 0).all() and t[-1] == 0 and t[0] <= 1


def test_uniform():
    np.testing.assert_allclose(grids.uniform(schedules.Flow(), 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grids.uniform(schedules.Flow(), 2, start=0.6, end=0.2), [0.6, 0.4, 0.2])
    linear = schedules.Linear()
    told = linear.timestep(grids.uniform(linear, 10)[:-1])
    np.testing.assert_allclose(told, np.arange(999, 0, -100), atol=1e-9)  # trailing integer timesteps


@pytest.mark.parametrize('rho', [1.0, 7.0])
def test_karras_is_the_papers_formula(rho):
    """Karras et al. 2022, Eq. 5: sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, sigma_N = 0."""
    i = np.arange(18)
    sigma = (80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    t = grids.karras(schedules.EDM(), 18, rho=rho)
    np.testing.assert_allclose(80 * t, np.append(sigma, 0), rtol=1e-9)


def test_karras_reaches_the_same_levels_everywhere(schedule):
    """sigma / alpha of the grid, on every schedule, with the top cut to what the schedule reaches."""
    top = min(20.0, schedule.sigma(np.float64(1)) / max(schedule.alpha(np.float64(1)), 1e-9))
    t = grids.karras(schedule, 9, sigma_min=0.02, sigma_max=20.0)[:-1]
    ramp = np.linspace(top ** (1 / 7), 0.02 ** (1 / 7), 9) ** 7
    np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), ramp, rtol=1e-7)


def test_logsnr_steps_are_equal(schedule):
    low = max(-9.0, schedule.logsnr(np.float64(1)))
    t = grids.logsnr(schedule, 12, low=-9.0, high=8.0)
    np.testing.assert_allclose(schedule.logsnr(t[:-1]), np.linspace(low, 8, 12), atol=1e-7)


def test_a_grid_that_asks_for_more_starts_at_one():
    for t in (grids.logsnr(schedules.VE(), 5, low=-30), grids.karras(schedules.VE(), 5, sigma_max=1e5)):
        assert t[0] == pytest.approx(1, abs=1e-9)


def test_softplus_is_even_in_its_coordinate(schedule):
    """log(1 + 3 alpha / sigma), written out, from what the schedule reaches to 0.2 / N or a table's first entry."""
    t = grids.softplus(schedule, 9)[:-1]
    steps = np.log1p(3 * schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(np.diff(steps), (steps[-1] - steps[0]) / 8, rtol=1e-6)
    assert t[0] == 1
    low = schedule.first_time or schedule.t_of_logsnr(-2 * np.log(np.float64(0.2 / 9)))
    assert t[-1] == pytest.approx(low, rel=1e-9)
    t = grids.softplus(schedules.Flow(), 6, knee=1.0, sigma_min=0.05)[:-1]
    np.testing.assert_allclose(t, np.geomspace(1, 0.05 / 1.05, 6), rtol=1e-12)
    with pytest.raises(ValueError, match='sigma_min lies between 0 and 80'):
        grids.softplus(schedules.EDM(), 9, sigma_min=90.0)
    with pytest.raises(ValueError, match='knee is above 0'):
        grids.softplus(schedules.EDM(), 9, knee=0.0)
