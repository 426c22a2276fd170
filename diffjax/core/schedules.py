"""Noise schedules: two functions of time, alpha(t) and sigma(t).

    x_t = alpha(t) x0 + sigma(t) eps,   t = 0 data, t = 1 noise,   logsnr(t) = log(alpha^2 / sigma^2)           (1)

A schedule is written against the array module of its argument: plans call it with NumPy in float64, training and
sampling with `jax.numpy` in float32. Every function takes and returns arrays of one shape, `t: [...]`.

For variance preserving schedules (alpha^2 + sigma^2 = 1) a derivative of logsnr gives both others:

    alpha' = alpha sigma^2 logsnr' / 2,   sigma' = -sigma alpha^2 logsnr' / 2                                  (2)
"""

import abc
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

__all__ = ['Cosine', 'EDM', 'Flow', 'Linear', 'VE', 'VP']

TINY = 1e-12  # below every sigma and alpha that is used; keeps logarithms and quotients finite in float32


def namespace(t: Array):
    """The module whose functions fit `t`: `jax.numpy` for jax arrays (tracers too), NumPy for everything else."""
    return jnp if isinstance(t, jax.Array) else np


def log(x: Array) -> Array:
    """log(x) with log(0) = -inf and no warning."""
    with np.errstate(divide='ignore'):
        return namespace(x).log(x)


def floor_log(x: Array) -> Array:
    """log(max(x, 1e-12)): finite, so that differences of such logs cancel instead of giving inf - inf."""
    return namespace(x).log(namespace(x).maximum(x, TINY))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), through its logarithm: neither end overflows or loses digits."""
    xp = namespace(x)
    return xp.exp(-xp.logaddexp(0.0, -x))


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """alpha(t) and sigma(t), their derivatives in closed form, and the inverse of logsnr(t)."""

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        """The signal's factor, falling from alpha(0) = 1."""

    @abc.abstractmethod
    def sigma(self, t: Array) -> Array:
        """The noise's factor, rising from sigma(0) = 0."""

    @abc.abstractmethod
    def alpha_prime(self, t: Array) -> Array:
        """d alpha / dt."""

    @abc.abstractmethod
    def sigma_prime(self, t: Array) -> Array:
        """d sigma / dt."""

    @abc.abstractmethod
    def t_of_logsnr(self, logsnr: Array) -> Array:
        """The time at which logsnr(t) = logsnr; values that the schedule does not reach give the nearer end."""

    def logsnr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2): +inf where sigma = 0, -inf where alpha = 0."""
        return 2 * (log(self.alpha(t)) - log(self.sigma(t)))

    def log_speed(self, t: Array) -> Array:
        """log |d logsnr / dt|, finite at both ends."""
        xp = namespace(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        determinant = xp.abs(alpha * self.sigma_prime(t) - sigma * self.alpha_prime(t))
        return np.log(2.0) + floor_log(determinant) - floor_log(alpha) - floor_log(sigma)

    def timestep(self, t: Array) -> Array:
        """What a network is told about time: t on the scale 0 to 1000 on which time embeddings were tuned."""
        return 1000.0 * t


@dataclass(frozen=True, kw_only=True)
class Flow(Schedule):
    """The straight line, alpha = 1 - t and sigma = t: flow matching, rectified flow (Liu et al. 2022, Eq. 1)."""

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
class VP(Schedule):
    """The variance preserving SDE with linear beta(t) = beta_min + t (beta_max - beta_min) (Song et al. 2021, Eq. 32).

    alpha = exp(-B / 2) with B(t) the integral of beta: the continuous limit of DDPM's linear betas.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

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

    This is the exact transition from t = 0 (Song et al. 2021, Eq. 29 and 30), so that sigma(0) = 0.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

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

    sigma_max: float = 80.0

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


@dataclass(frozen=True, kw_only=True)
class Discrete(Schedule):
    """A table of T betas, read at t = (i + 1) / T, i = 0 ... T - 1, and log-SNR interpolated between the entries.

    Before the first entry sigma / alpha falls linearly to 0, so that t = 0 is data. The network is told the integer
    timestep i, as published networks were.
    """

    num_timesteps: int = 1000

    @abc.abstractmethod
    def betas(self) -> np.ndarray:
        """The variances of the one-step kernels, [T]."""

    @cached_property
    def _table(self) -> np.ndarray:
        log_abar = np.cumsum(np.log1p(-self.betas()))
        return log_abar - np.log(-np.expm1(log_abar))

    def _columns(self, like: Array) -> tuple[Array, Array]:
        """The entries' numbers and log-SNRs, [T] each, in the array module and precision of `like`."""
        xp = namespace(like)
        return xp.arange(self.num_timesteps, dtype=like.dtype), xp.asarray(self._table, like.dtype)

    def logsnr(self, t):
        xp = namespace(t)
        index = xp.asarray(self.num_timesteps * t - 1)
        inner = xp.interp(index, *self._columns(index))
        return xp.where(index < 0, self._table[0] - 2 * log(self.num_timesteps * t), inner)

    def _logsnr_prime(self, t):
        xp = namespace(t)
        index = self.num_timesteps * t - 1
        cell = xp.clip(xp.floor(index).astype(int), 0, self.num_timesteps - 2)
        inner = xp.asarray(np.diff(self._table))[cell] * self.num_timesteps
        return xp.where(index < 0, -2 / xp.maximum(t, TINY), inner)

    def alpha(self, t):
        return namespace(t).sqrt(sigmoid(self.logsnr(t)))

    def sigma(self, t):
        return namespace(t).sqrt(sigmoid(-self.logsnr(t)))

    def alpha_prime(self, t):
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self._logsnr_prime(t)

    def sigma_prime(self, t):
        first = self.num_timesteps * np.exp(-0.5 * self._table[0]) * self.alpha(t) ** 3  # not 0 * inf at t = 0
        inner = -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self._logsnr_prime(t)
        return namespace(t).where(self.num_timesteps * t < 1, first, inner)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        numbers, table = self._columns(xp.asarray(logsnr))
        index = xp.interp(-logsnr, -table, numbers)
        first = xp.exp(0.5 * (self._table[0] - xp.maximum(logsnr, self._table[0])))
        return xp.where(logsnr > self._table[0], first, index + 1) / self.num_timesteps

    def timestep(self, t):
        return self.num_timesteps * t - 1


@dataclass(frozen=True, kw_only=True)
class Linear(Discrete):
    """Linear betas, 1e-4 to 0.02 in 1000 steps (Ho et al. 2020, section 4): abar_T = 4e-5, about exp(-10 t^2)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def betas(self):
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps)
