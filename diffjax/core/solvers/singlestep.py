"""Exponential single-step methods: DPM-Solver and its kin, which evaluate between the grid's times.

A step from t to s asks at stages whose lambda lies at fractions r of the way, each reached by a shorter step, and
steps over the whole with what it saw there. The anchor keeps x at t.
"""

import numpy as np

from diffjax.core.checks import check_choice
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.exponential import REMEMBER, Node, exact_weights, factors, is_landing
from diffjax.core.solvers.plans import (
    Plan,
    Point,
    Row,
    is_inner,
    point_at,
    points,
    tabulate,
    units,
)

STAGES = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}


def stage_rows(schedule: Schedule, stops: list[Point], there: Point, capacity: int, *, predict: str) -> list[Row]:
    """The rows of one step that starts at stops[0] and asks at the others, its order being len(stops).

    Lu et al. 2022a, Algorithm 1 and 2 (predict='eps'); 2022b, Algorithm 1 (predict='x0').
    """
    here = stops[0]
    x, anchor, h, _ = units(capacity)
    rows = []
    for i, (stop, goal) in enumerate(zip(stops, [*stops[1:], there])):
        of_x, of_sum, _ = factors(here, goal, predict=predict)
        whole = exact_weights(schedule, here.lam, goal.lam, np.zeros(1), predict=predict)[0]
        if i == 0:
            row = of_x * x + of_sum * whole * h[0]
        else:
            slope = _slope(schedule, here, stop, goal, whole, half=len(stops) == 2, predict=predict)
            row = of_x * anchor + of_sum * (whole * h[i] + slope * (h[0] - h[i]))
        rows.append(Row(stop.t, REMEMBER[predict], row, to_anchor=x if i == 0 else None))
    return rows


def _slope(
    schedule: Schedule, here: Point, stop: Point, goal: Point, whole: float, *, half: bool, predict: str
) -> float:
    """The weight of the difference between the estimates at stop and here in a step from here to goal.

    `half`: the papers' second order, half of the whole; else the integral of the straight line.
    """
    if half:
        return 0.5 * whole * (goal.lam - here.lam) / (stop.lam - here.lam)
    return exact_weights(schedule, here.lam, goal.lam, np.array([stop.lam, here.lam]), predict=predict)[0]


def start_rows(schedule: Schedule, here: Point, there: Point, capacity: int, *, predict: str):
    """(rows, history) of a third-order first step for a multistep method.

    The last stage stays in the history as a node; the one before it, which is less accurate, does not.
    """
    stops = _stops(schedule, here, there, 3)
    rows = stage_rows(schedule, stops, there, capacity, predict=predict)
    return rows, [Node(0, stops[2].lam), Node(2, here.lam)]


def _stops(schedule: Schedule, here: Point, there: Point, order: int) -> list[Point]:
    return [here] + [point_at(schedule, here.lam + r * (there.lam - here.lam)) for r in STAGES[order]]


def _single_step(schedule: Schedule, grid, order: int, predict: str, stages: str) -> Plan:
    check_choice('stages', stages, ('between', 'grid'))
    every = points(schedule, grid)
    rows, i = [], 0
    for span in [1] * (len(every) - 1) if stages == 'between' else _spans(every, order):
        here, inner, there = every[i], every[i + 1 : i + span], every[i + span]
        i += span
        if is_landing(here, there, predict=predict):
            rows.append(Row(here.t, (there.alpha, there.sigma), units(order)[2][0]))
        elif stages == 'grid':
            rows += _grid_rows(schedule, [here, *inner], there, order, predict)
        else:
            stops = _stops(schedule, here, there, order if is_inner(here, there) else 1)
            rows += stage_rows(schedule, stops, there, order, predict=predict)
    return tabulate(schedule, rows)


def _grid_rows(schedule: Schedule, stops: list[Point], there: Point, order: int, predict: str) -> list[Row]:
    """A step over several steps of the grid, whose inner times are its stages, each reached by its own best order."""
    rows = stage_rows(schedule, stops, there, order, predict=predict)
    if len(stops) == 3:
        rows[1] = stage_rows(schedule, stops[:2], stops[2], order, predict=predict)[1]
    return rows


def _spans(every: list[Point], order: int) -> list[int]:
    """How many steps of the grid each step takes: `order` of them, and 1 at an end where lam is infinite."""
    first, last = (int(np.isinf(every[i].lam)) for i in (0, -1))
    inner = len(every) - 1 - first - last
    if inner < 0:
        return [1]
    return [1] * first + [order] * (inner // order) + [inner % order] * (inner % order > 0) + [1] * last


def dpm_solver(schedule: Schedule, grid, *, order: int = 3, stages: str = 'between') -> Plan:
    """DPM-Solver-1, 2 and 3: eps expanded in lambda (Lu et al. 2022a, Eq. 3.7, Algorithm 1 and 2).

    Order 1 to 3 and as many evaluations a step; one in a step to sigma = 0 or from alpha = 0, of first order.

    Args:
        stages: 'between', each step asks at stages inside it, equally spaced in lambda; 'grid', a step takes `order`
            steps of the grid and its stages are the grid's times: one evaluation for each step of the grid.
    """
    check_choice("dpm_solver's order", order, STAGES)
    return _single_step(schedule, grid, order, 'eps', stages)


def dpmpp_2s(schedule: Schedule, grid, *, stages: str = 'between') -> Plan:
    """DPM-Solver++(2S): x0 expanded in lambda (Lu et al. 2022b, Algorithm 1, r = 1/2).

    Order 2, two evaluations a step; one in a step to sigma = 0 or from alpha = 0.

    Args:
        stages: as for `dpm_solver`.
    """
    return _single_step(schedule, grid, 2, 'x0', stages)


def dpmpp_3s(schedule: Schedule, grid, *, stages: str = 'between') -> Plan:
    """DPM-Solver++(3S): DPM-Solver-3 for x0 (Lu et al. 2022b, appendix; r = 1/3 and 2/3).

    Order 3, three evaluations a step; one in a step to sigma = 0 or from alpha = 0.

    Args:
        stages: as for `dpm_solver`; at stages that are not at 1/3 and 2/3 the order is 2.
    """
    return _single_step(schedule, grid, 3, 'x0', stages)
