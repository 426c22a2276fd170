"""Ancestral methods: a step of the ODE to less noise than wanted, then fresh noise up to what is wanted.

In u = sigma / alpha, with y = x / alpha, a step from t to s goes to u_down and adds u_up (Song et al. 2021a, Eq. 16):

    u_up = eta u_s sqrt(1 - (u_s / u_t)^2),   u_down = sqrt(u_s^2 - u_up^2)                                     (1)
"""

import numpy as np

from diffjax.core.checks import check_number
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import FAR, Plan, Point, Row, check_noise, is_inner, point_at, points, tabulate, units
from diffjax.core.solvers.reverse_chain import ddim, ddim_row
from diffjax.core.solvers.singlestep import stage_rows


def euler_ancestral(schedule: Schedule, grid, *, eta: float = 1.0) -> Plan:
    """Euler in sigma / alpha to u_down, then noise (Eq. 1): the same as ddim with this eta, and with eta = 1 as ddpm.

    Order 1, one evaluation a step.
    """
    return ddim(schedule, grid, eta=eta)


def split(here: float, there: float, eta: float) -> tuple[float, float]:
    """(u_down, u_up) of a step between two values of sigma / alpha, Eq. 1."""
    up = eta * there * np.sqrt((1 - there / here) * (1 + there / here)) if eta else 0.0
    return np.sqrt(there**2 - up**2), up


def dpm2_ancestral(schedule: Schedule, grid, *, eta: float = 1.0) -> Plan:
    """dpm2 to u_down, then noise (k-diffusion). Order 2 for eta = 0, 1 in distribution; two evaluations a step.

    One evaluation, of first order, in the step that ends at sigma = 0 or starts from alpha = 0 or nearly so.
    """

    def step(here, there, down, capacity):
        x, anchor, h, _ = units(capacity)
        middle = point_at(schedule, 0.5 * (here.lam - np.log(down)))
        to_middle = middle.alpha * (x / here.alpha + (middle.ratio - here.ratio) * h[0])
        whole = there.alpha * (anchor / here.alpha + (down - here.ratio) * h[0])
        return [Row(here.t, (0, 1), to_middle, to_anchor=x), Row(middle.t, (0, 1), whole)]

    return _ancestral(schedule, grid, eta, 'dpm2_ancestral', step, far=FAR)


def dpmpp_2s_ancestral(schedule: Schedule, grid, *, eta: float = 1.0) -> Plan:
    """dpmpp_2s to u_down, then noise (k-diffusion). Order 2 for eta = 0, 1 in distribution; two evaluations a step.

    One evaluation, of first order, in the step that ends at sigma = 0 or starts from alpha = 0.
    """

    def step(here, there, down, capacity):
        low = Point(there.t, there.alpha, there.alpha * down, -np.log(down))
        middle = point_at(schedule, 0.5 * (here.lam + low.lam))
        return stage_rows(schedule, [here, middle], low, capacity, predict='x0')

    return _ancestral(schedule, grid, eta, 'dpmpp_2s_ancestral', step)


def _ancestral(schedule: Schedule, grid, eta: float, name: str, step, *, far: float = np.inf) -> Plan:
    """Two-evaluation steps with the ODE's rows from step(here, there, u_down, K), and noise after the last of them.

    far: the sigma / alpha above which a step is ddim's, as it is from alpha = 0.
    """
    _check_eta(name, grid, eta)
    every, rows = points(schedule, grid), []
    z = units(2, 1)[3][0]
    for here, there in zip(every, every[1:]):
        down, up = split(here.ratio, there.ratio, eta)
        if here.ratio > far or here.alpha == 0 or here.sigma == 0 or there.alpha == 0 or down == 0:
            rows.append(ddim_row(schedule, here, there, eta, 2))
            continue
        first, last = (_widen(row) for row in step(here, there, down, 2))
        rows += [first, last._replace(to_x=last.to_x + there.alpha * up * z)]
    return tabulate(schedule, rows, num_noises=1)


def _widen(row: Row) -> Row:
    """A row of a table without noise in one with a draw."""
    wide = [None if table is None else np.append(table, 0.0) for table in (row.to_x, row.to_anchor)]
    return row._replace(to_x=wide[0], to_anchor=wide[1])


def _check_eta(name: str, grid, eta: float) -> None:
    check_number(f"{name}'s eta", eta, high=1.0)
    check_noise(name, grid, eta=eta)


def dpmpp_sde(schedule: Schedule, grid, *, eta: float = 1.0, r: float = 0.5) -> Plan:
    """DPM-Solver++ for the SDE, single-step with one stage (k-diffusion's dpmpp_sde): both steps are ancestral.

    x0 at the stage, a fraction r of the way in lambda, takes the share 1 / 2r of the whole step. Stage and step share
    a Brownian path in sigma / alpha: the step's noise is rho z1 + sqrt(1 - rho^2) z2, rho^2 = (u_t - u_mid) /
    (u_t - u_s). Order 2 for eta = 0, 1 in distribution; two evaluations a step, one in the step to sigma = 0.
    """
    _check_eta('dpmpp_sde', grid, eta)
    check_number("dpmpp_sde's r", r, high=1.0, inside=True)
    every, rows = points(schedule, grid), []
    x, anchor, h, z = units(2, 1)
    for here, there in zip(every, every[1:]):
        if not is_inner(here, there):
            rows.append(ddim_row(schedule, here, there, eta, 2))
            continue
        middle = point_at(schedule, here.lam + r * (there.lam - here.lam))
        (first, first_up), (down, up) = (split(here.ratio, p.ratio, eta) for p in (middle, there))
        shared = np.sqrt((here.ratio - middle.ratio) / (here.ratio - there.ratio))
        share = first / here.ratio
        to_x = middle.alpha * (share * x / here.alpha + (1 - share) * h[0] + first_up * z[0])
        share, mean = down / here.ratio, h[1] + (h[0] - h[1]) / (2 * r)
        to_anchor = there.alpha * (share * x / here.alpha + up * shared * z[0])
        rows.append(Row(here.t, (1, 0), to_x, to_anchor))
        fresh = there.alpha * up * np.sqrt(1 - shared**2) * z[0]
        rows.append(Row(middle.t, (1, 0), anchor + there.alpha * (1 - share) * mean + fresh))
    return tabulate(schedule, rows, num_noises=1)
