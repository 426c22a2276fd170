"""Plans as tables: each solver against its paper's update, written as a plain NumPy loop over the exact denoiser."""

import numpy as np
import pytest

from diffjax.core import oracles, schedules, solvers
from diffjax.core.sampling import pad

MIXTURE = oracles.gmm2d()


@pytest.fixture
def schedule(solver_schedule):
    return solver_schedule


@pytest.fixture
def grid(solver_grid):
    return solver_grid


def denoise(schedule, x, t):
    """(x0, eps, alpha, sigma) at t, float64."""
    alpha, sigma = schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t))
    guess = MIXTURE.posterior(x, alpha, sigma)
    return guess.x0, guess.eps, alpha, sigma


def ddim_loop(schedule, x, grid):
    """Song et al. 2021, Eq. 12 with eta = 0."""
    for t, s in zip(grid[:-1], grid[1:]):
        x0, eps, _, _ = denoise(schedule, x, t)
        x = schedule.alpha(np.float64(s)) * x0 + schedule.sigma(np.float64(s)) * eps
    return x


def test_ddim_is_the_formula(schedule, program):
    run = program(schedule)
    grid = np.linspace(1, 0, 14)
    x = run.start(1.0)
    np.testing.assert_allclose(run(solvers.ddim(schedule, grid), x), ddim_loop(schedule, x, grid), atol=1e-10)


def test_ddim_in_betas(program):
    """FORMULAS: sqrt(abar_s) (x - sqrt(1 - abar_t) eps) / sqrt(abar_t) + sqrt(1 - abar_s) eps, on DDPM's own table."""
    run = program(schedules.Linear())
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    steps = np.array([999, 749, 499, 249, 49])
    x = start = run.start(1.0)
    for i, j in zip(steps[:-1], steps[1:]):
        eps = MIXTURE.posterior(x, np.sqrt(abar[i]), np.sqrt(1 - abar[i])).eps
        x = np.sqrt(abar[j]) * (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i]) + np.sqrt(1 - abar[j]) * eps
    out = run(solvers.ddim(schedules.Linear(), (steps + 1) / 1000), start)
    np.testing.assert_allclose(out, x, atol=1e-9)


def as_x_and_eps(plan, row, alpha, sigma):
    """A first row's next x as (factor of x, of eps, of z): x0 = (x - sigma eps) / alpha put in."""
    p, q = plan.remember[row]
    of_x, _, of_h, of_z = plan.to_x[row]
    return of_x + of_h * p / alpha, of_h * (q - p * sigma / alpha), of_z


@pytest.mark.parametrize('variance', ['small', 'large'])
def test_ddpm_is_algorithm_2(variance):
    """x_{t-1} = (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + std z (Ho et al. 2020), z = 0 in the last step."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    linear = schedules.Linear()
    plan = solvers.ddpm(linear, np.linspace(1, 0, 1001), variance=variance)
    assert plan.num_evaluations == 1000
    for i in (999, 500, 10, 1, 0):
        before = abar[i - 1] if i else 1.0
        var = betas[i] if variance == 'large' else betas[i] * (1 - before) / (1 - abar[i])
        row = as_x_and_eps(plan, 999 - i, np.sqrt(abar[i]), np.sqrt(1 - abar[i]))
        scale = 1 / np.sqrt(1 - betas[i])
        expected = (scale, -scale * betas[i] / np.sqrt(1 - abar[i]), np.sqrt(var) if i else 0.0)
        np.testing.assert_allclose(row, expected, rtol=1e-6)
        assert linear.timestep(plan.t[999 - i]) == pytest.approx(i, abs=1e-9)


def test_ddim_with_eta_one_is_ddpm(schedule, program):
    """Same rows, same noise, same samples, from alpha = 0 to sigma = 0."""
    run = program(schedule)
    grid = schedule.t_of_logsnr(np.append(np.linspace(-20, 8, 15), 200.0))
    grid[[0, -1]] = 1, 0
    grid = grid[np.append(np.diff(grid) < 0, True)]
    x = run.start(1.0)
    ancestral = run(solvers.ddpm(schedule, grid), x, seed=3)
    np.testing.assert_allclose(run(solvers.ddim(schedule, grid, eta=1.0), x, seed=3), ancestral, atol=1e-7)
    assert np.abs(run(solvers.ddpm(schedule, grid), x, seed=4) - ancestral).max() > 1e-2


def test_euler_ancestral_is_ddim_with_eta_one():
    """Euler in sigma / alpha to sigma_down, then sigma_up of noise, on VE (FORMULAS): sigma_up^2 =
    s_s^2 (s_t^2 - s_s^2) / s_t^2 and sigma_down^2 = s_s^2 - sigma_up^2.
    """
    ve = schedules.VE()
    t, s = 0.8, 0.6
    high, low = ve.sigma(np.float64(t)), ve.sigma(np.float64(s))
    up = np.sqrt(low**2 * (high**2 - low**2) / high**2)
    down = np.sqrt(low**2 - up**2)
    row = as_x_and_eps(solvers.ddim(ve, [t, s], eta=1.0), 0, 1.0, high)
    np.testing.assert_allclose(row, (1.0, down - high, up), rtol=1e-9)


def test_eta_scales_the_noise(schedule):
    """Eq. 16: std = eta sqrt(sigma_s^2 / sigma_t^2) sqrt(1 - (alpha_t / alpha_s)^2 sigma_s^2 / sigma_t^2 ...)."""
    t, s = np.float64(0.8), np.float64(0.5)
    a_t, a_s, s_t, s_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    variance = (s_s / s_t) ** 2 * (s_t**2 - (a_t / a_s * s_s) ** 2)
    for eta in (0.3, 1.0):
        plan = solvers.ddim(schedule, [t, s], eta=eta)
        assert plan.to_x[0, 3] == pytest.approx(eta * np.sqrt(variance), rel=1e-8)
        assert plan.remember[0, 1] == pytest.approx(np.sqrt(s_s**2 - eta**2 * variance), rel=1e-8)


def test_euler_in_sigma_over_alpha_is_ddim(schedule, program):
    run = program(schedule)
    grid = np.linspace(1, 0, 12)
    x = run.start(1.0)
    out = run(solvers.euler(schedule, grid), x)
    scale = np.abs(x).max()
    np.testing.assert_allclose(out, run(solvers.ddim(schedule, grid), x), atol=1e-12 * scale)


def test_euler_in_t_on_the_straight_line_is_ddim(program):
    flow = schedules.Flow()
    run, grid = program(flow), np.linspace(1, 0, 12)
    x = run.start(1.0)
    out = run(solvers.euler(flow, grid, coordinate='t'), x)
    np.testing.assert_allclose(out, run(solvers.ddim(flow, grid), x), atol=1e-12)
    for t, s in zip(grid[:-1], grid[1:]):  # x_s = x_t - (t - s) v
        x0, eps, _, _ = denoise(flow, x, t)
        x = x - (t - s) * (eps - x0)
    np.testing.assert_allclose(out, x, atol=1e-12)


def test_heun_is_karras_algorithm_1(program):
    edm = schedules.EDM()
    run = program(edm)
    sigma = np.append(np.linspace(80 ** (1 / 7), 0.05 ** (1 / 7), 10) ** 7, 0)
    x = start = run.start(1.0)
    for i in range(10):
        d = (x - MIXTURE.posterior(x, 1.0, sigma[i]).x0) / sigma[i]
        euler = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            again = (euler - MIXTURE.posterior(euler, 1.0, sigma[i + 1]).x0) / sigma[i + 1]
            euler = x + (sigma[i + 1] - sigma[i]) * 0.5 * (d + again)
        x = euler
    np.testing.assert_allclose(run(solvers.heun(edm, sigma / 80), start), x, atol=1e-9)


def test_heun_in_t_is_heun_on_the_velocity(program):
    flow = schedules.Flow()
    run, grid = program(flow), np.linspace(1, 0.1, 10)
    x = start = run.start(1.0)
    for t, s in zip(grid[:-1], grid[1:]):
        x0, eps, _, _ = denoise(flow, x, t)
        x0_s, eps_s, _, _ = denoise(flow, x + (s - t) * (eps - x0), s)
        x = x + (s - t) * 0.5 * (eps - x0 + eps_s - x0_s)
    np.testing.assert_allclose(run(solvers.heun(flow, grid, coordinate='t'), start), x, atol=1e-11)


def test_dpmpp_2m_is_the_papers_algorithm_2(schedule, program):
    """Lu et al. 2022b: lambda = log(alpha / sigma), r_i = h_{i-1} / h_i."""
    run = program(schedule)
    grid = schedule.t_of_logsnr(np.array([-7.0, -5, -2, -1.5, 0.5, 3, 4, 8]))
    x = start = run.start(grid[0])
    lam = np.log(schedule.alpha(grid) / schedule.sigma(grid))
    before = None
    for i in range(1, len(grid)):
        x0, _, _, sigma = denoise(schedule, x, grid[i - 1])
        h = lam[i] - lam[i - 1]
        guess = x0
        if before is not None:
            r = (lam[i - 1] - lam[i - 2]) / h
            guess = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        alpha_s, sigma_s = schedule.alpha(grid[i]), schedule.sigma(grid[i])
        x = sigma_s / sigma * x - alpha_s * (np.exp(-h) - 1) * guess
        before = x0
    np.testing.assert_allclose(run(solvers.dpmpp_2m(schedule, grid), start), x, atol=1e-9)


def test_the_first_and_last_steps_of_2m_are_ddims(schedule):
    """From alpha = 0, to sigma = 0, from sigma = 0 and to alpha = 0 the row is ddim's."""
    for grid in ([1.0, 0.7], [0.3, 0.0], [0.0, 0.2], [0.8, 1.0]):
        t, s = (np.float64(time) for time in grid)
        plan, x = solvers.dpmpp_2m(schedule, grid), np.array([0.3, -2.0])
        x0, eps, _, _ = denoise(schedule, x[None], t)
        p, q = plan.remember[0]
        out = plan.to_x[0, 0] * x + plan.to_x[0, 2] * (p * x0 + q * eps)
        np.testing.assert_allclose(out, schedule.alpha(s) * x0 + schedule.sigma(s) * eps, atol=1e-9)


def test_rows_are_evaluations(schedule, solver):
    name, _, make = solver
    for num_steps in (1, 2, 9):
        to_zero = make(schedule, np.linspace(0.9, 0, num_steps + 1))
        inner = make(schedule, np.linspace(0.9, 0.2, num_steps + 1))
        expected = {'heun': (2 * num_steps - 1, 2 * num_steps)}.get(name, (num_steps, num_steps))
        assert (to_zero.num_evaluations, inner.num_evaluations) == expected
        assert len(to_zero.t) == to_zero.num_evaluations and to_zero.live.all()
        padded = pad(to_zero, 30, 4, 3)
        assert padded.num_evaluations == expected[0]
        assert (len(padded.t), padded.num_remembered, padded.num_noises) == (30, 4, 3)


def test_plans_are_finite_float64(schedule, solver, grid):
    _, _, make = solver
    plan = make(schedule, grid(schedule, 7))
    for column in plan:
        assert np.isfinite(column).all()
    assert plan.to_x.dtype == plan.t.dtype == np.float64
    assert plan.t[0] == grid(schedule, 7)[0]
    top = plan.t[0]
    np.testing.assert_allclose(plan.start, [schedule.alpha(top), schedule.sigma(top)])


@pytest.mark.parametrize(
    'grid', [[0.5], [], [0.9, 0.5, 0.6], [0.5, 0.5], [1.2, 0.3], [0.4, -0.1], [[0.9, 0.1]], [1.0, float('nan'), 0.0]]
)
def test_bad_grids_are_refused(solver, grid):
    with pytest.raises(ValueError, match='at least two times in'):
        solver[2](schedules.Flow(), grid)


def test_bad_settings_are_refused():
    flow, falling, rising = schedules.Flow(), [1.0, 0.5, 0.0], [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="'small', 'large' or 'learned', got 'medium'"):
        solvers.ddpm(flow, falling, variance='medium')
    with pytest.raises(ValueError, match='needs a falling grid'):
        solvers.ddpm(flow, rising)
    for eta in (-0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='eta lies in'):
            solvers.ddim(flow, falling, eta=eta)
    with pytest.raises(ValueError, match='rising grid ddim is deterministic'):
        solvers.ddim(flow, rising, eta=0.5)
    for make in (solvers.euler, solvers.heun):
        with pytest.raises(ValueError, match="sigma/alpha, t, angle; got 'logsnr'"):
            make(flow, falling, coordinate='logsnr')
