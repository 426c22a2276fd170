"""Plans: tables that one loop follows, and what solvers write them with.

A row of a plan is the paper's update written on unit vectors: with `x, anchor, h, z = units(K, N)` the line
`sigma_s / sigma_t * x + c * h[0]` is the row. h[0] is what this row's network call put into the history, h[1] what the
call before it did.
"""

from typing import NamedTuple

import numpy as np

from diffjax.core.schedules import Schedule


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
