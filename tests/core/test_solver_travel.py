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
    """Lugmayr et al. 2022, Algorithm 1 with jumps: each piece `repeats` times, the last, to sigma = 0, once."""
    denoise = exact_denoiser(solver_schedule)
    grid = np.array([0.9, 0.7, 0.5, 0.3, 0.0])
    plan = solvers.repaint(solver_schedule, grid, jump=2, repeats=3)
    np.testing.assert_allclose(plan.t, [0.9, 0.7, 0.9, 0.7, 0.9, 0.7, 0.5, 0.3])
    assert list(np.flatnonzero(plan.to_x[:, -1])) == [1, 3]
    (a, s, _), (b, r, _) = denoise.levels(0.5), denoise.levels(0.9)
    np.testing.assert_allclose(plan.to_x[[1, 3], -1], math.sqrt(r**2 - (b / a * s) ** 2))
    once = solvers.ddpm(solver_schedule, grid)
    np.testing.assert_allclose(plan.to_x[[4, 5, 6, 7], :-1], once.to_x)
    np.testing.assert_allclose(plan.to_x[[0, 2], :-1], once.to_x[[0, 0]])
    np.testing.assert_allclose(plan.to_x[[1, 3], :-1], b / a * once.to_x[[1, 1]])
    for jump, repeats, count in ((1, 2, 2 * 3 + 1), (4, 5, 4), (3, 2, 2 * 3 + 1), (10, 10, 4)):
        assert solvers.repaint(solver_schedule, grid, jump=jump, repeats=repeats).num_evaluations == count
    large = solvers.repaint(solver_schedule, grid, jump=2, repeats=2, variance='large')
    np.testing.assert_allclose(large.to_x[-4:, :-1], solvers.ddpm(solver_schedule, grid, variance='large').to_x)


def test_the_way_up_keeps_the_distribution(solver_schedule, exact_denoiser):
    """x after a jump is alpha x0 + sigma eps again: mean and variance for one x0, from the row's coefficients."""
    denoise = exact_denoiser(solver_schedule)
    for plan, row, low, high in (
        (solvers.repaint(solver_schedule, [0.9, 0.7, 0.5, 0.2], jump=2, repeats=2), 1, 0.5, 0.9),
        (solvers.repaint(solver_schedule, [0.9, 0.2, 0.1], jump=1, repeats=2), 0, 0.2, 0.9),
    ):
        (a, s, _), (b, r, _) = denoise.levels(low), denoise.levels(high)
        plain = solvers.ddpm(solver_schedule, [plan.t[row], low])
        kept = plan.to_x[row, 0] / plain.to_x[0, 0]
        assert kept * a == pytest.approx(b)
        assert (kept * s) ** 2 + plan.to_x[row, -1] ** 2 == pytest.approx(r**2)
