"""Runge-Kutta methods in a coordinate: Euler, Heun, midpoint, and the classical method of fourth order."""

import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.coordinates import COORDINATES, TIMES, integrand
from diffjax.core.solvers.plans import Plan, Row, point, tabulate, units


def euler(schedule: Schedule, grid, *, coordinate: str = 'sigma/alpha') -> Plan:
    """Euler's method in a coordinate: y_s = y_t + (u_s - u_t) dy/du. Order 1, one evaluation a step.

    Args:
        coordinate: 'sigma/alpha' (Karras et al. 2022, Eq. 4; equal to ddim), 't' (a flow model's own time), or
            'angle' (arctan of sigma / alpha, finite at both ends). In sigma / alpha a step from or to alpha = 0 is
            the limit, alpha_s x0 + sigma_s eps.
    """
    t, n, u, slope = integrand(schedule, grid, coordinate)
    x, _, h, _ = units(1)
    rows = []
    for i in range(len(t) - 1):
        if np.isfinite(u[i] + u[i + 1]):
            rows.append(Row(t[i], slope[i], n[i + 1] / n[i] * x + n[i + 1] * (u[i + 1] - u[i]) * h[0]))
        else:
            rows.append(Row(t[i], _landing(schedule, t[i + 1]), h[0]))
    return tabulate(schedule, rows)


def heun(schedule: Schedule, grid, *, coordinate: str = 'sigma/alpha') -> Plan:
    """Heun's method: Euler to s, then again with the mean of both slopes (Karras et al. 2022, Algorithm 1).

    Order 2, two evaluations a step; one in the step that ends at sigma = 0, where the slope is not asked for, and in a
    step that touches an infinite coordinate.

    Args:
        coordinate: as for `euler`.
    """
    t, n, u, slope = integrand(schedule, grid, coordinate)
    x, anchor, h, _ = units(2)
    rows = []
    for i in range(len(t) - 1):
        if not np.isfinite(u[i] + u[i + 1]):
            rows.append(Row(t[i], _landing(schedule, t[i + 1]), h[0]))
            continue
        step, scale = n[i + 1] * (u[i + 1] - u[i]), n[i + 1] / n[i]
        rows.append(Row(t[i], slope[i], scale * x + step * h[0], to_anchor=x))
        if schedule.sigma(t[i + 1]) > 0:
            rows.append(Row(t[i + 1], slope[i + 1], scale * anchor + 0.5 * step * (h[0] + h[1])))
    return tabulate(schedule, rows)


def _stage(schedule: Schedule, u: float, coordinate: str):
    """t, n, slope at a value of the coordinate."""
    here = point(schedule, TIMES[coordinate](schedule, u))
    n, _, p, q = COORDINATES[coordinate](schedule, here.t, here.alpha, here.sigma)
    return here.t, n, (p, q)


def dpm2(schedule: Schedule, grid) -> Plan:
    """The midpoint method in sigma / alpha with the midpoint's logarithm halfway (Karras et al. 2022's "DPM-2").

    Order 2, two evaluations a step; one, of first order, in the step that ends at sigma = 0 or starts from alpha = 0.
    """
    t, n, u, slope = integrand(schedule, grid, 'sigma/alpha')
    x, anchor, h, _ = units(1)
    rows = []
    for i in range(len(t) - 1):
        if not np.isfinite(u[i] + u[i + 1]):
            rows.append(Row(t[i], _landing(schedule, t[i + 1]), h[0]))
        elif u[i] * u[i + 1] == 0:
            rows.append(Row(t[i], slope[i], n[i + 1] / n[i] * x + n[i + 1] * (u[i + 1] - u[i]) * h[0]))
        else:
            middle = np.sqrt(u[i] * u[i + 1])
            time, scale, slant = _stage(schedule, middle, 'sigma/alpha')
            rows.append(Row(t[i], slope[i], scale * (x / n[i] + (middle - u[i]) * h[0]), to_anchor=x))
            rows.append(Row(time, slant, n[i + 1] * (anchor / n[i] + (u[i + 1] - u[i]) * h[0])))
    return tabulate(schedule, rows)


def rk4(schedule: Schedule, grid, *, coordinate: str = 'sigma/alpha') -> Plan:
    """The classical Runge-Kutta method. Order 4, four evaluations a step.

    One evaluation, of first order, in a step that ends at sigma = 0 or touches an infinite coordinate.

    Args:
        coordinate: as for `euler`.
    """
    t, n, u, slope = integrand(schedule, grid, coordinate)
    x, anchor, h, _ = units(4)
    rows = []
    for i in range(len(t) - 1):
        if not np.isfinite(u[i] + u[i + 1]):
            rows.append(Row(t[i], _landing(schedule, t[i + 1]), h[0]))
            continue
        step = u[i + 1] - u[i]
        if schedule.sigma(t[i + 1]) == 0:
            rows.append(Row(t[i], slope[i], n[i + 1] * (x / n[i] + step * h[0])))
            continue
        time, scale, slant = _stage(schedule, u[i] + 0.5 * step, coordinate)
        whole = (h[3] + 2 * h[2] + 2 * h[1] + h[0]) / 6
        rows.append(Row(t[i], slope[i], scale * (x / n[i] + 0.5 * step * h[0]), to_anchor=x))
        rows.append(Row(time, slant, scale * (anchor / n[i] + 0.5 * step * h[0])))
        rows.append(Row(time, slant, n[i + 1] * (anchor / n[i] + step * h[0])))
        rows.append(Row(t[i + 1], slope[i + 1], n[i + 1] * (anchor / n[i] + step * whole)))
    return tabulate(schedule, rows)


def _landing(schedule: Schedule, s: float) -> tuple[float, float]:
    """The estimate's own x at s: exact where a coordinate is infinite."""
    return schedule.alpha(s), schedule.sigma(s)
