"""One line for each pair of a reference and the solver that is held against it, and how they are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffjax.core import solvers
from diffjax.core.schedules import EDM, Flow, ScaledLinear, Schedule

TABLE, SIGMAS, LINE = ScaledLinear(), EDM(), Flow()
STATES, FINAL = 1e-9, 2e-5  # relative: every state with float64 plans, the result in float32


def every(t: np.ndarray) -> np.ndarray:
    """The reference's times are our grid."""
    return t


def two_stages(t: np.ndarray) -> np.ndarray:
    """Every other evaluation is at a step's stage; the last step has none."""
    return np.append(t[:-1:2], t[-1])


def once(t: np.ndarray) -> np.ndarray:
    """Some times are asked about twice."""
    return t[np.append(True, np.abs(np.diff(t)) > 1e-12)]


def after_runge_kutta(t: np.ndarray) -> np.ndarray:
    """Three steps of four evaluations come first."""
    return np.append(t[:12:4], t[12:])


def fast(t: np.ndarray) -> np.ndarray:
    """Steps of three evaluations, equal in log sigma; the last ones of fewer, and no step to 0."""
    return np.append(t[:18:3], t[18])


def own(noise, t: np.ndarray, schedule: Schedule):
    return noise


def brownian(noise, t: np.ndarray, schedule: Schedule):
    """Two draws of a step share a path in sigma / alpha: W(a, c) from W(a, b) and a fresh W(b, c)."""
    ratio = np.exp(-0.5 * schedule.logsnr(t))

    def draw(m):
        if m % 2 == 0:
            return noise(m)
        shared = np.sqrt((ratio[m - 1] - ratio[m]) / (ratio[m - 1] - ratio[m + 1]))
        return shared * noise(m - 1) + np.sqrt(1 - shared**2) * noise(m)

    return draw


class Case(NamedTuple):
    """A reference and ours."""

    theirs: str
    ours: str
    options: dict[str, Any] = {}
    grid: str = 'linspace'
    num_steps: int = 17
    schedule: Schedule = TABLE
    grid_of: Callable[[np.ndarray], np.ndarray] = every  # the reference's times -> our grid
    noise: Callable = own
    first: int | None = None  # only so many evaluations are alike
    like: str = ''  # the reference whose times are the grid, where theirs adds noise and asks elsewhere
    differs: str = ''  # why they are not the same; it is checked that they are not

    @property
    def name(self) -> str:
        settings = '-'.join(f'{key}={value}' for key, value in self.options.items())
        parts = self.theirs, type(self.schedule).__name__, self.grid, str(self.num_steps), self.ours, settings
        return '-'.join(part for part in parts if part)


def gap(case: Case, run: Callable, program, dtype=np.float64) -> np.ndarray:
    """Largest difference in each state, relative to the state's largest value. [1 + evaluations]."""

    def follow(name, x, noise=None):
        return run(name, case.schedule, program.mixture.posterior, x, case.num_steps, case.grid, noise=noise)

    t = follow(case.like or case.theirs, np.zeros((program.BATCH, 2))).t
    plan = getattr(solvers, case.ours)(case.schedule, case.grid_of(t), **case.options)
    x = program.start(t[0])
    theirs = follow(case.theirs, x, case.noise(program.noise(dtype), t, case.schedule))
    num = case.first or theirs.num_evaluations
    assert plan.num_evaluations == num
    np.testing.assert_allclose(plan.t, theirs.t[:num], rtol=1e-9, err_msg='asked at other times')
    difference = np.abs(program(plan, x, dtype) - theirs.states[: num + 1]).max((1, 2))
    return difference / np.abs(theirs.states[: num + 1]).max((1, 2))
