"""Time grids: `grid(schedule, num_steps, **options) -> t [num_steps + 1]`, float64, from noise to data.

A solver may also be given the reverse of one (inversion), or any list of times.
"""

import numpy as np

from diffjax.core.schedules import Schedule

__all__ = ['karras', 'logsnr', 'uniform']


def uniform(schedule: Schedule, num_steps: int, *, start: float = 1.0, end: float = 0.0) -> np.ndarray:
    """Equal steps in t from `start` to `end`; on a discrete schedule trailing integer timesteps."""
    return np.linspace(start, end, num_steps + 1)


def logsnr(schedule: Schedule, num_steps: int, *, low: float = -10.0, high: float = 10.0) -> np.ndarray:
    """`num_steps` times with equal steps in logsnr from `low` to `high` (Lu et al. 2022, section 3.4), then t = 0.

    Where the schedule does not reach `low` the grid starts at t = 1.
    """
    low = max(low, float(schedule.logsnr(np.float64(1.0))))
    return np.append(schedule.t_of_logsnr(np.linspace(low, high, num_steps)), 0.0)


def karras(
    schedule: Schedule, num_steps: int, *, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """Equal steps in (sigma / alpha)^(1 / rho) between sigma_max and sigma_min, then t = 0 (Karras et al. 2022, Eq. 5).

    Where the schedule does not reach `sigma_max` the grid starts at t = 1.
    """
    sigma_max = min(sigma_max, float(np.exp(-0.5 * schedule.logsnr(np.float64(1.0)))))
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    return np.append(schedule.t_of_logsnr(-2 * np.log(ramp)), 0.0)
