"""The samplers of k-diffusion as references, as `diffusers_reference` has those of diffusers.

    path = run('k-dpmpp-2m', EDM(), oracles.gmm64().posterior, x, num_steps=20, grid='karras')

k-diffusion works on x / alpha = x0 + (sigma / alpha) eps, in the precision of its arguments: float64 here. Only its
sampling.py is loaded, and given the noise that it would draw: the package imports much that sampling does not need.
Beside the extra `parity`: pip install --no-deps k-diffusion
"""

import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers_reference import (
    RHO,
    SIGMA_MIN,
    Denoise,
    Grid,
    Noise,
    Trajectory,
    double_precision,
    load,
    scale,
    seeded,
    trajectory,
)
from diffusers_schedulers import CHURN

from diffjax.core.schedules import Discrete, Schedule


class Sampler(NamedTuple):
    """A function of k-diffusion's sampling.py with its settings."""

    function: str
    options: dict[str, Any] = {}
    stochastic: bool = False
    cost: tuple[int, int] = (1, 0)  # N steps cost cost[0] N + cost[1] evaluations
    fewest: int = 2

    def num_steps(self, num_evaluations: int) -> int:
        """The most steps that cost no more than this."""
        return (num_evaluations - self.cost[1]) // self.cost[0]


def _table() -> dict[str, Sampler]:
    two, still, full, half = (2, -1), {'eta': 0.0}, {'eta': 1.0}, {'eta': 0.5}
    table = {
        'euler': Sampler('sample_euler'),
        'heun': Sampler('sample_heun', cost=two),
        'dpm2': Sampler('sample_dpm_2', cost=two),
        'dpmpp-2m': Sampler('sample_dpmpp_2m'),
        'dpmpp-2m-heun': Sampler('sample_dpmpp_2m_sde', still | {'solver_type': 'heun'}),
        'dpmpp-3m': Sampler('sample_dpmpp_3m_sde', still),
        'dpmpp-2s': Sampler('sample_dpmpp_2s_ancestral', still, cost=two),
        'dpmpp-sde-eta0': Sampler('sample_dpmpp_sde', still, cost=two),
        'dpm-fast': Sampler('sample_dpm_fast', fewest=4),
        'euler-ancestral': Sampler('sample_euler_ancestral', full, True),
        'euler-ancestral-half': Sampler('sample_euler_ancestral', half, True),
        'dpm2-ancestral': Sampler('sample_dpm_2_ancestral', full, True, two),
        'dpmpp-2s-ancestral': Sampler('sample_dpmpp_2s_ancestral', full, True, two),
        'dpmpp-sde': Sampler('sample_dpmpp_sde', full, True, two),
        'dpmpp-2m-sde': Sampler('sample_dpmpp_2m_sde', full, True),
        'dpmpp-2m-sde-heun': Sampler('sample_dpmpp_2m_sde', full | {'solver_type': 'heun'}, True),
        'dpmpp-2m-sde-half': Sampler('sample_dpmpp_2m_sde', half, True),
        'dpmpp-3m-sde': Sampler('sample_dpmpp_3m_sde', full, True),
        'dpm-fast-ancestral': Sampler('sample_dpm_fast', full, True, fewest=4),
        'euler-churn': Sampler('sample_euler', CHURN, True),
        'heun-churn': Sampler('sample_heun', CHURN, True, two),
        'dpm2-churn': Sampler('sample_dpm_2', CHURN, True, two),
    }
    table |= {f'lms-{order}': Sampler('sample_lms', {'order': order}) for order in (1, 2, 3, 4)}
    return {f'k-{name}': sampler for name, sampler in table.items()}


SAMPLERS = _table()
GRIDS = ('karras', 'exponential', 'polyexponential', 'timesteps')


def available() -> bool:
    return importlib.util.find_spec('k_diffusion') is not None


@cache
def sampling() -> types.ModuleType:
    """k-diffusion's sampling.py by itself."""
    if not available():
        raise ModuleNotFoundError('the reference k-diffusion is not installed: pip install --no-deps k-diffusion')
    utils = types.ModuleType('k_diffusion.utils')
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    package = types.ModuleType('k_diffusion')
    package.__path__ = list(importlib.util.find_spec('k_diffusion').submodule_search_locations)
    package.utils = utils
    for needed in ('torchdiffeq', 'torchsde'):
        load(needed)
    before = {name: sys.modules.get(name) for name in ('k_diffusion', 'k_diffusion.utils')}
    sys.modules |= {'k_diffusion': package, 'k_diffusion.utils': utils}
    try:
        path = Path(package.__path__[0]) / 'sampling.py'
        spec = importlib.util.spec_from_file_location('k_diffusion.sampling', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, original in before.items():
            sys.modules.pop(name) if original is None else sys.modules.update({name: original})
    return module


def named_sigmas(schedule: Schedule, num_steps: int, grid: str) -> np.ndarray:
    """sigma / alpha of k-diffusion's grids between the schedule's ends, without the 0 that it appends. [N]."""
    table = isinstance(schedule, Discrete)
    ends = np.array([1.0, 1 / schedule.num_timesteps if table else 0.0])
    top, low = np.exp(-0.5 * schedule.logsnr(ends[:1]))[0], SIGMA_MIN
    if table:
        low = np.exp(-0.5 * schedule.logsnr(ends[1:]))[0]
    ramp = np.linspace(0, 1, num_steps)
    if grid == 'karras':
        return (top ** (1 / RHO) + ramp * (low ** (1 / RHO) - top ** (1 / RHO))) ** RHO
    if grid in ('exponential', 'polyexponential'):
        return np.exp((1 - ramp) ** (1.0 if grid == 'exponential' else 2.0) * np.log(top / low) + np.log(low))
    if grid == 'timesteps' and table:  # log sigma interpolated between the table's entries
        return np.exp(-0.5 * schedule.logsnr(np.linspace(*ends, num_steps)))
    raise ValueError(f'on {type(schedule).__name__} k-diffusion has no grid {grid!r}; it is one of {", ".join(GRIDS)}')


def run(
    name: str,
    schedule: Schedule,
    denoise: Denoise,
    x: np.ndarray,
    num_steps: int,
    grid: Grid = 'karras',
    *,
    noise: Noise | None = None,
) -> Trajectory:
    """Follows one of SAMPLERS in float64.

    Args:
        schedule: one with alpha > 0 where the grid begins.
        denoise: `GaussianMixture.posterior`, or anything of its kind.
        x: [B, D], the state at the first time, in the schedule's scale.
        grid: one of GRIDS, after which comes 0, or the times [S + 1] of a grid with its end. dpm-fast makes its own
            steps between the first and the last positive level, for a budget of `num_steps` evaluations.
        noise: m -> the draw [B, D] made after evaluation m and before the next, m = -1 before the first; default:
            seeded. A sampler that draws twice is to be given one number for each call of `noise`.
    """
    sampler, torch, calls = SAMPLERS[name], load('torch'), []
    if isinstance(grid, str):
        sigmas = np.append(named_sigmas(schedule, num_steps, grid), 0.0)
    else:
        sigmas = np.exp(-0.5 * schedule.logsnr(np.asarray(grid, np.float64)))
    noise = noise or seeded(x.shape)

    def draw(*args):
        return torch.from_numpy(np.array(noise(len(calls) - 1), np.float64))

    def model(y, sigma):
        calls.append((1.0, float(sigma[0]), y.numpy()))
        return torch.from_numpy(denoise(y.numpy(), 1.0, float(sigma[0])).x0)

    options = sampler.options | ({'noise_sampler': draw} if 'eta' in sampler.options else {})
    levels = {'sigmas': torch.from_numpy(sigmas)}
    if sampler.function == 'sample_dpm_fast':
        levels = {'sigma_min': float(sigmas[sigmas > 0][-1]), 'sigma_max': float(sigmas[0]), 'n': num_steps}
    y = torch.from_numpy(x / scale(schedule, 1.0, sigmas[0]))
    with double_precision(module := sampling(), randn_like=draw):
        y = getattr(module, sampler.function)(model, y, **levels, disable=True, **options)
    end = levels.get('sigma_min', sigmas[-1])
    return trajectory(schedule, [*calls, (1.0, float(end), y.numpy())])
