"""Solvers of the reverse SDE: Karras's churn, and Euler-Maruyama with any diffusion."""

import numpy as np

from diffjax.core.checks import check_choice, check_number, check_window
from diffjax.core.schedules import TINY, Schedule
from diffjax.core.solvers.coordinates import MAX_SLOPE
from diffjax.core.solvers.plans import FAR, Plan, Row, check_noise, point_at, points, tabulate, units
from diffjax.core.solvers.runge_kutta import euler, heun

DIFFUSIONS = {  # w of dx = (velocity - w / 2 score) dt + sqrt(w) dW, from (g^2, sigma)
    'sde': lambda g2, sigma: g2,
    'sigma': lambda g2, sigma: sigma,
    'constant': lambda g2, sigma: 1.0,
}


def edm(
    schedule: Schedule,
    grid,
    *,
    churn: float = 40.0,
    low: float = 0.05,
    high: float = 50.0,
    noise: float = 1.003,
) -> Plan:
    """Heun's method that first adds a little noise, in sigma / alpha (Karras et al. 2022, Algorithm 2).

    Each step sets out from u_hat = (1 + gamma) u, gamma = min(churn / N, sqrt(2) - 1) where low <= u <= high and 0
    elsewhere; the noise that takes x there is added in the row before. None is added at the grid's first time, above
    it, or after the last step.
    Order 2 for churn = 0 (it is `heun` then), two evaluations a step; one in the step to sigma = 0.

    Args:
        churn, low, high, noise: the paper's S_churn, S_tmin, S_tmax, S_noise (values for ImageNet-64, Table 5).
    """
    check_noise('edm', grid, churn=churn)
    check_window('edm', low, high)
    check_number("edm's noise", noise)
    if not churn:
        return heun(schedule, grid)
    every = points(schedule, grid)
    gamma = min(churn / (len(every) - 1), np.sqrt(2) - 1)
    top, rows = every[0].ratio, []
    z = units(2, 1)[3][0]
    here = every[0]
    for there in every[1:]:
        piece = heun(schedule, [here.t, there.t])
        tables = zip(piece.t, piece.remember, piece.to_x, piece.to_anchor)
        rows += [Row(t, tuple(r), np.append(to_x, 0.0), np.append(anchor, 0.0)) for t, r, to_x, anchor in tables]
        u = there.ratio
        here = there
        if there is not every[-1] and max(low, TINY) <= u <= high and u * (1 + gamma) <= top:
            here = point_at(schedule, -np.log(u * (1 + gamma)))
            extra = noise * here.alpha * np.sqrt(here.ratio**2 - u**2)
            last = rows[-1]
            rows[-1] = last._replace(to_x=here.alpha / there.alpha * last.to_x + extra * z)
    return tabulate(schedule, rows, num_noises=1)


def euler_maruyama(schedule: Schedule, grid, *, diffusion: str = 'sde', scale: float = 1.0) -> Plan:
    """Euler-Maruyama in t on the reverse SDE, for diffusion and flow models alike.

    x_s = x - d (v + w / (2 sigma) eps) + sqrt(w d) z,   d = t - s,  v = alpha' x0 + sigma' eps (Song et al. 2021b,
    Eq. 6; Ma et al. 2024, Eq. 4). Every w has the same marginals. Order 1 in distribution, one evaluation a step. A
    step to sigma = 0 takes the estimate of x0 without noise; one from an infinite slope, or nearly so, is ddim's with
    eta = 1.

    Args:
        diffusion: w over `scale`: 'sde', the forward SDE's g^2 = 2 sigma (sigma' - sigma alpha' / alpha), infinite
            where alpha = 0; 'sigma' (SiT's choice); 'constant'.
        scale: 0 is the ODE: `euler` in t.
    """
    check_choice('diffusion', diffusion, DIFFUSIONS)
    check_noise('euler_maruyama', grid, scale=scale)
    if not scale:
        return euler(schedule, grid, coordinate='t')
    every = points(schedule, grid)
    x, _, h, z = units(1, 1)
    rows = []
    for here, there in zip(every, every[1:]):
        alpha_prime, sigma_prime = schedule.alpha_prime(here.t), schedule.sigma_prime(here.t)
        if there.sigma == 0:
            rows.append(Row(here.t, (there.alpha, 0.0), h[0]))
            continue
        if here.ratio > FAR and (diffusion == 'sde' or np.abs(alpha_prime) > MAX_SLOPE):
            rows.append(Row(here.t, (there.alpha, 0.0), h[0] + there.sigma * z[0]))
            continue
        g2 = 2 * here.sigma * (sigma_prime - here.sigma * alpha_prime / here.alpha) if here.alpha else np.inf
        w, step = scale * DIFFUSIONS[diffusion](g2, here.sigma), here.t - there.t
        slope = alpha_prime, sigma_prime + 0.5 * w / here.sigma
        rows.append(Row(here.t, slope, x - step * h[0] + np.sqrt(w * step) * z[0]))
    return tabulate(schedule, rows, num_noises=1)
