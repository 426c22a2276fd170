"""Samplers for distilled models, which jump to x0 and noise it again: consistency, LCM, TCD."""

import numpy as np

from diffjax.core import chain
from diffjax.core.checks import check_number
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan, Row, check_noise, point, points, tabulate, units


def consistency(schedule: Schedule, grid) -> Plan:
    """x_s = alpha_s x0 + sigma_s z (Song et al. 2023, Algorithm 1): multistep sampling of a consistency model.

    One evaluation a step, stochastic. The denoiser's x0 is the model's output; the step to sigma = 0 ends in it.
    """
    check_noise('consistency', grid, noise=1.0)
    _, _, h, z = units(1, 1)
    every = points(schedule, grid)
    rows = [Row(t.t, (s.alpha, 0), h[0] + s.sigma * z[0]) for t, s in zip(every, every[1:])]
    return tabulate(schedule, rows, num_noises=1)


def lcm(schedule: Schedule, grid, *, sigma_data: float = 0.5, scaling: float = 10.0) -> Plan:
    """`consistency` with the boundary condition of latent consistency models: f = c_skip x + c_out x0 in x0's place.

    c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), d = sigma_data, s = scaling x timestep (Luo et al. 2023,
    Eq. 9 and appendix; the timestep is what the network is told).
    """
    check_noise('lcm', grid, noise=1.0)
    check_number("lcm's sigma_data", sigma_data, inside=True)
    check_number("lcm's scaling", scaling, inside=True)
    x, _, h, z = units(1, 1)
    every, rows = points(schedule, grid), []
    for here, there in zip(every, every[1:]):
        scaled = scaling * max(schedule.timestep(here.t), 0.0)  # below a table's first entry: f = x, as at it
        c_skip, c_out = sigma_data**2 / (scaled**2 + sigma_data**2), scaled / np.hypot(scaled, sigma_data)
        row = there.alpha * c_skip * x + h[0] + there.sigma * z[0]
        rows.append(Row(here.t, (there.alpha * c_out, 0), row))
    return tabulate(schedule, rows, num_noises=1)


def tcd(schedule: Schedule, grid, *, gamma: float = 0.3) -> Plan:
    """Strategic stochastic sampling: DDIM to (1 - gamma) s, then noise up to s (Zheng et al. 2024, Algorithm 4).

    One evaluation a step; the last one is ddim's, without noise. gamma = 0 is ddim, gamma = 1 `consistency`.
    """
    check_number("tcd's gamma", gamma, high=1.0)
    check_noise('tcd', grid, gamma=gamma)
    _, _, h, z = units(1, 1)
    every, rows = points(schedule, grid), []
    for here, there in zip(every, every[1:]):
        low = there if there is every[-1] else point(schedule, (1 - gamma) * there.t)
        factor, variance = chain.kernel(schedule, low.t, there.t) if there.sigma > low.sigma else (1.0, 0.0)
        rows.append(Row(here.t, (factor * low.alpha, factor * low.sigma), h[0] + np.sqrt(variance) * z[0]))
    return tabulate(schedule, rows, num_noises=1)
