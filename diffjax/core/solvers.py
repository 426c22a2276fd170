"""Solvers: `solver(schedule, grid, **options) -> Plan`, NumPy float64, run once before anything is traced.

`grid: [S + 1]` holds the times, falling for sampling and rising for inversion. A row of the plan is the paper's update
written on unit vectors: with `x, anchor, h, z = units(K, N)` the line `sigma_s / sigma_t * x + c * h[0]` is the row.
h[0] is what this row's network call put into the history, h[1] what the call before it did.

Every row is finite at both ends: where alpha = 0 or sigma = 0 the formulas' limits are taken by plain `if`s.
"""

from typing import NamedTuple

import numpy as np

from diffjax.core import chain
from diffjax.core.schedules import Schedule

__all__ = ['ddim', 'ddpm', 'dpmpp_2m', 'euler', 'heun']


class Plan(NamedTuple):
    """A table with one row for each network evaluation: M rows, K remembered estimates, N noise draws.

    Row m calls the denoiser on x at t[m], puts p x0 + q eps, (p, q) = remember[m], into the history, and then takes
    x and anchor from the row's product with (x, anchor, K remembered newest first, N fresh standard normal draws).
    """

    t: np.ndarray  # [M]
    remember: np.ndarray  # [M, 2]
    to_x: np.ndarray  # [M, 2 + K + N]
    to_anchor: np.ndarray  # [M, 2 + K + N]
    log_variance_range: np.ndarray  # [M, N]; a learned variance f scales draw j by exp(f * range / 2)
    live: np.ndarray  # [M] bool; rows that only pad the table are skipped
    start: np.ndarray  # [2]: the first x is start . (x0, eps), with x0 = 0 where nothing is given

    @property
    def num_evaluations(self) -> int:
        return int(np.sum(self.live))

    @property
    def num_remembered(self) -> int:
        return self.to_x.shape[1] - 2 - self.num_noises

    @property
    def num_noises(self) -> int:
        return self.log_variance_range.shape[1]


class Row(NamedTuple):
    """One row of a plan."""

    t: float
    remember: tuple[float, float]
    to_x: np.ndarray
    to_anchor: np.ndarray | None = None  # None: the anchor stays
    log_variance_range: float = 0.0


def units(num_remembered: int, num_noises: int = 0):
    """x, anchor, h, z as rows of the unit matrix, h: [K, ...], z: [N, ...]."""
    e = np.eye(2 + num_remembered + num_noises)
    return e[0], e[1], e[2 : 2 + num_remembered], e[2 + num_remembered :]


def tabulate(schedule: Schedule, rows: list[Row], num_noises: int = 0) -> Plan:
    """The rows as one table, which starts at the first row's time."""
    width = len(rows[0].to_x)
    keep = np.eye(width)[1]
    return Plan(
        t=np.array([row.t for row in rows]),
        remember=np.array([row.remember for row in rows], np.float64),
        to_x=np.array([row.to_x for row in rows]),
        to_anchor=np.array([keep if row.to_anchor is None else row.to_anchor for row in rows]),
        log_variance_range=np.array([[row.log_variance_range] * num_noises for row in rows]).reshape(
            len(rows), num_noises
        ),
        live=np.ones(len(rows), bool),
        start=np.array([schedule.alpha(np.float64(rows[0].t)), schedule.sigma(np.float64(rows[0].t))]),
    )


def levels(schedule: Schedule, grid) -> tuple[np.ndarray, ...]:
    """t, alpha, sigma, logsnr / 2 at the grid, after a check that it is one. [S + 1] each."""
    t = np.asarray(grid, np.float64)
    steps = np.diff(t)
    if t.ndim != 1 or len(t) < 2 or not ((steps < 0).all() or (steps > 0).all()) or t.min() < 0 or t.max() > 1:
        raise ValueError(f'a grid is at least two times in [0, 1], all falling or all rising; got {t.tolist()}')
    return t, schedule.alpha(t), schedule.sigma(t), 0.5 * schedule.logsnr(t)


def ddpm(schedule: Schedule, grid, *, variance: str = 'small') -> Plan:
    """Ancestral sampling: the posterior with the estimated x0 in x0's place (Ho et al. 2020, Algorithm 2).

    Order 1 in distribution, one evaluation a step.

    Args:
        variance: of the noise: 'small', the posterior's beta~; 'large', the kernel's beta; 'learned', between the two
            where the denoiser says (Nichol & Dhariwal 2021, Eq. 15). The step that ends at sigma = 0 adds none.
    """
    if variance not in ('small', 'large', 'learned'):
        raise ValueError(f"ddpm's variance is 'small', 'large' or 'learned', got {variance!r}")
    t, alpha, sigma, _ = levels(schedule, grid)
    if t[0] < t[-1]:
        raise ValueError('ddpm walks the reverse chain and needs a falling grid; for inversion use ddim, euler or heun')
    x, _, h, z = units(1, 1)
    rows = []
    for i in range(len(t) - 1):
        of_x, of_x0, small = chain.posterior(schedule, t[i + 1], t[i])
        span = 0.0 if sigma[i + 1] == 0 else chain.log_variance_range(schedule, t[i + 1], t[i])
        std = np.sqrt(small) * (np.exp(0.5 * span) if variance == 'large' else 1.0)
        row = of_x * x + of_x0 * h[0] + std * z[0]
        rows.append(Row(t[i], (1, 0), row, log_variance_range=span if variance == 'learned' else 0.0))
    return tabulate(schedule, rows, num_noises=1)


def ddim(schedule: Schedule, grid, *, eta: float = 0.0) -> Plan:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + eta sqrt(v) z, v the posterior's variance.

    Song et al. 2021, Eq. 12 and 16. Order 1, one evaluation a step. eta = 0 is Euler's method in
    sigma / alpha, eta = 1 is DDPM with the small variance.
    """
    t, alpha, sigma, _ = levels(schedule, grid)
    if not 0 <= eta <= 1:
        raise ValueError(f'eta lies in [0, 1], got {eta}')
    if eta and t[0] < t[-1]:
        raise ValueError(f'on a rising grid ddim is deterministic: eta = 0, got {eta}')
    x, _, h, z = units(1, 1 if eta else 0)
    rows = []
    for i in range(len(t) - 1):
        v = eta**2 * chain.posterior(schedule, t[i + 1], t[i])[2] if eta else 0.0
        row = h[0] + np.sqrt(v) * z[0] if eta else h[0]
        rows.append(Row(t[i], (alpha[i + 1], np.sqrt(sigma[i + 1] ** 2 - v)), row))
    return tabulate(schedule, rows, num_noises=1 if eta else 0)


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

MAX_SLOPE = 1e6  # sigma' of a schedule that starts like a square root is infinite at t = 0


def integrand(schedule: Schedule, grid, coordinate: str):
    """t, n, u, slopes [S + 1, 2] of the probability-flow ODE written as dy/du = slope . (x0, eps), y = x / n.

    Raises ValueError where the coordinate's slope is infinite at a time from which a step starts.
    """
    if coordinate not in COORDINATES:
        raise ValueError(f'coordinate is one of {", ".join(COORDINATES)}; got {coordinate!r}')
    t, alpha, sigma, _ = levels(schedule, grid)
    with np.errstate(divide='ignore'):
        n, u, p, q = COORDINATES[coordinate](schedule, t, alpha, sigma)
    slope = np.stack([p, q], -1)
    if (steep := np.abs(slope[:-1]).max(-1) > MAX_SLOPE).any():
        raise ValueError(
            f'on {type(schedule).__name__} the slope in coordinate {coordinate!r} is unbounded at '
            f't = {t[:-1][steep][0]:g}: choose another coordinate, or a grid that starts short of it'
        )
    return t, n, u, slope


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
