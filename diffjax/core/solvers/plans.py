"""Plans: tables that one loop follows, and what solvers write them with.

A row of a plan is the paper's update written on unit vectors: with `x, anchor, h, z = units(K, N)` the line
`sigma_s / sigma_t * x + c * h[0]` is the row. h[0] is what this row's network call put into the history, h[1] what the
call before it did.
"""

from typing import NamedTuple

import numpy as np

from diffjax.core import chain
from diffjax.core.checks import check_number
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


FAR = 2e3  # a sigma / alpha from which on a step is taken as from pure noise: in eps its terms are as large and cancel


class Point(NamedTuple):
    """A time and its levels; lam = logsnr / 2."""

    t: float
    alpha: float
    sigma: float
    lam: float

    @property
    def ratio(self) -> float:
        """sigma / alpha; infinite where alpha = 0."""
        return self.sigma / self.alpha if self.alpha else np.inf


def is_inner(here: Point, there: Point) -> bool:
    """Whether lam is finite at both."""
    return bool(np.isfinite(here.lam) and np.isfinite(there.lam))


def point(schedule: Schedule, t: float) -> Point:
    t = np.float64(t)
    return Point(t, schedule.alpha(t), schedule.sigma(t), 0.5 * schedule.logsnr(t))


def point_at(schedule: Schedule, lam: float) -> Point:
    """The point between two others whose lam is given."""
    return point(schedule, schedule.t_of_logsnr(np.float64(2 * lam)))


def points(schedule: Schedule, grid) -> list[Point]:
    """The grid's points, [S + 1]."""
    return [Point(*values) for values in zip(*levels(schedule, grid))]


SILENCING = 'churn', 'eta', 'gamma', 'num_restarts', 'scale', 'tau'  # options whose 0 makes a solver deterministic


def check_noise(name: str, grid, **level: float) -> None:
    """Raises ValueError where a solver's level of noise is no number from 0 on, or it would add noise on the way up."""
    ((what, value),) = level.items()
    check_number(f"{name}'s {what}", value)
    if value and np.ndim(grid) == 1 and len(grid) > 1 and grid[0] < grid[-1]:
        silent = f'{what}=0, or ' if what in SILENCING else ''
        raise ValueError(f'{name} adds noise and needs a falling grid; for inversion use {silent}ddim, euler or heun')


def levels(schedule: Schedule, grid) -> tuple[np.ndarray, ...]:
    """t, alpha, sigma, logsnr / 2 at the grid, after a check that it is one. [S + 1] each."""
    t = np.asarray(grid, np.float64)
    steps = np.diff(t)
    if t.ndim != 1 or len(t) < 2 or not ((steps < 0).all() or (steps > 0).all()) or t.min() < 0 or t.max() > 1:
        raise ValueError(f'a grid is at least two times in [0, 1], all falling or all rising; got {t.tolist()}')
    return t, schedule.alpha(t), schedule.sigma(t), 0.5 * schedule.logsnr(t)


def join(schedule: Schedule, pieces: list[tuple[Plan, float]]) -> Plan:
    """Plans one after the other, each with the time at which it ends, as one plan.

    Where a piece starts at a noisier time than the one before it ended, noise takes x there (the forward kernel
    q(x_t | x_s)), in the last row of the piece before and by a draw of its own. No piece looks at another's history.
    """
    remembered, noises = (max(sizes) for sizes in zip(*((p.num_remembered, p.num_noises) for p, _ in pieces)))
    plans = [pad(plan, len(plan.t), remembered, noises + 1) for plan, _ in pieces]
    for plan, (_, end), after in zip(plans, pieces, plans[1:]):
        if after.t[0] > end:
            factor, variance = chain.kernel(schedule, np.float64(end), after.t[0])
            plan.to_x[-1] *= factor
            plan.to_x[-1, -1] = np.sqrt(variance)
    columns = [np.concatenate(column) for column in zip(*(plan[:-1] for plan in plans))]
    return Plan(*columns, start=plans[0].start)


def pad(plan: Plan, num_rows: int, num_remembered: int, num_noises: int) -> Plan:
    """The same plan in a larger table. Rows that are added are skipped at run time and cost nothing."""
    sizes = plan.t.shape[0], plan.num_remembered, plan.num_noises
    grow = [wanted - have for wanted, have in zip((num_rows, num_remembered, num_noises), sizes)]
    if min(grow) < 0:
        raise ValueError(
            f'a plan of (rows, remembered, noises) = {sizes} does not fit into {num_rows, num_remembered, num_noises}'
        )
    m, k, n = grow

    def columns(table):
        split = 2 + plan.num_remembered
        table = np.concatenate(
            [np.pad(table[:, :split], ((0, 0), (0, k))), np.pad(table[:, split:], ((0, 0), (0, n)))], 1
        )
        return np.pad(table, ((0, m), (0, 0)))

    return Plan(
        t=np.pad(plan.t, (0, m), mode='edge'),
        remember=np.pad(plan.remember, ((0, m), (0, 0))),
        to_x=columns(plan.to_x),
        to_anchor=columns(plan.to_anchor),
        log_variance_range=np.pad(plan.log_variance_range, ((0, m), (0, n))),
        live=np.pad(plan.live, (0, m)),
        start=plan.start,
    )
