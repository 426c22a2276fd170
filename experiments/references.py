"""All references at one budget: where the solvers of diffusers and k-diffusion end, for `compare_samplers --reference`.

    for ending in endings(schedule, mixture.posterior, start, num_evaluations=20): ...

Each is run on the grids that it is used on (see `grids`), with the most steps that the budget allows.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import diffusers_reference
import kdiffusion_reference
import numpy as np
from diffusers_reference import Denoise
from diffusers_schedulers import DISTILLED, GRIDS, PAIR, REFERENCES, VELOCITY
from kdiffusion_reference import SAMPLERS

from diffjax.core.schedules import EDM, Discrete, Flow, Schedule


class Ending(NamedTuple):
    """Where one reference ended."""

    solver: str  # a name of REFERENCES or SAMPLERS
    grid: str
    num_steps: int
    num_evaluations: int
    stochastic: bool
    x: np.ndarray  # [B, D]; NaN where the reference makes NaN, or refuses
    failure: str = ''  # what it said when it refused


def grids(name: str, schedule: Schedule) -> list[str]:
    """The grids of a reference on a schedule; none where it does not run there."""
    if name in SAMPLERS:  # they work on x / alpha
        table = ['timesteps'] if isinstance(schedule, Discrete) else []
        begins = np.isfinite(schedule.logsnr(np.float64(1.0)))
        return ['karras', 'exponential', 'polyexponential', *table] if begins else []
    reference = REFERENCES[name]
    if reference.family is PAIR:  # its own schedule is none of ours
        return []
    if isinstance(schedule, EDM):
        names = ['karras', 'exponential']
    elif isinstance(schedule, Flow):
        names = ['shift=1', 'shift=3'] + (['uniform', 'karras', 'beta'] if reference.family is VELOCITY else [])
    elif reference.scheduler in DISTILLED:
        names = ['own']
    else:
        names = [grid for grid in GRIDS if not grid.startswith('shift')]
    known = [grid for grid in names if _runs(name, schedule, grid)]
    return [grid for grid in known if grid != 'own'] if 'linspace' in known else known


@cache
def _runs(name: str, schedule: Schedule, grid: str) -> bool:
    try:
        diffusers_reference.configure(REFERENCES[name], schedule, diffusers_reference.given_times(schedule, 2, grid))
    except ValueError:
        return False
    return True


def endings(
    schedule: Schedule, denoise: Denoise, x: np.ndarray, num_evaluations: int, *, stochastic: bool = False
) -> Iterator[Ending]:
    """Every reference whose least number of steps the budget allows, on each of its grids.

    Args:
        x: [B, D], the state at t = 1; also where a grid begins below it, as its users do.
        stochastic: those whose end point is random, instead of those whose end point is not.
    """
    diffusers_reference.load('diffusers'), kdiffusion_reference.sampling()  # what is missing is told at once
    for name, reference in (REFERENCES | SAMPLERS).items():
        num_steps = reference.num_steps(num_evaluations)
        if reference.stochastic != stochastic or num_steps < reference.fewest:
            continue
        module = kdiffusion_reference if name in SAMPLERS else diffusers_reference
        for grid in grids(name, schedule):
            try:
                path = module.run(name, schedule, denoise, x, num_steps, grid)
            except ValueError as error:  # more steps than it knows, say: a finding, which goes into the table
                nothing = np.full_like(x, np.nan)
                yield Ending(name, grid, num_steps, num_evaluations, stochastic, nothing, ' '.join(str(error).split()))
                continue
            yield Ending(name, grid, num_steps, path.num_evaluations, stochastic, path.states[-1])
