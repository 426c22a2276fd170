"""The schedulers of diffusers as references: each beside ours, on one of our schedules, with an exact denoiser.

    path = run('unipc-3-bh2', Linear(), oracles.gmm64().posterior, x, num_steps=20, grid='karras')

gives the times at which the scheduler asked for the network, the state that it asked about each time and the result, in
this project's notation (x_t = alpha x0 + sigma eps, t in [0, 1]), whatever the scheduler's own scale.

Precision. diffusers writes float32 into its tables, grids and steps, by name. `double_precision` puts stand-ins for
`torch` and `numpy` into the scheduler's module, in which the name float32 means float64: what runs is the library's own
code, with no table overwritten afterwards, and a scheduler that makes its tables in another way is covered too.

Levels. The oracle is evaluated at the noise level that the scheduler's step uses (its sigma). The integer timestep that
it would tell a network, a rounded version of the same, is not used. The schedule's betas are handed over as they are.

Noise. A stochastic scheduler draws one z at most in a call of `step`; `noise(m)` gives the one of call m, so that
another sampler can be given the same.

Needs the extra `parity`: pip install -e '.[parity]'. The samplers of k-diffusion stand in kdiffusion_reference.py.
"""

import contextlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from diffusers_schedulers import GRIDS, OUTPUTS, PAIR, REFERENCES, TIMESTEP, VELOCITY, Reference

from diffjax.core.schedules import EDM, Discrete, Flow, Schedule, log
from diffjax.core.types import Estimate

Denoise = Callable[[np.ndarray, float, float], Estimate]  # (x, alpha, sigma) -> what an exact network knows
Noise = Callable[[int], np.ndarray]
Grid = str | Sequence[float]
SIGMA_MIN, RHO = 0.002, 7.0  # of EDM (Karras et al. 2022, Table 1)


class Trajectory(NamedTuple):
    """What a reference did, in this project's notation: M network evaluations and where they led."""

    t: np.ndarray  # [M + 1]: the times of the evaluations, and that of the result
    states: np.ndarray  # [M + 1, B, D]: what the network was asked about, and the result

    @property
    def num_evaluations(self) -> int:
        return len(self.t) - 1


NAMES = {'torch', 'np', 'randn_tensor'}  # what a module imports at its top and is given another of


class _Double:
    """A module in which the name float32 means float64."""

    def __init__(self, module, replaced):
        self._module, self._replaced = module, replaced

    def __getattr__(self, name):
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._module, 'float64' if name == 'float32' else name)


@contextlib.contextmanager
def double_precision(module, **replaced):
    """Within, the code of `module` runs in float64, and draws its noise from what `replaced` names."""
    import torch

    before, default = {name: vars(module)[name] for name in vars(module).keys() & NAMES}, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for name, original in before.items():
            setattr(module, name, replaced[name] if name in replaced else _Double(original, replaced))
        yield
    finally:
        torch.set_default_dtype(default)
        for name, original in before.items():
            setattr(module, name, original)


def load(name: str):
    """A module of a reference, or one line that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = f"the references need {error.name}, which is not installed: pip install -e '.[parity]'"
        raise ModuleNotFoundError(hint) from error


def given_times(schedule: Schedule, num_steps: int, grid: Grid) -> Grid:
    """A grid by its name where the scheduler has it, and as times where users hand it over.

    On EDM sigma falls from the schedule's largest to 0.002 by Karras's rho 7, or log-linearly; on Flow 'uniform' is
    what pipelines give, 1 to 1 / N.
    """
    if isinstance(schedule, Flow) and grid == 'uniform':
        return np.linspace(1, 1 / num_steps, num_steps)
    if not isinstance(schedule, EDM) or not isinstance(grid, str):
        return grid
    if grid == 'karras':
        sigmas = np.linspace(schedule.sigma_max ** (1 / RHO), SIGMA_MIN ** (1 / RHO), num_steps) ** RHO
    elif grid == 'exponential':
        sigmas = np.exp(np.linspace(np.log(schedule.sigma_max), np.log(SIGMA_MIN), num_steps))
    else:
        raise ValueError(f'on EDM a grid of the references is karras, exponential or a list of times; got {grid!r}')
    return schedule.t_of_logsnr(-2 * np.log(sigmas))


def configure(reference: Reference, schedule: Schedule, grid: Grid) -> Any:
    """The scheduler on a schedule's own tables; ValueError where it does not know such a schedule or grid."""
    make = getattr(load('diffusers'), reference.scheduler)
    known = set(inspect.signature(make.__init__).parameters)
    options = dict(reference.options)
    if 'prediction_type' in known:
        output = reference.family.output
        options['prediction_type'] = 'epsilon' if output == 'preconditioned' else output
    wanted = schedule_options(reference, schedule, known) | grid_options(reference, grid, known)
    by_timesteps = reference.family.level is TIMESTEP.level and not isinstance(grid, str)
    if by_timesteps and 'timesteps' not in inspect.signature(make.set_timesteps).parameters:
        wanted['timesteps'] = grid
    if missing := sorted(wanted.keys() - known):
        where = f'on {type(schedule).__name__} with the grid {grid if isinstance(grid, str) else "of given times"}'
        raise ValueError(f'{reference.scheduler} does not run {where}: it has no {", ".join(missing)}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # of forms that are to go, asked for by name here
        return make(**options | wanted)


def schedule_options(reference: Reference, schedule: Schedule, known: set[str]) -> dict[str, Any]:
    """What makes the scheduler's levels those of the schedule; an option that it lacks says that it can't."""
    if reference.family is PAIR:  # it has a schedule of its own, whose levels lie on any
        return {}
    if isinstance(schedule, Discrete) and schedule.zero_terminal:  # diffusers puts 2^-24 into the last entry
        raise ValueError('the references run on tables without zero_terminal')
    if isinstance(schedule, Discrete):
        return {'trained_betas': schedule.betas().tolist(), 'num_train_timesteps': schedule.num_timesteps}
    if isinstance(schedule, Flow):
        return {} if reference.family is VELOCITY else {'use_flow_sigmas': True}
    if isinstance(schedule, EDM) and 'sigma_data' in known:
        return {'sigma_min': SIGMA_MIN, 'sigma_max': schedule.sigma_max, 'sigma_schedule': 'karras'}
    if isinstance(schedule, EDM):  # its levels come as a given grid; the table stays unused
        return {'trained_betas': None, 'use_karras_sigmas': True}
    raise ValueError(f'the references run on discrete tables, Flow and EDM; got {type(schedule).__name__}')


def grid_options(reference: Reference, grid: Grid, known: set[str]) -> dict[str, Any]:
    """What chooses a grid of the scheduler's own, or makes room for a given one."""
    if not isinstance(grid, str):
        return {} if reference.family.level is TIMESTEP.level or 'sigma_schedule' in known else GRIDS['karras']
    if grid not in GRIDS:
        raise ValueError(f'a grid of the references is one of {", ".join(GRIDS)}, or a list of times; got {grid!r}')
    shift = 'flow_shift' if 'flow_shift' in known else 'shift'
    return {shift if name == 'shift' else name: value for name, value in GRIDS[grid].items()}


def set_grid(scheduler, reference: Reference, schedule: Schedule, num_steps: int, grid: Grid) -> None:
    """The scheduler's `set_timesteps`. Given times take the place of Karras's sigmas; the rest is its own."""
    if isinstance(grid, str):
        return scheduler.set_timesteps(num_steps)
    t = np.asarray(grid, np.float64)
    if reference.family.level is TIMESTEP.level:
        return scheduler.set_timesteps(timesteps=np.rint(schedule.timestep(t)).astype(int).tolist())
    flow = isinstance(schedule, Flow) and reference.scheduler != 'UniPCMultistepScheduler'
    sigmas = schedule.sigma(t) / (1.0 if flow else schedule.alpha(t))
    if hasattr(scheduler, '_compute_karras_sigmas'):
        scheduler._compute_karras_sigmas = lambda ramp: load('torch').from_numpy(sigmas)
    else:
        scheduler._convert_to_karras = lambda **kwargs: sigmas
    return scheduler.set_timesteps(len(t))


def time_of(schedule: Schedule, alpha: float, sigma: float) -> np.ndarray:
    """The schedule's time at which sigma / alpha is this. []."""
    return np.asarray(schedule.t_of_logsnr(2 * (log(np.float64(alpha)) - log(np.float64(sigma)))), np.float64)


def scale(schedule: Schedule, alpha: float, sigma: float) -> float:
    """What carries a state of a reference's own scale, alpha x0 + sigma eps, into the schedule's."""
    t = time_of(schedule, alpha, sigma)
    return float(np.hypot(schedule.alpha(t), schedule.sigma(t)) / np.hypot(alpha, sigma))


def trajectory(schedule: Schedule, calls: list[tuple[float, float, np.ndarray]]) -> Trajectory:
    """(alpha, sigma, x) of each evaluation and of the result, in a reference's own scale, in the schedule's."""
    t = np.array([time_of(schedule, alpha, sigma) for alpha, sigma, _ in calls])
    return Trajectory(t, np.stack([scale(schedule, alpha, sigma) * x for alpha, sigma, x in calls]))


def seeded(shape: tuple[int, ...]) -> Noise:
    return lambda m: np.random.default_rng([0, m + 1]).standard_normal(shape)


def run(
    name: str,
    schedule: Schedule,
    denoise: Denoise,
    x: np.ndarray,
    num_steps: int,
    grid: Grid = 'linspace',
    *,
    noise: Noise | None = None,
) -> Trajectory:
    """Follows one of REFERENCES in float64.

    Args:
        schedule: a discrete table, Flow, or EDM.
        denoise: `GaussianMixture.posterior`, or anything of its kind.
        x: [B, D], the state at the scheduler's first time, in the schedule's scale.
        grid: on tables one of GRIDS, on Flow 'shift=1', 'shift=3' or 'uniform', on EDM 'karras' or 'exponential'; or
            the times [N] of the scheduler's steps, after which it lands where it always does (N is then num_steps).
        noise: m -> the draw [B, D] in call m of `step`; default: seeded.
    """
    reference, torch, calls = REFERENCES[name], load('torch'), []
    grid = given_times(schedule, num_steps, grid)
    noise = noise or seeded(x.shape)

    def draw(*args, **kwargs):
        return torch.from_numpy(np.array(noise(len(calls) - 1), np.float64))

    module = sys.modules[getattr(load('diffusers'), reference.scheduler).__module__]
    with double_precision(module, randn_tensor=draw):
        scheduler = configure(reference, schedule, grid)
        set_grid(scheduler, reference, schedule, num_steps, grid)
        if hasattr(scheduler, 'set_begin_index'):
            scheduler.set_begin_index(0)
        if hasattr(scheduler, 'noise_sampler'):  # in place of a Brownian path
            scheduler.noise_sampler = draw
        x = torch.from_numpy(x / scale(schedule, *reference.family.level(scheduler, 0)))
        for i, timestep in enumerate(scheduler.timesteps):
            calls.append((*reference.family.level(scheduler, i), x.numpy()))
            if hasattr(scheduler, 'scale_model_input'):  # some count on having been asked
                scheduler.scale_model_input(x, timestep)
            output = output_of(reference, denoise, *calls[-1])
            x = scheduler.step(torch.from_numpy(output), timestep, x, return_dict=False, **reference.step)[0]
        calls.append((*reference.family.end(scheduler), x.numpy()))
    return trajectory(schedule, calls)


def output_of(reference: Reference, denoise: Denoise, alpha: float, sigma: float, x: np.ndarray) -> np.ndarray:
    """What the exact network tells the scheduler."""
    return OUTPUTS[reference.family.output](denoise(x, alpha, sigma), x, alpha, sigma)
