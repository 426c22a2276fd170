"""Multistep methods: each step also uses the estimates of the steps before it."""

import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan, Row, levels, tabulate, units


def dpmpp_2m(schedule: Schedule, grid) -> Plan:
    """DPM-Solver++(2M): a two-step exponential integrator in lambda = logsnr / 2 (Lu et al. 2022b, Algorithm 2).

    x_s = sigma_s / sigma_t x - alpha_s expm1(-h) D,  D = (1 + 1 / 2r) x0_t - 1 / 2r x0_before,  r = h_before / h.
    Order 2, one evaluation a step. The first step and the one that ends at sigma = 0 are of first
    order; a step from sigma = 0 or to alpha = 0 is ddim's.
    """
    t, alpha, sigma, lam = levels(schedule, grid)
    x, _, h, _ = units(2)
    rows = []
    before = None  # the last step's length in lambda; None where the history holds nothing
    for i in range(len(t) - 1):
        if sigma[i] == 0 or alpha[i + 1] == 0:
            rows.append(Row(t[i], (alpha[i + 1], sigma[i + 1]), h[0]))
            continue
        step = lam[i + 1] - lam[i]
        weight = 0.0 if before is None or np.isinf(step) else 0.5 * step / before
        guess = (1 + weight) * h[0] - weight * h[1]
        rows.append(Row(t[i], (1, 0), sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-step) * guess))
        before = step
    return tabulate(schedule, rows)
