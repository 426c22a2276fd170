"""Every deterministic sampler that fits a number of evaluations: solvers x their settings x grids, as plans.

What stands in the tables are the settings that are methods of their own; a solver or grid that is not listed has its
defaults. Whatever a module's `__all__` names is there, so that a new solver takes part unasked.
"""

import ast
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffjax.build import ConfigError
from diffjax.components import component
from diffjax.core import grids, solvers
from diffjax.core.parameterizations import Parameterization
from diffjax.core.sampling import check_plan
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import COORDINATES, Plan
from diffjax.core.solvers.exponential import POLYNOMIALS

FINAL = ('adams', 'euler')
SOLVERS = {
    'deis': {'order': (2, 3, 4), 'polynomial': POLYNOMIALS, 'final': FINAL},
    'dpm_solver': {'order': (2, 3)},
    'dpm_solver_m': {'order': (2, 3), 'final': FINAL},
    'dpmpp_2m': {'final': FINAL},
    'dpmpp_3m': {'halved': (False, True), 'final': FINAL},
    'euler': {'coordinate': COORDINATES},
    'heun': {'coordinate': COORDINATES},
    'lms': {'order': (2, 3, 4), 'coordinate': COORDINATES},
    'pndm': {'warmup': ('plms', 'prk')},
    'rk4': {'coordinate': COORDINATES},
    'sa_solver': {'tau': (0,), 'predictor': (2, 3), 'corrector': (2, 3, 4)},
    'unipc': {'order': (2, 3, 4), 'predict': ('x0', 'eps'), 'polynomial': POLYNOMIALS, 'final': FINAL},
}
GRIDS = {
    'beta': {'alpha': (0.6, 1.0), 'beta': (0.6, 1.0)},
    'karras': {'rho': (3, 7)},
    'logsnr': {'low': (-6, -10), 'high': (5, 8, 10)},
    'shifted': {'shift': (0.5, 1.5, 2, 3)},
    'softplus': {'knee': (1, 3, 10)},
}
NOISY = 'draws noise, so that it has no end point of its own'


class HandMade(NamedTuple):
    """A solver on a grid."""

    solver: str
    grid: str
    num_steps: int
    plan: Plan


def specs(names: Sequence[str], settings: Mapping[str, Mapping[str, Sequence]]) -> list[str]:
    """'name:option=value,...' for every name and every combination of its settings."""
    found = []
    for name in names:
        options = settings.get(name, {})
        for chosen in itertools.product(*options.values()):
            text = ','.join(f'{key}={value}' for key, value in zip(options, chosen))
            found.append(f'{name}:{text}' if text else name)
    return found


def stochastic(plan: Plan) -> bool:
    """Whether it draws noise after the start."""
    return any(table[:, 2 + plan.num_remembered :].any() for table in (plan.to_x, plan.to_anchor))


def hand_made_plans(
    schedule: Schedule,
    parameterization: Parameterization,
    num_evaluations: int,
    *,
    solver_specs: Sequence[str] = (),
    grid_specs: Sequence[str] = (),
) -> tuple[list[HandMade], dict[str, str]]:
    """(the longest plan of each combination that makes at most `num_evaluations` network calls; {solver: why not all}).

    Plans that are equal number for number are one. Without specs every one there is.
    """
    found, refused = {}, {}
    for grid in grid_specs or specs([name for name in grids.__all__ if name != 'times'], GRIDS):
        for solver in solver_specs or specs(solvers.__all__, SOLVERS):
            try:
                made = longest(schedule, parameterization, solver, grid, num_evaluations)
            except ValueError as error:
                refused.setdefault(solver.partition(':')[0], ' '.join(str(error).split()))
                continue
            found.setdefault(b''.join(table.tobytes() for table in made.plan), made)
    return list(found.values()), refused


def longest(
    schedule: Schedule, parameterization: Parameterization, solver: str, grid: str, num_evaluations: int
) -> HandMade:
    """Raises ValueError where the solver cannot be run there, or has no end point because it draws noise."""
    num_steps, _, plan = within_budget(maker(schedule, solver, grid), num_evaluations)
    check_plan(plan, schedule, parameterization, learned_variance=False)
    if stochastic(plan):
        raise ValueError(NOISY)
    return HandMade(solver, grid, num_steps, plan)


def maker(
    schedule: Schedule, solver: str, grid: str, *, flags: tuple[str, str] = ('--solver', '--grid')
) -> Callable[[int], tuple[np.ndarray, Plan]]:
    """number of steps -> (times, plan). A grid may be a list of times, which has its own number of steps.

    flags: what a mistake is told of. Raises ConfigError where a name or an option is none.
    """
    if listed := grid.startswith(('[', '(')):
        grid = {'name': 'times', 'values': _times(grid, flags[1])}
    make_grid = component(grids, grid, flags[1], 'schedule', 'num_steps')
    make_plan = component(solvers, solver, flags[0], 'schedule', 'grid')

    def make(num_steps):
        times = make_grid(schedule, len(grid['values']) - 1 if listed else num_steps)
        return times, make_plan(schedule, times)

    return make


def _times(text: str, flag: str) -> Sequence[float]:
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        given = None
    if not isinstance(given, list | tuple):
        raise ConfigError(f'{flag}: a list of times is written [1, 0.5, 0], got {text}')
    return given


def within_budget(make: Callable[[int], tuple[np.ndarray, Plan]], budget: int) -> tuple[int, np.ndarray, Plan]:
    """(number of steps, times, plan) with the most steps that take at most `budget` evaluations.

    make: see `maker`. Raises ValueError where no number of steps will do.
    """
    num_steps, least = budget, 1
    while num_steps > 0:
        times, plan = make(num_steps)
        if (over := plan.num_evaluations - budget) <= 0:
            return len(times) - 1, times, plan
        least = len(times) - 1
        num_steps -= max(1, over * num_steps // (4 * plan.num_evaluations))
    raise ValueError(f'{"one step takes" if least == 1 else f"{least} steps take"} more than {budget} evaluations')
