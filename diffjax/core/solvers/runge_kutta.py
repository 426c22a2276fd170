"""Runge-Kutta methods in a coordinate: Euler, Heun."""

import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.coordinates import integrand
from diffjax.core.solvers.plans import Plan, Row, tabulate, units


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


def _landing(schedule: Schedule, s: float) -> tuple[float, float]:
    """The estimate's own x at s: exact where a coordinate is infinite."""
    return schedule.alpha(s), schedule.sigma(s)
