"""Plans as tables: DDIM, DDPM and Euler in their papers' letters, what each solver evaluates, and what equals what."""

import numpy as np
import pytest

from diffjax.components import parse_component
from diffjax.core import oracles, schedules, solvers

MIXTURE = oracles.gmm2d()


@pytest.fixture
def schedule(solver_schedule):
    return solver_schedule


def denoise(schedule, x, t):
    """(x0, eps, alpha, sigma) at t, float64."""
    alpha, sigma = schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t))
    guess = MIXTURE.posterior(x, alpha, sigma)
    return guess.x0, guess.eps, alpha, sigma


def ddim_loop(schedule, x, grid):
    """Song et al. 2021a, Eq. 12 with eta = 0."""
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


def velocity(x, t):
    """eps - x0 on the straight line."""
    x0, eps, _, _ = denoise(schedules.Flow(), x, t)
    return eps - x0


def test_runge_kutta_in_t_is_on_the_velocity(program):
    flow = schedules.Flow()
    run, grid = program(flow), np.linspace(1, 0.1, 10)
    heun = rk4 = start = run.start(1.0)
    for t, s in zip(grid[:-1], grid[1:]):
        first = velocity(heun, t)
        heun = heun + (s - t) * 0.5 * (first + velocity(heun + (s - t) * first, s))
        h, k = s - t, [velocity(rk4, t)]
        k += [velocity(rk4 + h / 2 * k[0], t + h / 2)]
        k += [velocity(rk4 + h / 2 * k[1], t + h / 2)]
        k += [velocity(rk4 + h * k[2], s)]
        rk4 = rk4 + h / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3])
    np.testing.assert_allclose(run(solvers.heun(flow, grid, coordinate='t'), start), heun, atol=1e-11)
    np.testing.assert_allclose(run(solvers.rk4(flow, grid, coordinate='t'), start), rk4, atol=1e-11)


def test_lms_in_t_is_adams_bashforth_on_the_velocity(program):
    """Equal steps: 3/2 and -1/2, then 23/12, -16/12 and 5/12."""
    flow = schedules.Flow()
    run, grid = program(flow), np.linspace(1, 0, 10)
    x, seen, start = run.start(1.0), [], run.start(1.0)
    for t, s in zip(grid[:-1], grid[1:]):
        seen = [velocity(x, t), *seen][:3]
        weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}[len(seen)]
        x = x + (s - t) * sum(w * v for w, v in zip(weights, seen))
    np.testing.assert_allclose(run(solvers.lms(flow, grid, order=3, coordinate='t'), start), x, atol=1e-11)


def test_the_first_and_last_steps_of_2m_are_ddims(schedule):
    """From alpha = 0, to sigma = 0 without a history, from sigma = 0 and to alpha = 0 the row is ddim's."""
    for grid in ([1.0, 0.7], [0.3, 0.0], [0.0, 0.2], [0.8, 1.0]):
        t, s = (np.float64(time) for time in grid)
        plan, x = solvers.dpmpp_2m(schedule, grid), np.array([0.3, -2.0])
        x0, eps, _, _ = denoise(schedule, x[None], t)
        p, q = plan.remember[0]
        out = plan.to_x[0, 0] * x + plan.to_x[0, 2] * (p * x0 + q * eps)
        np.testing.assert_allclose(out, schedule.alpha(s) * x0 + schedule.sigma(s) * eps, atol=1e-9)


IN_A_STEP = {  # evaluations of an inner step; 1 where it ends at sigma = 0 or touches what is infinite
    'dpm2': 2,
    'dpm2_ancestral': 2,
    'dpmpp_2s': 2,
    'dpmpp_2s_ancestral': 2,
    'dpmpp_3s': 3,
    'dpmpp_sde': 2,
    'edm': 2,
    'heun': 2,
    'restart': 2,
    'rk4': 4,
}


def evaluations(solver, steps, inner):
    """As the docstrings have it: `steps` of which `inner` touch neither alpha = 0 nor sigma = 0."""
    name, options = solver.name, solver.options
    each = options['order'] if name == 'dpm_solver' else IN_A_STEP.get(name, 1)
    if options.get('stages') == 'grid':
        each = 1
    total = steps - inner + each * inner
    if options.get('start') == 'singlestep' and inner:
        total += 2
    if name == 'pndm' and inner:
        total += 1 if options['warmup'] == 'plms' else 3 * min(inner, 3)
    if name == 'restart' and options.get('num_restarts') != 0:
        total += options.get('num_restarts', 1) * 2 * options.get('num_steps', 5)
    return total


def test_rows_are_evaluations(schedule, solver):
    if solver.name == 'repaint':
        pytest.skip('goes back up: counted in test_solver_travel.py')
    touches = solver.options.get('coordinate', 'sigma/alpha') == 'sigma/alpha' and schedule.alpha(np.float64(1)) == 0
    for steps in (1, 2, 9):
        for top, bottom in ((0.9, 0.0), (0.9, 0.02), (1.0, 0.02)):
            inner = steps - (bottom == 0) - (top == 1 and touches)
            if solver.name == 'restart' and solver.options.get('num_restarts') != 0:
                grid = schedule.t_of_logsnr(np.linspace(-4, 4, steps + 1))  # ends below sigma / alpha = 0.5
                inner = steps
            else:
                grid = np.linspace(top, bottom, steps + 1)
            plan = solver.make(schedule, grid)
            assert plan.num_evaluations == len(plan.t) == evaluations(solver, steps, inner), (steps, top, bottom)
            assert plan.live.all() and plan.t[0] == grid[0]


def test_padding_keeps_the_plan(solver, program, exact_denoiser):
    """Padded and followed by the compiled loop, or as it is by a plain one, noise being none."""
    flow = schedules.Flow()
    run, exact = program(flow), exact_denoiser(flow)
    plan = solver.make(flow, np.linspace(1, 0, 10))
    drawn = plan.to_x[:, 2 + plan.num_remembered :], plan.to_anchor[:, 2 + plan.num_remembered :]
    assert any(np.any(columns) for columns in drawn) == solver.stochastic
    for columns in drawn:
        columns[:] = 0
    x = run.start(1.0)
    np.testing.assert_allclose(run(plan, x), exact.follow(plan, x)[-1], atol=1e-9)
    padded = run.pad(plan)
    assert padded.num_evaluations == plan.num_evaluations
    assert (len(padded.t), padded.num_remembered, padded.num_noises) == (run.ROWS, run.REMEMBERED, run.NOISES)


def test_every_setting_has_an_effect(settings):
    """Two settings of a solver are two tables, on a grid to t = 0 or on one that ends before."""
    flow = schedules.Flow()
    uneven = flow.t_of_logsnr(np.array([-7.0, -5, -2, -1.5, 0.5, 2, 3, 4.5, 8]))
    for some in settings.values():
        tables = {}
        for setting in some:
            plans = [setting.make(flow, uneven), setting.make(flow, np.append(uneven, 0.0))]
            table = tuple(np.round(column.astype(float), 12).tobytes() for plan in plans for column in plan)
            assert table not in tables, (setting.name, setting.options, tables.get(table))
            tables[table] = setting.options


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('euler_ancestral', 'ddim:eta=1'),
        ('euler_ancestral:eta=0.4', 'ddim:eta=0.4'),
        ('ddpm', 'ddim:eta=1'),
        ('sa_solver:predictor=1,corrector=0,final=euler', 'ddpm'),
        ('repaint:repeats=1', 'ddpm'),
        ('tcd:gamma=1', 'consistency'),
        ('lcm:sigma_data=1e-9', 'consistency'),
        ('tcd:gamma=0', 'ddim'),
        ('euler', 'ddim'),
        ('lms:order=1', 'ddim'),
        ('deis:order=1', 'ddim'),
        ('dpm_solver_m:order=1', 'ddim'),
        ('dpm_solver:order=1', 'ddim'),
        ('deis:order=4,polynomial=sigma/alpha', 'lms:order=4'),
        ('dpm_solver:order=2', 'dpm2'),
        ('edm:churn=0', 'heun'),
        ('restart:num_restarts=0', 'heun'),
        ('dpm2_ancestral:eta=0', 'dpm2'),
        ('dpmpp_2s_ancestral:eta=0', 'dpmpp_2s'),
        ('dpmpp_sde:eta=0', 'dpmpp_2s'),
        ('dpmpp_2m_sde:eta=0', 'dpmpp_2m:final=euler'),
        ('dpmpp_2m_sde:eta=0,final=adams', 'dpmpp_2m'),
        ('dpmpp_3m_sde:eta=0', 'dpmpp_3m:final=euler'),
        ('dpmpp_3m_sde:eta=0,halved=true', 'dpmpp_3m:final=euler,halved=true'),
        ('sa_solver:tau=0,corrector=0,final=adams', 'dpmpp_3m'),
        ('sa_solver:tau=1,predictor=3,corrector=0,final=euler', 'dpmpp_3m_sde'),
        ('euler_maruyama:scale=0', 'euler:coordinate=t'),
    ],
)
def test_equal_solvers(schedule, exact_denoiser, one, other):
    """Two names of one method: the same states from the same noise, from t = 1 to t = 0."""
    exact = exact_denoiser(schedule)
    grid = np.append(1.0, schedule.t_of_logsnr(np.array([-3.0, -1.8, -1, 0.5, 2, 3.5, 5, 7])))
    if 'deis' not in one or 'order=1' in one:  # at sigma = 0 lms goes on with four nodes, deis with three
        grid = np.append(grid, 0.0)
    outs = []
    for spec in (one, other):
        name, options = parse_component(spec, 'solver')
        plan = getattr(solvers, name)(schedule, grid, **options)
        outs.append(exact.follow(plan, exact.start(1.0), exact.draws(plan))[-1])
    np.testing.assert_allclose(*outs, atol=1e-8)


def test_nothing_retraces(program):
    """Another solver, step count, guidance scale, seed, class: the denoiser is not traced again."""
    schedule = schedules.Cosine()
    run = program(schedule)
    x = run.start(1.0)
    run(solvers.ddim(schedule, np.linspace(1, 0, 9)), x)
    traces, results = run.traces, []
    for name in solvers.__all__:
        for num_steps in (3, 20):
            plan = getattr(solvers, name)(schedule, np.linspace(1, 0.04, num_steps + 1))
            for scale, seed, label in ((1.0, 0, -1), (2.5, 0, 2), (2.5, 7, 2)):
                results.append(run(plan, x, scale=scale, seed=seed, cond=np.full(len(x), label)))
    assert run.traces == traces
    assert run.compiled._cache_size() == 1
    assert len({r.tobytes() for r in results}) > len(solvers.__all__) * 4  # and they did change something


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('ddpm:variance=medium', "ddpm's variance is one of small, large, learned; got 'medium'"),
        ('ddim:eta=-0.1', "ddim's eta is a number from 0 on and at most 1, got -0.1"),
        ('ddim:eta=1.5', "ddim's eta is a number from 0 on and at most 1, got 1.5"),
        ('euler:coordinate=logsnr', "sigma/alpha, t, angle; got 'logsnr'"),
        ('heun:coordinate=logsnr', "sigma/alpha, t, angle; got 'logsnr'"),
        ('rk4:coordinate=logsnr', "sigma/alpha, t, angle; got 'logsnr'"),
        ('lms:coordinate=logsnr', "sigma/alpha, t, angle; got 'logsnr'"),
        ('lms:order=5', "lms's order is one of 1, 2, 3, 4; got 5"),
        ('pndm:warmup=none', "warmup is one of plms, prk; got 'none'"),
        ('dpm_solver:order=4', "dpm_solver's order is one of 1, 2, 3; got 4"),
        ('dpm_solver:stages=inside', "stages is one of between, grid; got 'inside'"),
        ('dpmpp_2s:stages=inside', "stages is one of between, grid; got 'inside'"),
        ('dpmpp_3s:stages=inside', "stages is one of between, grid; got 'inside'"),
        ('dpm_solver_m:order=0', "dpm_solver_m's order is one of 1, 2, 3; got 0"),
        ('deis:order=5', "deis's order is one of 1, 2, 3, 4; got 5"),
        ('deis:polynomial=rho', "polynomial is one of .*; got 'rho'"),
        ('unipc:order=5', "unipc's order is one of 1, 2, 3, 4; got 5"),
        ('unipc:variant=bh3', "variant is one of bh1, bh2; got 'bh3'"),
        ('unipc:predict=v', "predict is one of x0, eps; got 'v'"),
        ('unipc:polynomial=rho', "polynomial is one of .*; got 'rho'"),
        ('unipc:variant=bh1,polynomial=angle', 'variant=bh1 is felt with polynomial=logsnr alone, got .*=angle'),
        ('unipc:knee=2', "unipc's knee is that of polynomial=softplus, got polynomial=logsnr"),
        ('unipc:knee=0,polynomial=softplus', "unipc's knee is a number above 0, got 0"),
        ('dpmpp_2m:final=zero', "final is one of adams, euler, lower; got 'zero'"),
        ('dpmpp_3m:start=best', "start is one of multistep, singlestep; got 'best'"),
        ('dpmpp_2m_sde:kind=rk', "kind is one of midpoint, heun; got 'rk'"),
        ('dpmpp_2m_sde:eta=-1', "dpmpp_2m_sde's eta is a number from 0 on, got -1"),
        ('dpmpp_3m_sde:eta=-1', "dpmpp_3m_sde's eta is a number from 0 on, got -1"),
        ('dpm2_ancestral:eta=2', "dpm2_ancestral's eta is a number from 0 on and at most 1, got 2"),
        ('dpmpp_2s_ancestral:eta=2', "dpmpp_2s_ancestral's eta is a number from 0 on and at most 1, got 2"),
        ('dpmpp_sde:eta=2', "dpmpp_sde's eta is a number from 0 on and at most 1, got 2"),
        ('dpmpp_sde:r=1', "dpmpp_sde's r is a number above 0 and below 1, got 1"),
        ('edm:churn=-3', "edm's churn is a number from 0 on, got -3"),
        ('edm:noise=-1', "edm's noise is a number from 0 on, got -1"),
        ('edm:low=3,high=2', 'edm takes low <= high, got low = 3 and high = 2'),
        ('lcm:scaling=0', "lcm's scaling is a number above 0, got 0"),
        ('lcm:sigma_data=0', "lcm's sigma_data is a number above 0, got 0"),
        ('sa_solver:low=0.6,high=0.5', 'sa_solver takes low <= high, got low = 0.6 and high = 0.5'),
        ('sa_solver:high=2', "sa_solver's high is a number from 0 on and at most 1, got 2"),
        ('euler_maruyama:scale=-3', "euler_maruyama's scale is a number from 0 on, got -3"),
        ('euler_maruyama:diffusion=big', "diffusion is one of sde, sigma, constant; got 'big'"),
        ('tcd:gamma=1.5', "tcd's gamma is a number from 0 on and at most 1, got 1.5"),
        ('sa_solver:tau=-1', "sa_solver's tau is a number from 0 on, got -1"),
        ('sa_solver:predictor=5', "sa_solver's predictor is one of 1, 2, 3, 4; got 5"),
        ('sa_solver:corrector=1', "sa_solver's corrector is one of 0, 2, 3, 4; got 1"),
        ('restart:low=0.01', 'a time at or below sigma / alpha = 0.01; the lowest above 0 is 0.111'),
        ('restart:low=2', 'restart takes low <= high, got low = 2 and high = 1.0'),
        ('restart:low=1', 'from low up to high, got low = 1 and high = 1.0'),
        ('repaint:jump=0', "repaint's jump is a number from 1 on, got 0"),
        ('repaint:repeats=0', "repaint's repeats is a number from 1 on, got 0"),
        ('repaint:jump=1.5', "repaint's jump is a whole number, got 1.5"),
        ('restart:low=0.5,num_steps=0', "restart's num_steps is a number from 1 on, got 0"),
        ('repaint:variance=medium', "variance is one of small, large, learned; got 'medium'"),
    ],
)
def test_bad_settings_are_refused(spec, message):
    name, options = parse_component(spec, 'solver')
    with pytest.raises(ValueError, match=message):
        getattr(solvers, name)(schedules.Flow(), [0.95, 0.58, 0.1], **options)
