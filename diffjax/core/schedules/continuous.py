"""Schedules in continuous time, in closed form."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffjax.core.checks import check_number
from diffjax.core.schedules.schedule import TINY, Schedule, namespace, sigmoid
from diffjax.core.types import Array


@dataclass(frozen=True, kw_only=True)
class Flow(Schedule):
    """The straight line, alpha = 1 - t and sigma = t: flow matching, rectified flow (Liu et al. 2022, Eq. 1)."""

    power: ClassVar[int] = 1

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1.0 * t

    def alpha_prime(self, t):
        return -namespace(t).ones_like(t)

    def sigma_prime(self, t):
        return namespace(t).ones_like(t)

    def t_of_logsnr(self, logsnr):
        return sigmoid(-0.5 * logsnr)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2) and sigma = sin(pi t / 2): the continuous cosine (Salimans & Ho 2022, section 2).

    The discrete schedule of Nichol & Dhariwal 2021 (offset 0.008, clipped betas) is another one.
    """

    def alpha(self, t):
        return namespace(t).sin(0.5 * np.pi * (1 - t))  # as a sine it is exactly 0 at t = 1

    def sigma(self, t):
        return namespace(t).sin(0.5 * np.pi * t)

    def alpha_prime(self, t):
        return -0.5 * np.pi * self.sigma(t)

    def sigma_prime(self, t):
        return 0.5 * np.pi * self.alpha(t)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        return 2 / np.pi * xp.arctan(xp.exp(-0.5 * logsnr))


@dataclass(frozen=True, kw_only=True)
class Shared(Schedule):
    """Variance preserving schedules given by the noise's share of the variance, sigma^2 = 1 - abar.

    With r = d sigma^2 / dt: alpha' = -r / (2 alpha), sigma' = r / (2 sigma). Where alpha or sigma leaves 0 like a root
    its slope is infinite, and stands as a very large number.
    """

    @abc.abstractmethod
    def _shares(self, t: Array) -> tuple[Array, Array]:
        """alpha^2 and sigma^2, each with its digits where it is small."""

    @abc.abstractmethod
    def _rate(self, t: Array) -> Array:
        """d sigma^2 / dt = -d alpha^2 / dt."""

    def alpha(self, t):
        return namespace(t).sqrt(self._shares(t)[0])

    def sigma(self, t):
        return namespace(t).sqrt(self._shares(t)[1])

    def alpha_prime(self, t):
        return -0.5 * self._rate(t) / namespace(t).maximum(self.alpha(t), TINY)

    def sigma_prime(self, t):
        return 0.5 * self._rate(t) / namespace(t).maximum(self.sigma(t), TINY)


@dataclass(frozen=True, kw_only=True)
class LinearAbar(Shared):
    """abar = 1 - t: what tutorials call the linear schedule. DDPM's linear betas are `Linear`, another one."""

    def _shares(self, t):
        return 1 - t, 1.0 * t

    def _rate(self, t):
        return namespace(t).ones_like(t)

    def t_of_logsnr(self, logsnr):
        return sigmoid(-logsnr)


@dataclass(frozen=True, kw_only=True)
class InverseCosine(Shared):
    """abar = arccos(2t - 1) / pi: most time at middle noise levels (SODA, Hudson et al. 2023)."""

    def _shares(self, t):
        xp = namespace(t)
        signal, noise = xp.sqrt(1 - t), xp.sqrt(t)
        return 2 / np.pi * xp.arctan2(signal, noise), 2 / np.pi * xp.arctan2(noise, signal)

    def _rate(self, t):
        xp = namespace(t)
        return 1 / (np.pi * xp.maximum(xp.sqrt(t * (1 - t)), TINY))

    def t_of_logsnr(self, logsnr):
        return namespace(logsnr).sin(0.5 * np.pi * sigmoid(-logsnr)) ** 2


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Shared):
    """abar = (S(end) - S(z)) / (S(end) - S(start)), z = start + t (end - start), S(z) = 1 / (1 + exp(-z / tau)).

    Jabri et al. 2022 (RIN) and Chen 2023, Algorithm 1. With L = (end - start) / tau the SNR is

        sinh(L (1 - t) / 2) cosh(start / 2 tau) / (sinh(L t / 2) cosh(end / 2 tau)),

    exact at both ends. The table of betas along a sigmoid is `SigmoidBetas`.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self):
        if not (self.start < self.end and self.tau > 0):
            given = f'start = {self.start}, end = {self.end}, tau = {self.tau}'
            raise ValueError(f'a sigmoid needs start < end and tau > 0, got {given}')

    @property
    def _length(self):
        return (self.end - self.start) / self.tau

    @property
    def _skew(self):
        return float(np.cosh(0.5 * self.end / self.tau) / np.cosh(0.5 * self.start / self.tau))

    def _parts(self, t):
        xp = namespace(t)
        return xp.sinh(0.5 * self._length * (1 - t)), self._skew * xp.sinh(0.5 * self._length * t)

    def _shares(self, t):
        signal, noise = self._parts(t)
        return signal / (signal + noise), noise / (signal + noise)

    def _rate(self, t):
        signal, noise = self._parts(t)
        scale = 0.5 * self._length * self._skew * float(np.sinh(0.5 * self._length))
        return scale / (signal + noise) ** 2

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        ratio = self._skew * xp.exp(xp.minimum(logsnr, 80.0))  # sinh(L (1 - t) / 2) / sinh(L t / 2)
        half = 0.5 * self._length
        return xp.log1p(2 * float(np.sinh(half)) / (ratio + float(np.exp(-half)))) / self._length


@dataclass(frozen=True, kw_only=True)
class VP(Schedule):
    """The variance preserving SDE with linear beta(t) = beta_min + t (beta_max - beta_min) (Song et al. 2021b, Eq. 32).

    alpha = exp(-B / 2) with B(t) the integral of beta: the continuous limit of DDPM's linear betas.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        check_number('beta_min', self.beta_min)
        check_number('beta_max', self.beta_max, self.beta_min)

    def _beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t):
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t):
        return namespace(t).exp(-0.5 * self._integral(t))

    def sigma(self, t):
        xp = namespace(t)
        return xp.sqrt(-xp.expm1(-self._integral(t)))

    def alpha_prime(self, t):
        return -0.5 * self._beta(t) * self.alpha(t)

    def sigma_prime(self, t):
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / namespace(t).maximum(self.sigma(t), TINY)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        integral = xp.logaddexp(0.0, -logsnr)  # B = log(1 + 1/SNR)
        slope = self.beta_max - self.beta_min
        root = xp.sqrt(self.beta_min**2 + 2 * slope * xp.minimum(integral, 1e30))
        return xp.clip(2 * xp.minimum(integral, 1e30) / (self.beta_min + root), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class VE(Schedule):
    """The variance exploding SDE: alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1).

    This is the exact transition from t = 0 (Song et al. 2021b, Eq. 29 and 30), so that sigma(0) = 0.
    """

    power: ClassVar[int] = 0
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        check_number('sigma_min', self.sigma_min, inside=True)
        check_number('sigma_max', self.sigma_max, self.sigma_min, inside=True)

    @property
    def _rate(self):
        return 2 * np.log(self.sigma_max / self.sigma_min)

    def alpha(self, t):
        return namespace(t).ones_like(t)

    def sigma(self, t):
        xp = namespace(t)
        return self.sigma_min * xp.sqrt(xp.expm1(self._rate * t))

    def alpha_prime(self, t):
        return namespace(t).zeros_like(t)

    def sigma_prime(self, t):
        xp = namespace(t)
        growth = 0.5 * self._rate * self.sigma_min**2 * xp.exp(self._rate * t)
        return growth / xp.maximum(self.sigma(t), TINY)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        log_ratio = -logsnr - 2 * np.log(self.sigma_min)
        return xp.clip(xp.logaddexp(0.0, log_ratio) / self._rate, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class EDM(Schedule):
    """alpha = 1 and sigma = sigma_max t (Karras et al. 2022, Table 1, last column, with time scaled to [0, 1])."""

    power: ClassVar[int] = 0
    sigma_max: float = 80.0

    def __post_init__(self):
        check_number('sigma_max', self.sigma_max, inside=True)

    def alpha(self, t):
        return namespace(t).ones_like(t)

    def sigma(self, t):
        return self.sigma_max * t

    def alpha_prime(self, t):
        return namespace(t).zeros_like(t)

    def sigma_prime(self, t):
        return self.sigma_max * namespace(t).ones_like(t)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        return xp.clip(xp.exp(-0.5 * logsnr) / self.sigma_max, 0.0, 1.0)
