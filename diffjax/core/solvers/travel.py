"""Samplers that go back up in time: restarts, and RePaint's time travel."""

import numpy as np

from diffjax.core.checks import check_number, check_whole, check_window
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan, check_noise, join, points
from diffjax.core.solvers.reverse_chain import ddpm
from diffjax.core.solvers.runge_kutta import heun


def restart(
    schedule: Schedule,
    grid,
    *,
    low: float = 0.1,
    high: float = 1.0,
    num_restarts: int = 1,
    num_steps: int = 5,
    rho: float = 7.0,
) -> Plan:
    """Heun's method that, once below sigma / alpha = `low`, is noised back to `high` and comes down again (Xu et al.
    2023, Algorithm 1).

    Order 2 apart from the noise; two evaluations a step, and num_restarts (2 num_steps) more.

    Args:
        low, high: of the restarts, in sigma / alpha: from the grid's first time at or below `low` (but above 0) up to
            `high`, or to the grid's first time where that is less.
        num_restarts, num_steps: how often, and in how many steps (Karras's, of this rho) it comes down again.
    """
    check_whole("restart's num_restarts", num_restarts, 0)
    check_whole("restart's num_steps", num_steps)
    check_number("restart's rho", rho, inside=True)
    check_window('restart', low, high)
    if low == high:
        raise ValueError(f'restart goes from low up to high, got low = {low} and high = {high}')
    check_noise('restart', grid, num_restarts=num_restarts)
    every = points(schedule, grid)
    below = [i for i, p in enumerate(every) if 0 < p.ratio <= low and i]
    if not num_restarts:
        return heun(schedule, grid)
    if not below:
        least = min(p.ratio for p in every[1:] if p.sigma) if len(every) > 2 else np.inf
        raise ValueError(f'restart needs a time at or below sigma / alpha = {low}; the lowest above 0 is {least:.3g}')
    i = below[0]
    top, bottom = min(high, every[0].ratio), every[i].ratio
    ramp = np.linspace(top ** (1 / rho), bottom ** (1 / rho), num_steps + 1) ** rho
    again = schedule.t_of_logsnr(-2 * np.log(ramp))
    again[-1] = every[i].t
    t = [p.t for p in every]
    pieces = [t[: i + 1], *[again] * num_restarts, t[i:]]
    return join(schedule, [(heun(schedule, piece), piece[-1]) for piece in pieces if len(piece) > 1])


def repaint(schedule: Schedule, grid, *, jump: int = 10, repeats: int = 10, variance: str = 'small') -> Plan:
    """DDPM with RePaint's time travel: after each `jump` steps but the first it goes back up by as many, `repeats` - 1
    times (Lugmayr et al. 2022, Algorithm 1 and its authors' schedule).

    One evaluation a step, about `repeats` times as many as the grid has steps; on a grid of up to `jump` steps it is
    ddpm. With `sample`'s `project` it inpaints.

    Args:
        variance: as for `ddpm`.
    """
    check_whole("repaint's jump", jump)
    check_whole("repaint's repeats", repeats)
    check_noise('repaint', grid, repeats=repeats)
    t = [p.t for p in points(schedule, grid)]
    pieces = []
    for i in range(0, len(t) - 1, jump):
        piece = t[i : i + jump + 1]
        pieces += [piece] * (repeats if i else 1)
    return join(schedule, [(ddpm(schedule, piece, variance=variance), piece[-1]) for piece in pieces])
