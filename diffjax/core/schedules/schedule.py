"""What a schedule is, and the few functions of arrays that all of them are written with."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

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
    """alpha(t) and sigma(t), their derivatives in closed form, and the inverse of logsnr(t).

    A schedule belongs to a family, alpha^p + sigma^p = 1 with p = `power`: 2 where the variance is preserved, 1 on the
    straight line, and 0 stands for alpha = 1.
    """

    power: ClassVar[int] = 2

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

    @property
    def first_time(self) -> float:
        """The lowest time at which networks have been trained: 0, or where a table's first entry stands."""
        return 0.0
