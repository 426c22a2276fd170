"""Distributions of the training time.

Each is given by its quantile function, `sample(schedule, u) -> t` with u uniform in [0, 1), and by the log density of
the log-SNR it induces, `log_density(schedule, t) = log p(t) - log |d logsnr / dt|`: the two facts that a loss needs.
Shapes: `u: [...]`, `t: [...]`.
"""

import abc
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit, ndtri
from jax.scipy.stats import norm

from diffjax.core.checks import check_number, check_whole
from diffjax.core.schedules import Schedule
from diffjax.core.types import Array

__all__ = ['Discrete', 'LogNormalSigma', 'LogitNormal', 'Uniform', 'UniformLogSNR']

EDGE = 1e-6  # quantiles of unbounded distributions are cut here, five standard deviations out


@dataclass(frozen=True, kw_only=True)
class Times(abc.ABC):
    """A distribution of t in [0, 1]."""

    @abc.abstractmethod
    def sample(self, schedule: Schedule, u: Array) -> Array:
        """The quantile function."""

    @abc.abstractmethod
    def log_density(self, schedule: Schedule, t: Array) -> Array:
        """log density of logsnr(t)."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Times):
    """t uniform in [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f'times need 0 <= low < high <= 1, got low = {self.low}, high = {self.high}')

    def sample(self, schedule, u):
        return self.low + (self.high - self.low) * u

    def log_density(self, schedule, t):
        return -np.log(self.high - self.low) - schedule.log_speed(t)


@dataclass(frozen=True, kw_only=True)
class Discrete(Times):
    """t uniform on (i + 1) / T, i = 0 ... T - 1 (Ho et al. 2020, Algorithm 1)."""

    num_timesteps: int = 1000

    def __post_init__(self):
        check_whole("discrete times' num_timesteps", self.num_timesteps)

    def sample(self, schedule, u):
        return (jnp.minimum(jnp.floor(u * self.num_timesteps), self.num_timesteps - 1) + 1) / self.num_timesteps

    def log_density(self, schedule, t):
        return -schedule.log_speed(t)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Times):
    """logit(t) ~ N(mean, std^2): more weight in the middle (Esser et al. 2024, Eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        check_number("logit-normal times' std", self.std, inside=True)

    def sample(self, schedule, u):
        z = self.mean + self.std * ndtri(jnp.clip(u, EDGE, 1 - EDGE))
        return 1 / (1 + jnp.exp(-z))

    def log_density(self, schedule, t):
        log_p = norm.logpdf(logit(t), self.mean, self.std) - jnp.log(t) - jnp.log1p(-t)
        return log_p - schedule.log_speed(t)


@dataclass(frozen=True, kw_only=True)
class LogNormalSigma(Times):
    """log(sigma / alpha) ~ N(mean, std^2) (Karras et al. 2022, Table 1, "noise distribution")."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        check_number("log-normal times' std", self.std, inside=True)

    def sample(self, schedule, u):
        return schedule.t_of_logsnr(-2 * (self.mean + self.std * ndtri(jnp.clip(u, EDGE, 1 - EDGE))))

    def log_density(self, schedule, t):
        return norm.logpdf(schedule.logsnr(t), -2 * self.mean, 2 * self.std)


@dataclass(frozen=True, kw_only=True)
class UniformLogSNR(Times):
    """logsnr uniform in [low, high] (Kingma & Gao 2023, section 2), or from the lowest that the schedule reaches."""

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f'log-SNRs need low < high, got low = {self.low}, high = {self.high}')

    def _width(self, schedule):
        return self.high - max(self.low, float(schedule.logsnr(np.float64(1.0))))

    def sample(self, schedule, u):
        return schedule.t_of_logsnr(self.high - self._width(schedule) * u)

    def log_density(self, schedule, t):
        return jnp.full_like(t, -np.log(self._width(schedule)))
