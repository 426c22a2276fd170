"""Time grids: `grid(schedule, num_steps, **options) -> t [num_steps + 1]`, float64, falling from noise to data.

A solver may also be given the reverse of one (inversion), or any list of times. Three kinds stand here:

- times placed on [0, 1] itself: `uniform`, `beta`, `shifted`, `dynamic_shift`, `times`;
- integer timesteps of a table, i at t = (i + 1) / T: `leading`, `trailing`, `linspace`. A schedule without a table is
  treated as one of 1000 entries;
- noise levels sigma / alpha: `karras`, `exponential`, `polyexponential`, `logsnr`, `softplus`, `align_your_steps`.
  They start at t = 1 where the schedule does not reach the highest level that is asked for, and on a table they go down
  to its first entry, below which no network was trained.

Grids of the last two kinds end as `end` says: 'zero', at t = 0 after the lowest level, or 'lowest', at the lowest level
itself (sigma_min, or the table's first entry).
"""

from collections.abc import Callable, Sequence

import numpy as np

from diffjax.core.checks import check_choice, check_number, check_whole
from diffjax.core.schedules import Schedule

__all__ = [
    'align_your_steps',
    'beta',
    'dynamic_shift',
    'exponential',
    'karras',
    'leading',
    'linspace',
    'logsnr',
    'polyexponential',
    'shifted',
    'softplus',
    'times',
    'trailing',
    'uniform',
]

OPTIMISED_LEVELS = {  # sigma / alpha of ten steps (Sabour et al. 2024, Table 3)
    'sd15': (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    'sdxl': (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    'deepfloyd': (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    'svd': (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
LOWEST_LEVEL = 0.002  # sigma_min where there is no table (Karras et al. 2022, Table 1)


def uniform(schedule: Schedule, num_steps: int, *, start: float = 1.0, end: float = 0.0) -> np.ndarray:
    """Equal steps in t from `start` to `end`; on a table `trailing` without its rounding."""
    check_number("uniform's start", start, high=1.0)
    check_number("uniform's end", end, high=1.0)
    return np.linspace(start, end, num_steps + 1)


def times(schedule: Schedule, num_steps: int, *, values: Sequence[float]) -> np.ndarray:
    """The given times, falling within [0, 1]; a list or tuple in a config's `grid` means this.

    Raises ValueError where they are not `num_steps` steps: no run is filed under a number of steps it did not take.
    """
    t = np.asarray(values, np.float64) if isinstance(values, list | tuple | np.ndarray) else np.zeros(0)
    if t.ndim != 1 or len(t) < 2 or not ((np.diff(t) < 0).all() and t[0] <= 1 and t[-1] >= 0):
        raise ValueError(f'values are at least two times that fall within [0, 1], such as [1, 0.5, 0]; got {values}')
    if len(t) != num_steps + 1:
        steps = len(t) - 1
        raise ValueError(f'{len(t)} times make {steps} steps, and num_steps is {num_steps}: set it to {steps}')
    return t


def beta(schedule: Schedule, num_steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> np.ndarray:
    """Quantiles of the beta distribution at equal steps, closer towards both ends (Lee et al. 2024, "Beta Sampling").

    On a table the lowest time before 0 is its first entry.
    """
    from scipy.stats import beta as distribution

    check_number("beta's alpha", alpha, inside=True)
    check_number("beta's beta", beta, inside=True)
    low = schedule.first_time
    quantiles = distribution.ppf(np.linspace(1, 0, num_steps + (low == 0)), alpha, beta)
    t = low + (1 - low) * quantiles
    return _falling(np.append(t, 0.0) if low else t, schedule)


def shifted(schedule: Schedule, num_steps: int, *, shift: float = 3.0, low: float = 0.0) -> np.ndarray:
    """t' = shift t / (1 + (shift - 1) t) of equal steps in t from 1 to 0 (Esser et al. 2024, Eq. 23).

    On `Flow` it adds -2 log(shift) to the log-SNR. Both ends stay where they are: the shift is applied once.

    Args:
        low: above 0 the `num_steps` times run from 1 to it, before they are shifted, and t' = 0 follows. For Stable
            Diffusion 3 as diffusers samples it: 0.001 shifted once, so that its last level is shifted twice.
    """
    check_number('a shift', shift, inside=True)
    check_number("shifted's low", low)
    if low >= 1:
        raise ValueError(f"shifted's low lies below 1, got {low}")
    t = np.append(np.linspace(1, low, num_steps), 0.0) if low else np.linspace(1, 0, num_steps + 1)
    return shift * t / (1 - t + shift * t)  # the same, and 1 at t = 1 to the last digit


def dynamic_shift(
    schedule: Schedule,
    num_steps: int,
    *,
    num_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> np.ndarray:
    """`shifted` by exp(mu), mu linear in the number of tokens that the network attends to (FLUX.1).

    mu = base_shift at base_tokens and max_shift at max_tokens, and on the same line outside.

    Args:
        num_tokens: of one sample; 4096 is a FLUX image of 1024 x 1024.
    """
    for name, value in (('num_tokens', num_tokens), ('base_tokens', base_tokens), ('max_tokens', max_tokens)):
        check_whole(f"dynamic_shift's {name}", value)
    for name, value in (('base_shift', base_shift), ('max_shift', max_shift)):
        check_number(f"dynamic_shift's {name}", value, -np.inf)
    if base_tokens == max_tokens:
        raise ValueError(f'base_tokens and max_tokens are two numbers, got {base_tokens} twice')
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return shifted(schedule, num_steps, shift=float(np.exp(base_shift + slope * (num_tokens - base_tokens))))


def leading(schedule: Schedule, num_steps: int, *, steps_offset: int = 0, end: str = 'zero') -> np.ndarray:
    """Timesteps 0, k, 2k, ..., k = floor(T / num_steps), plus `steps_offset` (Lin et al. 2024, Table 2).

    It stops short of the last timestep. Stable Diffusion 1 and 2 are sampled with steps_offset = 1, end = 'lowest'.
    """
    total = _num_timesteps(schedule, num_steps)
    check_whole("leading's steps_offset", steps_offset, -np.inf)
    if num_steps == 1:
        raise ValueError('one leading step starts at timestep 0, where there is no noise to remove: use trailing')
    steps = np.arange(num_steps)[::-1] * (total // num_steps) + steps_offset
    if not 0 <= steps[-1] <= steps[0] < total:
        raise ValueError(
            f'timesteps lie within 0 to {total - 1}, and {num_steps} leading steps with steps_offset = {steps_offset} '
            f'go from {steps[0]} to {steps[-1]}'
        )
    return _at_timesteps(steps, total, end)


def trailing(schedule: Schedule, num_steps: int, *, end: str = 'zero') -> np.ndarray:
    """Timesteps round(T - i T / num_steps) - 1, from the last one on (Lin et al. 2024, Table 2)."""
    total = _num_timesteps(schedule, num_steps)
    steps = np.arange(total, 0, -total / num_steps)[:num_steps]  # rounding may let arange go one further, to 0
    return _at_timesteps(np.round(steps) - 1, total, end)


def linspace(schedule: Schedule, num_steps: int, *, end: str = 'zero') -> np.ndarray:
    """Timesteps rounded from equal steps between T - 1 and 0 (Lin et al. 2024, Table 2); one step starts at T - 1."""
    total = _num_timesteps(schedule, num_steps)
    steps = np.linspace(0, total - 1, num_steps)[::-1] if num_steps > 1 else np.array([total - 1.0])
    return _at_timesteps(np.round(steps), total, end)


def logsnr(
    schedule: Schedule, num_steps: int, *, low: float = -10.0, high: float | None = None, end: str = 'zero'
) -> np.ndarray:
    """Equal steps in logsnr from `low` to `high` (Lu et al. 2022a, section 3.4).

    Args:
        high: None for 10, or a table's first entry.
    """
    check_number("logsnr's low", low, -np.inf)
    if high is not None:
        check_number("logsnr's high", high, -np.inf)
    else:
        high = float(schedule.logsnr(np.float64(schedule.first_time))) if schedule.first_time else 10.0
    return _at_levels(schedule, num_steps, np.exp(-0.5 * high), np.exp(-0.5 * low), end, _power_of_logs(1.0))


def exponential(
    schedule: Schedule,
    num_steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float = 80.0,
    end: str = 'zero',
) -> np.ndarray:
    """Equal steps in log(sigma / alpha) from sigma_max to sigma_min: `logsnr` between other ends (k-diffusion).

    Args:
        sigma_min: None for 0.002, or a table's first entry.
    """
    return _at_levels(schedule, num_steps, sigma_min, sigma_max, end, _power_of_logs(1.0))


def polyexponential(
    schedule: Schedule,
    num_steps: int,
    *,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float = 80.0,
    end: str = 'zero',
) -> np.ndarray:
    """log(sigma / alpha) falls like u^rho, u from 1 to 0 in equal steps: `exponential` at rho = 1 (k-diffusion).

    Args:
        rho: above 1 closer towards sigma_min.
        sigma_min: None for 0.002, or a table's first entry.
    """
    return _at_levels(schedule, num_steps, sigma_min, sigma_max, end, _power_of_logs(rho))


def karras(
    schedule: Schedule,
    num_steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float = 80.0,
    end: str = 'zero',
) -> np.ndarray:
    """Equal steps in (sigma / alpha)^(1 / rho) from sigma_max to sigma_min (Karras et al. 2022, Eq. 5).

    Args:
        sigma_min: None for 0.002, or a table's first entry.
    """
    check_number('rho', rho, inside=True)

    def curve(log_low, log_high, u):
        low, high = np.exp(log_low / rho), np.exp(log_high / rho)
        return rho * np.log(low + u * (high - low))

    return _at_levels(schedule, num_steps, sigma_min, sigma_max, end, curve)


def softplus(
    schedule: Schedule,
    num_steps: int,
    *,
    knee: float = 3.0,
    sigma_min: float | None = None,
    end: str = 'zero',
) -> np.ndarray:
    """Equal steps in log(1 + knee alpha / sigma): in log-SNR at low noise, in alpha / sigma at high noise.

    Few steps are spent near pure noise, where x0 hardly changes. Made for unipc:polynomial=softplus, which interpolates
    in the same coordinate. On `Flow` knee = 1 is equal steps in log t.

    Args:
        knee: the sigma / alpha at which one turns into the other; a few times the data's scale.
        sigma_min: None for 0.2 / num_steps, or a table's first entry.
    """
    check_number("softplus's knee", knee, inside=True)
    low = 0.2 / num_steps if sigma_min is None and not schedule.first_time else _lowest_level(schedule, sigma_min)
    reached = float(np.exp(-0.5 * schedule.logsnr(np.float64(1.0))))
    if not 0 < low < reached:
        raise ValueError(f'sigma_min lies between 0 and {reached:g}, the highest sigma / alpha; got {low:g}')
    steps = np.linspace(np.log1p(knee / reached), np.log1p(knee / low), num_steps + (end == 'lowest'))
    with np.errstate(divide='ignore'):
        return _to_times(schedule, -np.log(np.expm1(steps) / knee), end)


def align_your_steps(schedule: Schedule, num_steps: int, *, model: str = 'sd15', end: str = 'zero') -> np.ndarray:
    """Noise levels optimised for one model (Sabour et al. 2024, Table 3), log-linearly interpolated to num_steps.

    With end = 'zero' the lowest level gives way to t = 0: ten steps are ten evaluations.

    Args:
        model: 'sd15', 'sdxl', 'deepfloyd' or 'svd': whose levels.
    """
    check_choice('model', model, OPTIMISED_LEVELS)
    given = np.log(OPTIMISED_LEVELS[model])
    if schedule.first_time:
        given[-1] = max(given[-1], np.log(_lowest_level(schedule)))
    logs = np.interp(np.linspace(0, 1, num_steps + 1), np.linspace(0, 1, len(given)), given)
    return _to_times(schedule, logs if end == 'lowest' else logs[:-1], end)


def _power_of_logs(rho: float) -> Callable:
    check_number('rho', rho, inside=True)
    return lambda log_low, log_high, u: log_low + u**rho * (log_high - log_low)


def _lowest_level(schedule: Schedule, sigma_min: float | None = None) -> float:
    """sigma_min, or the lowest sigma / alpha that is worth asking for: of a table's first entry, or EDM's sigma_min."""
    if sigma_min is not None:
        check_number('sigma_min', sigma_min, inside=True)
        return sigma_min
    first = np.float64(schedule.first_time)
    return float(schedule.sigma(first) / schedule.alpha(first)) if first else LOWEST_LEVEL


def _at_levels(
    schedule: Schedule, num_steps: int, sigma_min: float | None, sigma_max: float, end: str, curve: Callable
) -> np.ndarray:
    """Times at log(sigma / alpha) = curve(lowest, highest, u), u from 1 to 0 in equal steps, and what `end` says."""
    check_number('sigma_max', sigma_max, inside=True)
    low = _lowest_level(schedule, sigma_min)
    reached = float(np.exp(-0.5 * schedule.logsnr(np.float64(1.0))))
    if not 0 < low < min(sigma_max, reached):
        raise ValueError(
            f'noise levels sigma / alpha from {sigma_max:g} to {low:g}, on {type(schedule).__name__} from at most '
            f'{reached:g}: the lowest must be above 0 and below the highest'
        )
    u = np.linspace(1, 0, num_steps + (end == 'lowest'))
    return _to_times(schedule, curve(np.log(low), np.log(min(sigma_max, reached)), u), end)


def _to_times(schedule: Schedule, log_levels: np.ndarray, end: str) -> np.ndarray:
    """Times of falling log(sigma / alpha), the first at t = 1 where the schedule does not reach it."""
    _check_end(end)
    t = schedule.t_of_logsnr(-2 * log_levels)
    if log_levels[0] > -0.5 * schedule.logsnr(np.float64(1.0)) - 1e-9:
        t[0] = 1.0
    return _falling(t if end == 'lowest' else np.append(t, 0.0), schedule)


def _num_timesteps(schedule: Schedule, num_steps: int) -> int:
    """T of the table, or 1000."""
    total = round(1 / schedule.first_time) if schedule.first_time else 1000
    if not 1 <= num_steps <= total:
        raise ValueError(f'integer timesteps give at most {total} steps, got num_steps = {num_steps}')
    return total


def _at_timesteps(steps: np.ndarray, total: int, end: str) -> np.ndarray:
    """Times of integer timesteps, and the end: t = 0, or the first entry."""
    _check_end(end)
    if end == 'lowest' and steps[-1] == 0:
        raise ValueError("the last evaluation is at timestep 0, where end = 'lowest' would end: use end = 'zero'")
    return np.append((steps + 1) / total, 0.0 if end == 'zero' else 1 / total)


def _check_end(end: str) -> None:
    if end not in ('zero', 'lowest'):
        raise ValueError(f"end is 'zero' (t = 0) or 'lowest' (the lowest noise level), got {end!r}")


def _falling(t: np.ndarray, schedule: Schedule) -> np.ndarray:
    if (np.diff(t) < 0).all():
        return t
    where = t[:-1][np.diff(t) >= 0][0]
    raise ValueError(
        f'two of the {len(t)} times on {type(schedule).__name__} meet at t = {where:g}: take fewer steps, or noise '
        'levels that lie within its reach'
    )
