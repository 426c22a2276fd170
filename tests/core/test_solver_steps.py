"""Single-step, predictor-corrector and pseudo numerical solvers against their papers, written as plain NumPy loops over
the exact denoiser.
"""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.core import solvers

LOGSNR = np.array([-7.0, -5, -2, -1.5, 0.5, 2, 3, 4.5, 8])


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


def singlestep(update):
    """A loop of update(denoise, here, there, x)."""

    def loop(denoise, t, x):
        for here, there in zip(t, t[1:]):
            x = update(denoise, here, there, x)
        return x

    return loop


def dpm_solver_2(denoise, here, there, x, r=0.5):
    """Lu et al. 2022a, Algorithm 1 (r_1 = 1/2)."""
    (a, _, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
    h = lam_next - lam
    middle = denoise.time(lam + r * h)
    a_mid, s_mid, _ = denoise.levels(middle)
    eps = denoise(x, here).eps
    u = a_mid / a * x - s_mid * np.expm1(r * h) * eps
    d = denoise(u, middle).eps - eps
    return a_next / a * x - s_next * np.expm1(h) * eps - s_next / (2 * r) * np.expm1(h) * d


def dpm_solver_3(denoise, here, there, x, r1=1 / 3, r2=2 / 3):
    """Lu et al. 2022a, Algorithm 2."""
    (a, _, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
    h = lam_next - lam
    one, two = denoise.time(lam + r1 * h), denoise.time(lam + r2 * h)
    (a1, s1, _), (a2, s2, _) = denoise.levels(one), denoise.levels(two)
    eps = denoise(x, here).eps
    u1 = a1 / a * x - s1 * np.expm1(r1 * h) * eps
    d1 = denoise(u1, one).eps - eps
    u2 = a2 / a * x - s2 * np.expm1(r2 * h) * eps - s2 * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = denoise(u2, two).eps - eps
    return a_next / a * x - s_next * np.expm1(h) * eps - s_next / r2 * (np.expm1(h) / h - 1) * d2


def dpmpp_2s(denoise, here, there, x, r=0.5):
    """Lu et al. 2022b, Algorithm 1."""
    (_, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
    h = lam_next - lam
    middle = denoise.time(lam + r * h)
    a_mid, s_mid, _ = denoise.levels(middle)
    x0 = denoise(x, here).x0
    u = s_mid / s * x - a_mid * np.expm1(-r * h) * x0
    d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * denoise(u, middle).x0
    return s_next / s * x - a_next * np.expm1(-h) * d


def dpmpp_3s(denoise, here, there, x, r1=1 / 3, r2=2 / 3):
    """DPM-Solver-3 for x0: phi_1(-h) and phi_2(-h) in place of phi_1(h) and phi_2(h)."""
    (_, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
    h = lam_next - lam
    one, two = denoise.time(lam + r1 * h), denoise.time(lam + r2 * h)
    (a1, s1, _), (a2, s2, _) = denoise.levels(one), denoise.levels(two)
    x0 = denoise(x, here).x0
    u1 = s1 / s * x - a1 * np.expm1(-r1 * h) * x0
    d1 = denoise(u1, one).x0 - x0
    u2 = s2 / s * x - a2 * np.expm1(-r2 * h) * x0 + a2 * r2 / r1 * (np.expm1(-r2 * h) / (r2 * h) + 1) * d1
    d2 = denoise(u2, two).x0 - x0
    return s_next / s * x - a_next * np.expm1(-h) * x0 + a_next / r2 * (np.expm1(-h) / h + 1) * d2


@pytest.mark.parametrize(
    ('make', 'options', 'update'),
    [
        (solvers.dpm_solver, {'order': 2}, dpm_solver_2),
        (solvers.dpm_solver, {'order': 3}, dpm_solver_3),
        (solvers.dpmpp_2s, {}, dpmpp_2s),
        (solvers.dpmpp_2s_ancestral, {'eta': 0.0}, dpmpp_2s),
        (solvers.dpmpp_sde, {'eta': 0.0}, dpmpp_2s),
        (
            solvers.dpmpp_sde,
            {'eta': 0.0, 'r': 0.3},
            lambda denoise, here, there, x: dpmpp_2s(denoise, here, there, x, 0.3),
        ),
        (solvers.dpmpp_3s, {}, dpmpp_3s),
    ],
)
def test_singlestep(check, make, options, update):
    check(make, options, singlestep(update))


@pytest.mark.parametrize(
    ('make', 'options', 'two', 'three'),
    [
        (solvers.dpm_solver, {'order': 2}, dpm_solver_2, None),
        (solvers.dpm_solver, {'order': 3}, dpm_solver_2, dpm_solver_3),
        (solvers.dpmpp_2s, {}, dpmpp_2s, None),
        (solvers.dpmpp_3s, {}, dpmpp_2s, dpmpp_3s),
    ],
)
def test_stages_on_the_grid(check, make, options, two, three):
    """The grid's own times are the stages, wherever they lie; what is left over is a step of lower order."""

    def loop(denoise, t, x):
        lam = denoise.levels(t)[2]
        span, i = 3 if three else 2, 0
        while i < len(t) - 1:
            whole = min(span, len(t) - 1 - i)
            r = (lam[i + 1 : i + whole] - lam[i]) / (lam[i + whole] - lam[i])
            if whole == 3:
                x = on_grid_3(denoise, t[i : i + 4], x, three is dpmpp_3s)
            elif whole == 2:
                x = two(denoise, t[i], t[i + 2], x, r[0])
            else:
                x0, eps, *_ = denoise(x, t[i])
                a, s, _ = denoise.levels(t[i + 1])
                x = a * x0 + s * eps
            i += whole
        return x

    check(make, options | {'stages': 'grid'}, loop)


def on_grid_3(denoise, t, x, data):
    """diffusers' DPMSolverSinglestep of order 3, 'midpoint': the second stage is a step of second order, the last takes
    the difference to the second stage alone.
    """
    two = dpmpp_2s if data else dpm_solver_2
    lam = denoise.levels(t)[2]
    h, r2 = lam[3] - lam[0], (lam[2] - lam[0]) / (lam[3] - lam[0])
    u2 = two(denoise, t[0], t[2], x, (lam[1] - lam[0]) / (lam[2] - lam[0]))
    (a, s, _), (a_next, s_next, _) = denoise.levels(t[0]), denoise.levels(t[3])
    if data:
        x0 = denoise(x, t[0]).x0
        d2 = (denoise(u2, t[2]).x0 - x0) / r2
        return s_next / s * x - a_next * np.expm1(-h) * x0 + a_next * (np.expm1(-h) / h + 1) * d2
    eps = denoise(x, t[0]).eps
    d2 = (denoise(u2, t[2]).eps - eps) / r2
    return a_next / a * x - s_next * np.expm1(h) * eps - s_next * (np.expm1(h) / h - 1) * d2


def phi(k, z):
    """phi_k(z) = (phi_{k-1}(z) - 1 / (k-1)!) / z."""
    return np.exp(z) if k == 0 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def unipc(order, variant, form):
    """Zhao et al. 2023, Algorithm 5 to 8, in the letters of their code: R, b, B(h)."""

    def step(denoise, here, there, x, lams, found, new=None):
        (a, s, lam), (a_next, s_next, lam_next) = denoise.levels(here), denoise.levels(there)
        h = lam_next - lam
        hh = -h if form == 'x0' else h
        b_h = hh if variant == 'bh1' else np.expm1(hh)
        base, scale = (s_next / s, a_next) if form == 'x0' else (a_next / a, s_next)
        x = base * x - scale * np.expm1(hh) * found[0]
        r = [(other - lam) / h for other in lams[1:]]
        d = [(m - found[0]) / ratio for m, ratio in zip(found[1:], r)]
        if new is not None:
            r, d = [*r, 1.0], [*d, new - found[0]]
        if not r:
            return x
        p = len(r)
        system = np.array([np.array(r) ** i for i in range(p)])
        b = np.array([math.factorial(i) * hh * phi(i + 1, hh) / b_h for i in range(1, p + 1)])
        c = np.array([0.5]) if p == 1 else np.linalg.solve(system, b)
        return x - scale * b_h * sum(weight * each for weight, each in zip(c, d))

    def loop(denoise, t, x):
        lams, found, before = [], [], None
        for i, (here, there) in enumerate(zip(t, t[1:])):
            guess = denoise(x, here)
            new = guess.x0 if form == 'x0' else guess.eps
            if before is not None:
                x = step(denoise, t[i - 1], here, before, lams[:order], found[:order], new)
            lams, found, before = [denoise.levels(here)[2], *lams], [new, *found], x
            x = step(denoise, here, there, x, lams[:order], found[:order])
        return x

    return loop


@pytest.mark.parametrize('form', ['x0', 'eps'])
@pytest.mark.parametrize('variant', ['bh1', 'bh2'])
@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_unipc(check, order, variant, form):
    check(solvers.unipc, {'order': order, 'variant': variant, 'predict': form}, unipc(order, variant, form))


def interpolated_unipc(place, order):
    """UniPC for x0 with an interpolant in any coordinate: in w = alpha / sigma the exact step is
    x_s = sigma_s (x_t / sigma_t + integral of x0 dw). SciPy integrates; w = 0 is pure noise.
    """

    def step(denoise, here, there, x, nodes):
        (a, s, _), (a_next, s_next, _) = denoise.levels(here), denoise.levels(there)
        y = x / s
        for j, (w, x0) in enumerate(nodes):
            others = [place(other) for i, (other, _) in enumerate(nodes) if i != j]

            def basis(v, w=w, others=others):
                return np.prod([(place(v) - other) / (place(w) - other) for other in others])

            y = y + quad(basis, a / s, a_next / s_next, epsabs=0, epsrel=1e-11)[0] * x0
        return s_next * y

    def loop(denoise, t, x):
        nodes, before = [], None
        for i, (here, there) in enumerate(zip(t, t[1:])):
            a, s, _ = denoise.levels(here)
            new = (a / s, denoise(x, here).x0)
            if before is not None:
                x = step(denoise, t[i - 1], here, before, [new, *nodes[:order]])
            nodes, before = [new, *nodes], x
            x = step(denoise, here, there, x, nodes[:order])
        return x

    return loop


@pytest.mark.parametrize(
    ('polynomial', 'knee', 'place'),
    [
        ('softplus', None, lambda w: np.log(1 + 3 * w)),
        ('softplus', 0.3, lambda w: np.log(1 + 0.3 * w)),
        ('angle', None, lambda w: np.arctan2(1, w)),
        ('sigma/alpha', None, lambda w: 1 / w),
    ],
)
def test_unipc_in_other_coordinates(solver_schedule, check, polynomial, knee, place):
    """And 'softplus' from t = 1 on, where alpha may be 0."""
    for order in (2, 3):
        options = {'order': order, 'polynomial': polynomial, 'knee': knee}
        check(solvers.unipc, options, interpolated_unipc(place, order))
        if polynomial == 'softplus':
            t = np.append(1.0, solver_schedule.t_of_logsnr(LOGSNR[2:]))
            check(solvers.unipc, options, interpolated_unipc(place, order), t)


def transfer(denoise, x, eps, here, there):
    """Liu et al. 2022, Eq. 11: phi(x, eps, t, t - delta), with abar."""
    (a, s, _), (b, s_next, _) = denoise.levels(here), denoise.levels(there)
    if abs(a**2 + s**2 - 1) > 1e-9:  # not variance preserving: the same step in sigma / alpha
        return b * (x / a + (s_next / b - s / a) * eps)
    abar, after = a**2, b**2
    change = (after - abar) / (np.sqrt(abar) * (np.sqrt((1 - after) * abar) + np.sqrt((1 - abar) * after)))
    return np.sqrt(after / abar) * x - change * eps


def adams(eps):
    table = {2: (3, -1, 2), 3: (23, -16, 5, 12), 4: (55, -59, 37, -9, 24)}
    *weights, scale = table[min(len(eps), 4)]
    return sum(w * e for w, e in zip(weights, eps)) / scale


def plms(denoise, t, x):
    """Algorithm 2 with the first step as in Stable Diffusion's PLMS."""
    first = denoise(x, t[0]).eps
    again = denoise(transfer(denoise, x, first, t[0], t[1]), t[1]).eps
    x, eps = transfer(denoise, x, (first + again) / 2, t[0], t[1]), [first]
    for here, there in zip(t[1:], t[2:]):
        eps = [denoise(x, here).eps, *eps]
        x = transfer(denoise, x, adams(eps), here, there)
    return x


def prk(denoise, t, x):
    """Eq. 13 three times, then Eq. 12."""
    eps = []
    for i, (here, there) in enumerate(zip(t, t[1:])):
        e1 = denoise(x, here).eps
        eps = [e1, *eps]
        if i >= 3:
            x = transfer(denoise, x, adams(eps), here, there)
            continue
        middle = (here + there) / 2
        e2 = denoise(transfer(denoise, x, e1, here, middle), middle).eps
        e3 = denoise(transfer(denoise, x, e2, here, middle), middle).eps
        e4 = denoise(transfer(denoise, x, e3, here, there), there).eps
        x = transfer(denoise, x, (e1 + 2 * e2 + 2 * e3 + e4) / 6, here, there)
    return x


def test_pndm(check):
    times = np.linspace(0.9, 0.1, 9)
    check(solvers.pndm, {'warmup': 'plms'}, plms, times)
    check(solvers.pndm, {'warmup': 'prk'}, prk, times)
