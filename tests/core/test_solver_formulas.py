"""Deterministic solvers against their papers' updates, each written as a plain NumPy loop over the exact denoiser.

Nothing of the solvers' machinery is used: integrals stand in closed form, or SciPy does them.
"""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammainc

from diffjax.core import schedules, solvers

LOGSNR = np.array([-7.0, -5, -2, -1.5, 0.5, 2, 3, 4.5, 8])  # uneven, so that no ratio of steps is 1


@pytest.fixture
def check(solver_schedule, exact_denoiser):
    """(solver, options, loop(denoise, t, x) -> x at t[-1]): the plan leads to what the loop does."""

    def compare(make, options, loop, t=None):
        denoise = exact_denoiser(solver_schedule)
        t = solver_schedule.t_of_logsnr(LOGSNR) if t is None else t
        x = denoise.start(t[0])
        out = denoise.follow(make(solver_schedule, t, **options), x)[-1]
        np.testing.assert_allclose(out, loop(denoise, t, x), rtol=1e-9, atol=1e-9 * np.abs(x).max())

    return compare


def runge_kutta(denoise, t, x, step):
    """y = x / alpha over rho = sigma / alpha, dy/drho = eps; step(slope, rho, rho_next, y) -> y."""

    def slope(y, rho):
        time = denoise.time(-np.log(rho))
        return denoise(denoise.levels(time)[0] * y, time).eps

    for here, there in zip(t, t[1:]):
        (a, s, _), (a_next, s_next, _) = denoise.levels(here), denoise.levels(there)
        x = a_next * step(slope, s / a, s_next / a_next, x / a)
    return x


def classical(slope, u, v, y):
    """Kutta 1901."""
    h = v - u
    k1 = slope(y, u)
    k2 = slope(y + h / 2 * k1, u + h / 2)
    k3 = slope(y + h / 2 * k2, u + h / 2)
    k4 = slope(y + h * k3, v)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def trapezium(slope, u, v, y):
    """Karras et al. 2022, Algorithm 1."""
    first = slope(y, u)
    return y + (v - u) * (first + slope(y + (v - u) * first, v)) / 2


def geometric_midpoint(slope, u, v, y):
    middle = math.sqrt(u * v)
    return y + (v - u) * slope(y + (middle - u) * slope(y, u), middle)


@pytest.mark.parametrize(
    ('make', 'options', 'step'),
    [
        (solvers.rk4, {}, classical),
        (solvers.heun, {}, trapezium),
        (solvers.edm, {'churn': 0.0}, trapezium),
        (solvers.restart, {'num_restarts': 0}, trapezium),
        (solvers.dpm2, {}, geometric_midpoint),
        (solvers.dpm2_ancestral, {'eta': 0.0}, geometric_midpoint),
        (solvers.euler, {}, lambda slope, u, v, y: y + (v - u) * slope(y, u)),
        (solvers.ddim, {}, lambda slope, u, v, y: y + (v - u) * slope(y, u)),
    ],
)
def test_runge_kutta(check, make, options, step):
    check(make, options, lambda denoise, t, x: runge_kutta(denoise, t, x, step))


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_lms(check, order):
    """Adams-Bashforth in sigma / alpha: the integrals of Lagrange's polynomials, by their coefficients."""

    def loop(denoise, t, x):
        eps, rho = [], []
        for here, there in zip(t, t[1:]):
            (a, s, _), (a_next, s_next, _) = denoise.levels(here), denoise.levels(there)
            eps, rho = [denoise(x, here).eps, *eps][:order], [s / a, *rho][:order]
            y = x / a
            for j in range(len(rho)):
                others = np.delete(rho, j)
                integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(rho[j] - others))
                y = y + (np.polyval(integral, s_next / a_next) - np.polyval(integral, s / a)) * eps[j]
            x = a_next * y
        return x

    check(solvers.lms, {'order': order}, loop)
    check(solvers.deis, {'order': order, 'polynomial': 'sigma/alpha'}, loop)


def moments(form, lam, h, count, rate=1.0):
    """Of (v - lam)^k, k < count, over [lam, lam + h]: integrals of rate e^(-rate (lam + h - v)) for x0, of -e^(-v) for
    eps. By parts; by the incomplete gamma function.
    """
    if form == 'eps':
        return np.array([-np.exp(-lam) * math.factorial(k) * gammainc(k + 1, h) for k in range(count)])
    found = [-np.expm1(-rate * h)]
    for k in range(1, count):
        found.append(h**k - k / rate * found[-1])
    return np.array(found)


def combine(form, denoise, here, there, nodes, x):
    """The exact step for the polynomial in lambda through the nodes, [(lam, estimate)]."""
    (a, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
    gaps = np.array([node - lam for node, _ in nodes])
    powers = np.vander(gaps, increasing=True).T
    weights = np.linalg.solve(powers, moments(form, lam, lam_next - lam, len(nodes)))
    total = sum(w * estimate for w, (_, estimate) in zip(weights, nodes))
    return (s_next / s if form == 'x0' else a_next / a) * x + a_next * total


def estimate(form, denoise, x, t):
    guess = denoise(x, t)
    return guess.x0 if form == 'x0' else guess.eps


def multistep(form, order):
    """The exact exponential Adams-Bashforth method of rising orders."""

    def loop(denoise, t, x):
        nodes = []
        for here, there in zip(t, t[1:]):
            nodes = [(denoise.levels(here)[2], estimate(form, denoise, x, here)), *nodes][:order]
            x = combine(form, denoise, here, there, nodes, x)
        return x

    return loop


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_exact_multistep(check, order):
    """DEIS in log-SNR for eps; the predictor of SA-Solver, and DPM-Solver++'s third order, for x0."""
    check(solvers.deis, {'order': order, 'polynomial': 'logsnr'}, multistep('eps', order))
    check(
        solvers.sa_solver,
        {'tau': 0.0, 'predictor': order, 'corrector': 0, 'final': 'adams'},
        multistep('x0', order),
    )
    if order == 3:
        check(solvers.dpmpp_3m, {}, multistep('x0', order))
        check(solvers.dpmpp_3m_sde, {'eta': 0.0}, multistep('x0', order))


@pytest.mark.parametrize('coordinate', ['t', 'angle'])
def test_deis_in_other_coordinates(solver_schedule, check, coordinate):
    """Zhang & Chen 2023, Eq. 15: C_j is the integral of d(sigma / alpha) / dt times Lagrange's polynomial, by SciPy."""
    if isinstance(solver_schedule, schedules.Discrete):
        pytest.skip("the table's slope jumps at every entry, which no quadrature likes")
    schedule = solver_schedule

    def place(t):
        return t if coordinate == 't' else np.arctan2(schedule.sigma(t), schedule.alpha(t))

    def speed(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (schedule.sigma_prime(t) * alpha - sigma * schedule.alpha_prime(t)) / alpha**2

    def loop(denoise, t, x):
        eps, times = [], []
        for here, there in zip(t, t[1:]):
            eps, times = [denoise(x, here).eps, *eps][:3], [here, *times][:3]
            y = x / schedule.alpha(here)
            for j, time in enumerate(times):
                others = [place(other) for other in times if other != time]

                def integrand(t, others=others, time=time):
                    t = np.float64(t)
                    return speed(t) * np.prod([(place(t) - o) / (place(time) - o) for o in others])

                y = y + quad(integrand, here, there, epsabs=0, epsrel=1e-11)[0] * eps[j]
            x = schedule.alpha(there) * y
        return x

    check(solvers.deis, {'order': 3, 'polynomial': coordinate}, loop, t=schedule.t_of_logsnr(LOGSNR[1:7]))


def differences(lam, lam_next, estimates, lams):
    """D1 and D2 of Lu et al. 2022b with r0 = h_1 / h, r1 = h_2 / h; D2 is half of h^2 times the second derivative."""
    h = lam_next - lam
    r0, r1 = (lams[0] - lams[1]) / h, (lams[1] - lams[2]) / h
    near, far = (estimates[0] - estimates[1]) / r0, (estimates[1] - estimates[2]) / r1
    return near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)


def difference_loop(form, order, kind, second=2.0):
    """DPM-Solver's (eps) and DPM-Solver++'s (x0) multistep form, as its authors' code has it, with second * D2."""

    def loop(denoise, t, x):
        found, lams = [], []
        for here, there in zip(t, t[1:]):
            (a, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
            found, lams = [estimate(form, denoise, x, here), *found][:order], [lam, *lams][:order]
            h = lam_next - lam
            if form == 'x0':
                whole, base, scale = np.expm1(-h), s_next / s, -a_next
            else:
                whole, base, scale = np.expm1(h), a_next / a, -s_next
            phi2 = (np.expm1(h) / h - 1) if form == 'eps' else -(np.expm1(-h) / h + 1)
            phi3 = (np.expm1(h) - h) / h**2 - 0.5 if form == 'eps' else (np.expm1(-h) + h) / h**2 - 0.5
            x = base * x + scale * whole * found[0]
            if len(found) == 2:
                d1 = (found[0] - found[1]) / ((lams[0] - lams[1]) / h)
                x = x + scale * (0.5 * whole if kind == 'midpoint' else phi2) * d1
            if len(found) == 3:
                d1, d2 = differences(lam, lam_next, found, lams)
                x = x + scale * (phi2 * d1 + phi3 * second * d2)
        return x

    return loop


@pytest.mark.parametrize(
    ('make', 'options', 'loop'),
    [
        (solvers.dpm_solver_m, {'order': 2}, difference_loop('eps', 2, 'midpoint')),
        (solvers.dpmpp_2m, {}, difference_loop('x0', 2, 'midpoint')),
        (solvers.dpmpp_2m_sde, {'eta': 0.0}, difference_loop('x0', 2, 'midpoint')),
        (solvers.dpmpp_2m_sde, {'eta': 0.0, 'kind': 'heun'}, difference_loop('x0', 2, 'heun')),
        (solvers.dpmpp_3m, {}, difference_loop('x0', 3, 'heun')),
        (solvers.dpmpp_3m, {'halved': True}, difference_loop('x0', 3, 'heun', second=1.0)),
        (solvers.dpmpp_3m_sde, {'eta': 0.0, 'halved': True}, difference_loop('x0', 3, 'heun', second=1.0)),
        (solvers.dpm_solver_m, {'order': 3}, difference_loop('eps', 3, 'midpoint')),
        (solvers.dpm_solver_m, {'order': 3, 'halved': True}, difference_loop('eps', 3, 'midpoint', second=1.0)),
    ],
)
def test_differences(check, make, options, loop):
    """The published second-order formulas, and the third with the second difference whole or halved."""
    check(make, options, loop)


def last_from_x0(rho, x0):
    """The value at 0 of c_0 + c_2 u^2 + c_3 u^3 ..., which has no slope there, through x0 at rho: Cramer's rule."""
    columns = [rho**0, *(rho**k for k in range(2, len(rho) + 1))]
    whole = np.linalg.det(np.stack(columns))
    weights = [np.linalg.det(np.stack([np.eye(len(rho))[j], *columns[1:]])) / whole for j in range(len(rho))]
    for j, weight in enumerate(weights):  # the same by hand
        if len(rho) == 2:
            other = rho[1 - j] ** 2
            assert weight == pytest.approx(other / (other - rho[j] ** 2))
    return sum(weight * each for weight, each in zip(weights, x0))


def last_from_eps(rho, eps, y):
    """Adams-Bashforth in u = sigma / alpha from rho[0] to 0."""
    for j in range(len(rho)):
        others = np.delete(rho, j)
        integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(rho[j] - others))
        y = y - np.polyval(integral, rho[0]) * eps[j]
    return y


def to_zero(form, order, final, start=None):
    """`multistep` to sigma = 0, where alpha = 1, with each last step and each start."""

    def loop(denoise, t, x):
        nodes, every = [], list(zip(t, t[1:]))
        for i, (here, there) in enumerate(every):
            if i == 0 and start:
                x, nodes = start(denoise, here, there, x)
                continue
            now = min(order, len(every) - i) if final == 'lower' else order
            nodes = [(denoise.levels(here)[2], estimate(form, denoise, x, here)), *nodes]
            if there > 0:
                x = combine(form, denoise, here, there, nodes[:now], x)
                continue
            alpha, sigma, _ = denoise.levels(here)
            rho = np.exp(-np.array([lam for lam, _ in nodes[: min(order, 3) if final == 'adams' else 1]]))
            found = [each for _, each in nodes]
            x = last_from_x0(rho, found) if form == 'x0' else last_from_eps(rho, found, x / alpha)
        return x

    return loop


@pytest.mark.parametrize('final', ['adams', 'euler', 'lower'])
def test_last_steps(solver_schedule, check, final):
    t = np.append(solver_schedule.t_of_logsnr(LOGSNR), 0.0)
    for order in (1, 2, 3, 4):
        options = {'order': order, 'polynomial': 'logsnr', 'final': final}
        check(solvers.deis, options, to_zero('eps', order, final), t=t)
        options = {'predictor': order, 'corrector': 0, 'tau': 0.0, 'final': final}
        check(solvers.sa_solver, options, to_zero('x0', order, final), t=t)
    check(solvers.dpmpp_3m, {'final': final}, to_zero('x0', 3, final), t=t)


def third_order_start(form):
    """A step with stages at 1/3 and 2/3 of the way in lambda, each from what is known so far; the newer stage and the
    step's start remain as nodes.
    """

    def start(denoise, here, there, x):
        (lam, lam_next), nodes = (denoise.levels(time)[2] for time in (here, there)), []
        state, at = x, here
        for part in (1 / 3, 2 / 3, 1):
            nodes = [(denoise.levels(at)[2], estimate(form, denoise, state, at)), *nodes]
            goal = denoise.time(lam + part * (lam_next - lam)) if part < 1 else there
            used = nodes[:1] if part < 0.5 else [nodes[0], nodes[-1]]
            state, at = rebased(form, denoise, here, goal, used, x), goal
        return state, [nodes[0], nodes[-1]]

    return start


def rebased(form, denoise, here, there, nodes, x):
    """A step of `combine` from here on, whatever the nodes' order: the straight line through two of them."""
    ordered = sorted(nodes, key=lambda node: node[0])
    return combine(form, denoise, here, there, ordered, x)


def test_singlestep_starts(check):
    """The first step is of third order; the multistep method goes on from its nodes."""
    for order in (3, 4):
        options = {'order': order, 'polynomial': 'logsnr', 'start': 'singlestep'}
        check(solvers.deis, options, to_zero('eps', order, 'adams', third_order_start('eps')))
    check(solvers.dpmpp_3m, {'start': 'singlestep'}, to_zero('x0', 3, 'adams', third_order_start('x0')))
