"""Stochastic solvers against their papers' updates with given noise, written as NumPy loops over the exact denoiser.

k-diffusion's letters: y = x / alpha, rho = sigma / alpha.
"""

import math

import numpy as np
import pytest

from diffjax.core import schedules, solvers

LOGSNR = np.array([-5.2, -4, -2, -1.5, 0.5, 2, 3, 4.5, 7])


@pytest.fixture
def check(solver_schedule, exact_denoiser):
    """(solver, options, loop(denoise, t, x, z) -> x at t[-1]): plan and loop with the same draws z: [M, B, 2]."""

    def compare(make, options, loop, t=None, draw=0):
        denoise = exact_denoiser(solver_schedule)
        t = solver_schedule.t_of_logsnr(LOGSNR) if t is None else t
        x, plan = denoise.start(t[0]), make(solver_schedule, t, **options)
        z = denoise.draws(plan)
        out = denoise.follow(plan, x, z)[-1]
        np.testing.assert_allclose(out, loop(denoise, t, x, z[:, draw]), rtol=1e-9, atol=1e-9 * np.abs(x).max())

    return compare


def ratio(denoise, t):
    alpha, sigma, _ = denoise.levels(t)
    return sigma / alpha


def at_ratio(denoise, y, rho):
    """x0 of y at sigma / alpha = rho."""
    t = denoise.time(-np.log(rho))
    return denoise(denoise.levels(t)[0] * y, t).x0


def ancestral(rho, rho_next, eta):
    """k-diffusion's get_ancestral_step: sigma_down, sigma_up."""
    up = min(rho_next, eta * math.sqrt(rho_next**2 * (rho**2 - rho_next**2) / rho**2))
    return math.sqrt(rho_next**2 - up**2), up


def in_ratio(update):
    """A loop of update(x0_of, rho, rho_next, y, z1, z2) -> y with two draws a step."""

    def loop(denoise, t, x, z):
        y, rho = x / denoise.levels(t[0])[0], ratio(denoise, t)
        for i in range(len(t) - 1):
            y = update(lambda y, rho: at_ratio(denoise, y, rho), rho[i], rho[i + 1], y, z[2 * i], z[2 * i + 1])
        return y * denoise.levels(t[-1])[0]

    return loop


def dpm2_ancestral(eta):
    def update(x0_of, rho, rho_next, y, _, z):
        down, up = ancestral(rho, rho_next, eta)
        middle = math.exp((math.log(rho) + math.log(down)) / 2)
        d = (y - x0_of(y, rho)) / rho
        y_mid = y + d * (middle - rho)
        return y + (y_mid - x0_of(y_mid, middle)) / middle * (down - rho) + up * z

    return update


def dpmpp_2s_ancestral(eta):
    def update(x0_of, rho, rho_next, y, _, z):
        down, up = ancestral(rho, rho_next, eta)
        t, t_next = -math.log(rho), -math.log(down)
        h = t_next - t
        middle = math.exp(-(t + h / 2))
        y_mid = middle / rho * y - math.expm1(-h / 2) * x0_of(y, rho)
        return down / rho * y - math.expm1(-h) * x0_of(y_mid, middle) + up * z

    return update


def dpmpp_sde(eta, r):
    """The step's noise is W(rho_next) - W(rho) of one Brownian path in rho, of which z1 is W(middle) - W(rho)."""

    def update(x0_of, rho, rho_next, y, z1, z2):
        t, t_next = -math.log(rho), -math.log(rho_next)
        middle = math.exp(-(t + r * (t_next - t)))
        first, rest = math.sqrt(rho - middle) * z1, math.sqrt(middle - rho_next) * z2
        whole = (first + rest) / math.sqrt(rho - rho_next)
        x0 = x0_of(y, rho)
        down, up = ancestral(rho, middle, eta)
        y_mid = down / rho * y - math.expm1(math.log(down / rho)) * x0 + up * z1
        down, up = ancestral(rho, rho_next, eta)
        share = 1 / (2 * r)
        mean = (1 - share) * x0 + share * x0_of(y_mid, middle)
        return down / rho * y - math.expm1(math.log(down / rho)) * mean + up * whole

    return update


@pytest.mark.parametrize(
    ('make', 'options', 'update'),
    [
        (solvers.dpm2_ancestral, {'eta': 1.0}, dpm2_ancestral(1.0)),
        (solvers.dpm2_ancestral, {'eta': 0.6}, dpm2_ancestral(0.6)),
        (solvers.dpmpp_2s_ancestral, {'eta': 1.0}, dpmpp_2s_ancestral(1.0)),
        (solvers.dpmpp_2s_ancestral, {'eta': 0.6}, dpmpp_2s_ancestral(0.6)),
        (solvers.dpmpp_sde, {}, dpmpp_sde(1.0, 0.5)),
        (solvers.dpmpp_sde, {'eta': 0.6, 'r': 0.3}, dpmpp_sde(0.6, 0.3)),
    ],
)
def test_ancestral(check, make, options, update):
    check(make, options, in_ratio(update))


def two_step_sde(kind, eta):
    """k-diffusion's dpmpp_2m_sde."""

    def loop(denoise, t, x, z):
        y, rho, old, h_last = x / denoise.levels(t[0])[0], ratio(denoise, t), None, None
        for i in range(len(t) - 1):
            x0, h = at_ratio(denoise, y, rho[i]), math.log(rho[i] / rho[i + 1])
            g = h * (eta + 1)
            y = rho[i + 1] / rho[i] * math.exp(-eta * h) * y - math.expm1(-g) * x0
            if old is not None:
                factor = -0.5 * math.expm1(-g) if kind == 'midpoint' else math.expm1(-g) / g + 1
                y = y + factor * h / h_last * (x0 - old)
            y = y + rho[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * z[i]
            old, h_last = x0, h
        return y * denoise.levels(t[-1])[0]

    return loop


def three_step_sde(eta, second):
    """k-diffusion's dpmpp_3m_sde with `second` times the second difference (1 there; 2 is exact)."""

    def loop(denoise, t, x, z):
        y, rho, old, hs = x / denoise.levels(t[0])[0], ratio(denoise, t), [], []
        for i in range(len(t) - 1):
            x0, h = at_ratio(denoise, y, rho[i]), math.log(rho[i] / rho[i + 1])
            g = h * (eta + 1)
            y = math.exp(-h * (eta + 1)) * y - math.expm1(-g) * x0
            phi2 = math.expm1(-g) / g + 1
            phi3 = phi2 / g - 0.5
            if len(old) == 1:
                y = y + phi2 * (x0 - old[0]) / (hs[0] / h)
            if len(old) == 2:
                r0, r1 = hs[0] / h, hs[1] / h
                near, far = (x0 - old[0]) / r0, (old[0] - old[1]) / r1
                d1 = near + (near - far) * r0 / (r0 + r1)
                y = y + phi2 * d1 - phi3 * second * (near - far) / (r0 + r1)
            y = y + rho[i + 1] * math.sqrt(-math.expm1(-2 * h * eta)) * z[i]
            old, hs = [x0, *old][:2], [h, *hs][:2]
        return y * denoise.levels(t[-1])[0]

    return loop


@pytest.mark.parametrize('eta', [1.0, 0.4])
def test_multistep_sde(check, eta):
    for kind in ('midpoint', 'heun'):
        check(solvers.dpmpp_2m_sde, {'kind': kind, 'eta': eta}, two_step_sde(kind, eta))
    check(solvers.dpmpp_3m_sde, {'eta': eta, 'halved': True}, three_step_sde(eta, 1.0))
    check(solvers.dpmpp_3m_sde, {'eta': eta}, three_step_sde(eta, 2.0))


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'churn': 3.0, 'low': 0.3, 'high': 5.0, 'noise': 1.1},
        {'churn': 1e3, 'low': 0.0, 'high': math.inf, 'noise': 1.0},
    ],
)
def test_edm(check, options):
    """Karras et al. 2022, Algorithm 2: the noise is added before the call, whose draw is that of the row before it."""
    s = {'churn': 40.0, 'low': 0.05, 'high': 50.0, 'noise': 1.003} | options

    def loop(denoise, t, x, z):
        y, rho, rows = x / denoise.levels(t[0])[0], ratio(denoise, t), 0
        for i in range(len(t) - 1):
            gamma = min(s['churn'] / (len(t) - 1), math.sqrt(2) - 1) if s['low'] <= rho[i] <= s['high'] else 0.0
            hat = rho[i] * (1 + gamma)
            if i == 0 or hat > rho[0]:  # no row before it, and no level above the first
                hat = rho[i]
            if hat > rho[i]:
                y = y + s['noise'] * math.sqrt(hat**2 - rho[i] ** 2) * z[rows - 1]
            d = (y - at_ratio(denoise, y, hat)) / hat
            euler = y + (rho[i + 1] - hat) * d
            again = (euler - at_ratio(denoise, euler, rho[i + 1])) / rho[i + 1]
            y, rows = y + (rho[i + 1] - hat) * (d + again) / 2, rows + 2
        return y * denoise.levels(t[-1])[0]

    check(solvers.edm, options, loop)


@pytest.mark.parametrize('diffusion', ['sde', 'sigma', 'constant'])
def test_euler_maruyama(solver_schedule, check, diffusion):
    """dx = (f x - (g^2 + w) / 2 score) dt + sqrt(w) dW backwards, f = alpha' / alpha, g^2 = d sigma^2/dt - 2 f sigma^2
    (Song et al. 2021b, Eq. 6 and 13 for w = g^2), with the score -eps / sigma.
    """
    schedule, scale = solver_schedule, 0.7

    def loop(denoise, t, x, z):
        for i in range(len(t) - 1):
            alpha, sigma, _ = denoise.levels(t[i])
            f = schedule.alpha_prime(t[i]) / alpha
            g2 = 2 * sigma * schedule.sigma_prime(t[i]) - 2 * f * sigma**2
            w = scale * {'sde': g2, 'sigma': sigma, 'constant': 1.0}[diffusion]
            score = -denoise(x, t[i]).eps / sigma
            drift = f * x - (g2 + w) / 2 * score
            x = x + (t[i + 1] - t[i]) * drift + math.sqrt(w * (t[i] - t[i + 1])) * z[i]
        return x

    check(solvers.euler_maruyama, {'diffusion': diffusion, 'scale': scale}, loop)


def test_consistency(check):
    """Song et al. 2023, Algorithm 1: jump to the data, and noise it again."""

    def loop(denoise, t, x, z):
        for i in range(len(t) - 1):
            alpha, sigma, _ = denoise.levels(t[i + 1])
            x = alpha * denoise(x, t[i]).x0 + sigma * z[i]
        return x

    check(solvers.consistency, {}, loop)


def test_lcm(solver_schedule, check):
    """Luo et al. 2023: f = c_skip x + c_out x0 with the timestep on the scale on which the network hears it."""

    def loop(denoise, t, x, z):
        for i in range(len(t) - 1):
            scaled = 3.0 * solver_schedule.timestep(t[i])
            f = (4.0 * x + scaled * np.sqrt(scaled**2 + 4.0) * denoise(x, t[i]).x0) / (scaled**2 + 4.0)
            alpha, sigma, _ = denoise.levels(t[i + 1])
            x = alpha * f + sigma * z[i]
        return x

    check(solvers.lcm, {'sigma_data': 2.0, 'scaling': 3.0}, loop)


def test_lcm_has_the_boundary_condition(exact_denoiser):
    """At and below a table's first entry the model is the identity, whatever the network says."""
    table = schedules.ScaledLinear()
    for t in (1e-3, 4e-4):
        plan, x = solvers.lcm(table, [t, 0.0]), np.array([[3.0, -4.0]])
        np.testing.assert_allclose(exact_denoiser(table).follow(plan, x, np.zeros((1, 1, 1, 2)))[-1], x)


@pytest.mark.parametrize('gamma', [0.3, 0.8])
def test_tcd(check, gamma):
    """Zheng et al. 2024, Algorithm 4: x at (1 - gamma) s, and from there noise by the kernel q(x_s | x_(1 - gamma) s).

    The last step goes to its end at once.
    """

    def loop(denoise, t, x, z):
        for i in range(len(t) - 1):
            last = i == len(t) - 2
            (a, s, _), (a_next, s_next, _) = (
                denoise.levels((1 - gamma * (not last)) * t[i + 1]),
                denoise.levels(t[i + 1]),
            )
            x0, eps, *_ = denoise(x, t[i])
            kept = a_next / a
            x = kept * (a * x0 + s * eps) + np.sqrt(s_next**2 - kept**2 * s**2) * z[i]
        return x

    check(solvers.tcd, {'gamma': gamma}, loop)


def integrals(tau, lam, h, gaps, special):
    """(1 + tau^2) times the integrals over [lam, lam + h] of e^(-(1 + tau^2) (lam + h - v)) l_j(v), by parts."""
    rate, n = 1 + tau**2, len(gaps)
    moments = [-np.expm1(-rate * h)]
    for k in range(1, n):
        moments.append(h**k - k / rate * moments[-1])
    if special and n == 2:
        moments[1] = rate * h**2 / 2
    return np.linalg.solve(np.vander(gaps, increasing=True).T, np.array(moments))


def sa_solver(tau_of, predictor, corrector, special=False, lowered=False):
    """Xue et al. 2023, Algorithm 1, Eq. 14 and 17: the corrector takes the predictor's noise."""

    def step(denoise, here, there, x, nodes, tau, z):
        (_, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
        h = lam_next - lam
        weights = integrals(tau, lam, h, np.array([node - lam for node, _ in nodes]), special)
        x = s_next / s * np.exp(-(tau**2) * h) * x + s_next * np.sqrt(-np.expm1(-2 * tau**2 * h)) * z
        return x + a_next * sum(w * x0 for w, (_, x0) in zip(weights, nodes))

    def loop(denoise, t, x, z):
        nodes, before, last = [], None, len(t) - 2
        for i in range(len(t) - 1):
            new, tau = (denoise.levels(t[i])[2], denoise(x, t[i]).x0), tau_of(t[i])
            if before is not None and corrector:
                used = min(corrector, last - i + 3) if lowered else corrector
                x = step(denoise, t[i - 1], t[i], before, [new, *nodes][:used], tau_of(t[i - 1]), z[i - 1])
            nodes, before = [new, *nodes], x
            used = min(predictor, last - i + 1) if lowered else predictor
            x = step(denoise, t[i], t[i + 1], x, nodes[:used], tau, z[i])
        return x

    return loop


@pytest.mark.parametrize(
    ('options', 'loop'),
    [
        ({}, sa_solver(lambda t: 1.0, 3, 4, lowered=True)),
        ({'final': 'adams'}, sa_solver(lambda t: 1.0, 3, 4)),
        ({'predictor': 4, 'corrector': 2, 'final': 'adams'}, sa_solver(lambda t: 1.0, 4, 2)),
        ({'tau': 0.6, 'predictor': 1, 'corrector': 3, 'final': 'adams'}, sa_solver(lambda t: 0.6, 1, 3)),
        ({'predictor': 2, 'corrector': 2, 'adapted': True}, sa_solver(lambda t: 1.0, 2, 2, special=True, lowered=True)),
    ],
)
def test_sa_solver(check, options, loop):
    check(solvers.sa_solver, options, loop)


def test_sa_solver_in_a_window(solver_schedule, check):
    """Noise in steps that start from times between `low` and `high`, both included."""
    t = solver_schedule.t_of_logsnr(LOGSNR)
    for corrector in (0, 3):
        options = {'low': t[5], 'high': t[2], 'predictor': 2, 'corrector': corrector, 'final': 'adams'}
        check(solvers.sa_solver, options, sa_solver(lambda time: float(t[5] <= time <= t[2]), 2, corrector))


@pytest.mark.parametrize('times', [[1.0, 0.7], [0.3, 0.0]])
@pytest.mark.parametrize(
    ('name', 'options', 'eta'),
    [
        ('dpm2_ancestral', {'eta': 0.6}, 0.6),
        ('dpmpp_2s_ancestral', {'eta': 0.6}, 0.6),
        ('dpmpp_sde', {'eta': 0.6}, 0.6),
        ('dpmpp_2m_sde', {}, 1.0),
        ('dpmpp_3m_sde', {}, 1.0),
        ('sa_solver', {}, 1.0),
        ('euler_maruyama', {}, 1.0),
    ],
)
def test_steps_at_the_ends_are_ddims(exact_denoiser, name, options, eta, times):
    """From alpha = 0, whence only fresh noise leads on, and to sigma = 0, where none is left."""
    cosine = schedules.Cosine()
    exact = exact_denoiser(cosine)
    plan, ddim = getattr(solvers, name)(cosine, times, **options), solvers.ddim(cosine, times, eta=eta)
    assert plan.num_evaluations == 1
    x = exact.start(times[0])
    out, expected = (exact.follow(p, x, exact.draws(p))[-1] for p in (plan, ddim))
    np.testing.assert_allclose(out, expected, atol=1e-9)


@pytest.mark.parametrize('make', [solvers.dpm2_ancestral, solvers.euler_maruyama])
def test_a_step_from_nearly_pure_noise_is_taken_as_from_pure_noise(make):
    """The squared cosine's table ends at sigma / alpha = 2e4: no coefficient is large there, and the first row leaves
    what the estimate says, noised again, as from alpha = 0.
    """
    schedule, grid = schedules.SquaredCos(), [1.0, 0.6, 0.2, 0.0]
    assert 1e4 < schedule.sigma(np.float64(1)) / schedule.alpha(np.float64(1)) < np.inf
    plan = make(schedule, grid)
    alpha, sigma = schedule.alpha(np.float64(0.6)), schedule.sigma(np.float64(0.6))
    of_x, noise = plan.to_x[0, 0], plan.to_x[0, -1]
    assert of_x == 0
    np.testing.assert_allclose(plan.remember[0, 0], alpha)
    np.testing.assert_allclose(np.hypot(plan.remember[0, 1], noise), sigma)
    for table in (plan.remember, plan.to_x, plan.to_anchor):
        assert np.abs(table).max() < 30
