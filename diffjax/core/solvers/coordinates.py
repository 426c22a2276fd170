"""The coordinates in which a solver may integrate the probability-flow ODE."""

import numpy as np

from diffjax.core.checks import check_choice
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import FAR, levels

COORDINATES = {  # name: (n, u, p, q) from (schedule, t, alpha, sigma); y = x / n obeys dy/du = p x0 + q eps
    'sigma/alpha': lambda schedule, t, alpha, sigma: (alpha, sigma / alpha, 0 * t, 1 + 0 * t),
    't': lambda schedule, t, alpha, sigma: (1 + 0 * t, t, schedule.alpha_prime(t), schedule.sigma_prime(t)),
    'angle': lambda schedule, t, alpha, sigma: (
        np.hypot(alpha, sigma),
        np.arctan2(sigma, alpha),
        -sigma / np.hypot(alpha, sigma),
        alpha / np.hypot(alpha, sigma),
    ),
}

TIMES = {  # name: t from (schedule, u)
    'sigma/alpha': lambda schedule, u: schedule.t_of_logsnr(-2 * np.log(u)),
    't': lambda schedule, u: u,
    'angle': lambda schedule, u: schedule.t_of_logsnr(-2 * np.log(np.tan(u))),
}

MAX_SLOPE = 1e6  # sigma' of a schedule that starts like a square root is infinite at t = 0


def integrand(schedule: Schedule, grid, coordinate: str):
    """t, n, u, slopes [S + 1, 2] of the probability-flow ODE written as dy/du = slope . (x0, eps), y = x / n.

    Raises ValueError where the coordinate's slope is infinite at a time from which a step starts.
    """
    check_choice('coordinate', coordinate, COORDINATES)
    t, alpha, sigma, _ = levels(schedule, grid)
    with np.errstate(divide='ignore'):
        n, u, p, q = COORDINATES[coordinate](schedule, t, alpha, sigma)
        u = np.where(u > FAR, np.inf, u)  # only sigma / alpha grows so far
    slope = np.stack([p, q], -1)
    if (steep := np.abs(slope[:-1]).max(-1) > MAX_SLOPE).any():
        raise ValueError(
            f'on {type(schedule).__name__} the slope in coordinate {coordinate!r} is unbounded at '
            f't = {t[:-1][steep][0]:g}: choose another coordinate, or a grid that starts short of it'
        )
    return t, n, u, slope
