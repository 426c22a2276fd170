"""A schedule with its whole log-SNR curve moved up or down.

Where (alpha, sigma) of the base has the ratio exp(logsnr / 2), the shifted pair has k = exp(shift / 2) times that ratio
and stays in the base's family, alpha^p + sigma^p = 1 (p = 0: alpha = 1):

    alpha_k = k alpha / N,   sigma_k = sigma / N,   N^p = (k alpha)^p + sigma^p   (p = 0: N = k)               (1)
    alpha_k' = k alpha' / N^(p + 1),   sigma_k' = k^p sigma' / N^(p + 1)                                       (2)

Eq. 2 follows from alpha^(p-1) alpha' = -sigma^(p-1) sigma'. Nothing in it is singular at either end.
"""

import math
from dataclasses import dataclass

from diffjax.core.schedules.schedule import Schedule, namespace


@dataclass(frozen=True, kw_only=True)
class Shifted(Schedule):
    """`base` with its log-SNR moved: by `logsnr_shift`, or for a `resolution`, or by a flow model's `shift`.

    One of three, which are three names for one number added to logsnr(t):

        logsnr_shift                            as it stands
        2 log(base_resolution / resolution)     a base tuned at one resolution, used at another (Hoogeboom et al. 2023)
        -2 log(shift)                           on `Flow` t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024, Eq. 23)

    The network is told the base's time: a table's integer timestep stays what it was, with more or less noise there.
    """

    base: Schedule
    logsnr_shift: float | None = None
    resolution: int | None = None
    base_resolution: int = 64
    shift: float | None = None

    def __post_init__(self):
        if not isinstance(self.base, Schedule):
            raise ValueError(f'base is a schedule, got {self.base!r}')
        given = {name: getattr(self, name) for name in ('logsnr_shift', 'resolution', 'shift')}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            listed = ', '.join(f'{name} = {value}' for name, value in chosen.items()) or 'none'
            raise ValueError(f'give one of logsnr_shift, resolution (with base_resolution) and shift; got {listed}')
        for name, value in {**chosen, 'base_resolution': self.base_resolution}.items():
            if not math.isfinite(value) or (name != 'logsnr_shift' and value <= 0):
                raise ValueError(f'{name} must be a finite number, above 0 unless it is a log-SNR; got {value}')

    @property
    def power(self):
        return self.base.power

    @property
    def _shift(self) -> float:
        """What is added to the base's log-SNR."""
        if self.logsnr_shift is not None:
            return self.logsnr_shift
        return 2 * math.log(self.base_resolution / self.resolution if self.resolution else 1 / self.shift)

    @property
    def _factor(self) -> float:
        """k of Eq. 1."""
        return math.exp(0.5 * self._shift)

    def _parts(self, t):
        """k alpha, sigma and N of Eq. 1."""
        signal, noise = self._factor * self.base.alpha(t), self.base.sigma(t)
        if self.power == 0:
            return signal, noise, signal
        return signal, noise, signal + noise if self.power == 1 else namespace(t).hypot(signal, noise)

    def alpha(self, t):
        signal, _, norm = self._parts(t)
        return signal / norm

    def sigma(self, t):
        _, noise, norm = self._parts(t)
        return noise / norm

    def alpha_prime(self, t):
        return self._factor * self.base.alpha_prime(t) / self._parts(t)[2] ** (self.power + 1)

    def sigma_prime(self, t):
        return self._factor**self.power * self.base.sigma_prime(t) / self._parts(t)[2] ** (self.power + 1)

    def logsnr(self, t):
        return self.base.logsnr(t) + self._shift

    def log_speed(self, t):
        return self.base.log_speed(t)

    def t_of_logsnr(self, logsnr):
        return self.base.t_of_logsnr(logsnr - self._shift)

    def timestep(self, t):
        return self.base.timestep(t)

    @property
    def first_time(self):
        return self.base.first_time
