"""Samplers that go back up in time: where they ask, how they get there, and that the way up keeps the distribution."""

import math

import numpy as np
import pytest

from diffjax.core import solvers


def ratio(denoise, t):
    """sigma / alpha."""
    alpha, sigma, _ = denoise.levels(t)
    return sigma / alpha


def test_restart_goes_back_up(solver_schedule, exact_denoiser):
    """Xu et al. 2023, Algorithm 1: down to the first level at or below `low`, K times up to `high` and down again by
    Karras's levels, then on; on the way up x gains the kernel's noise, once.
    """
    denoise = exact_denoiser(solver_schedule)
    grid = solver_schedule.t_of_logsnr(np.array([-4.0, -2, 0, 2, 4, 6]))
    options = {'low': 0.4, 'high': 2.0, 'num_restarts': 2, 'num_steps': 3}
    plan = solvers.restart(solver_schedule, grid, **options)
    down, bottom = ratio(denoise, grid), math.exp(-1.0)  # the fourth level, logsnr 2, is the first below 0.4
    again = np.linspace(2.0 ** (1 / 7), bottom ** (1 / 7), 4) ** 7
    every = [*down[:4], *again, *again, *down[3:]]
    steps = [(u, v) for u, v in zip(every, every[1:]) if v < 0.999 * u]
    asked = [level for step in steps for level in step]  # Heun asks at both ends of each step
    np.testing.assert_allclose(ratio(denoise, plan.t), asked, rtol=1e-7)
    ups = [2 * 3 - 1, 2 * 6 - 1]
    assert list(np.flatnonzero(plan.to_x[:, -1])) == ups
    alpha, _, _ = denoise.levels(denoise.time(-np.log(2.0)))
    np.testing.assert_allclose(plan.to_x[ups, -1], alpha * math.sqrt(2.0**2 - bottom**2))
    plain = solvers.heun(solver_schedule, grid[:4])
    kept = alpha / denoise.levels(grid[3])[0]
    np.testing.assert_allclose(plan.to_x[5, :-1], kept * plain.to_x[5])  # the step itself, scaled


def test_repaint_travels_in_time(solver_schedule, exact_denoiser):
    """Lugmayr et al. 2022, Algorithm 1 with jumps: each piece of `jump` steps `repeats` times, the first one once."""
    denoise = exact_denoiser(solver_schedule)
    grid = np.array([0.9, 0.7, 0.5, 0.4, 0.2, 0.1])
    plan = solvers.repaint(solver_schedule, grid, jump=2, repeats=3)
    np.testing.assert_allclose(plan.t, [0.9, 0.7, *[0.5, 0.4] * 3, *[0.2] * 3])
    once, ups = (
        solvers.ddpm(solver_schedule, grid),
        {3: (3, 0.2, 0.5), 5: (3, 0.2, 0.5), 8: (4, 0.1, 0.2), 9: (4, 0.1, 0.2)},
    )
    assert list(np.flatnonzero(plan.to_x[:, -1])) == list(ups)
    for row, place in enumerate([0, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4]):
        kept = 1.0
        if row in ups:  # x after a jump is alpha x0 + sigma eps again
            step, low, high = ups[row]
            (a, s, _), (b, r, _) = denoise.levels(low), denoise.levels(high)
            kept = b / a
            assert step == place and (kept * s) ** 2 + plan.to_x[row, -1] ** 2 == pytest.approx(r**2)
        np.testing.assert_allclose(plan.to_x[row, :-1], kept * once.to_x[place])
    for jump, repeats, count in ((1, 2, 1 + 2 * 4), (5, 5, 5), (3, 2, 3 + 2 * 2), (10, 10, 5)):
        assert solvers.repaint(solver_schedule, grid, jump=jump, repeats=repeats).num_evaluations == count
    large = solvers.repaint(solver_schedule, grid, jump=2, repeats=2, variance='large')
    np.testing.assert_allclose(large.to_x[-1:, :-1], solvers.ddpm(solver_schedule, grid, variance='large').to_x[-1:])


def test_repaint_goes_up_from_the_data(solver_schedule, exact_denoiser):
    """From sigma = 0 too, where x is x0."""
    plan = solvers.repaint(solver_schedule, [0.9, 0.5, 0.0], jump=1, repeats=2)
    alpha, sigma, _ = exact_denoiser(solver_schedule).levels(0.5)
    np.testing.assert_allclose(plan.t, [0.9, 0.5, 0.5])
    np.testing.assert_allclose(plan.to_x[1], [0, 0, alpha, 0, sigma], atol=1e-12)
