"""What a network's output means: one row for each target.

Every target a network can learn is linear in the data and the noise, and so is what the network sees:

    y = a x0 + b eps,      x = alpha x0 + sigma eps                                                            (1)

so the row (a, b) is the whole definition, and one 2 x 2 solve turns an output into an estimate of both:

    D = alpha b - sigma a,      x0 = (b x - sigma y) / D,      eps = (alpha y - a x) / D                       (2)

The solve is singular where D = 0: an `eps` network says nothing about x0 at alpha = 0, an `x0` network nothing about
eps at sigma = 0. `check_times` refuses such times before anything is compiled.
"""

import abc
from dataclasses import dataclass

import numpy as np

from diffjax.core.schedules import TINY, Schedule, namespace
from diffjax.core.types import Array, Estimate

__all__ = ['EDM', 'Eps', 'Score', 'V', 'Velocity', 'X0']

MAX_AMPLIFICATION = 1e6  # beyond it, float32 rounding of an output moves the estimate by more than a tenth


@dataclass(frozen=True, kw_only=True)
class Parameterization(abc.ABC):
    """A target's row, and what the network is shown: its input's factor and its time."""

    @abc.abstractmethod
    def row(self, schedule: Schedule, t: Array) -> tuple[Array, Array]:
        """(a, b) of Eq. 1, each of t's shape."""

    def input_scale(self, schedule: Schedule, t: Array) -> Array:
        """The factor on x before the network: 1, or what brings a growing sigma back to unit variance."""
        return namespace(t).maximum(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0) ** -0.5

    def time_input(self, schedule: Schedule, t: Array) -> Array:
        """The number that the network embeds as time."""
        return schedule.timestep(t)


@dataclass(frozen=True, kw_only=True)
class Eps(Parameterization):
    """The noise, y = eps (Ho et al. 2020, Eq. 11)."""

    def row(self, schedule, t):
        return namespace(t).zeros_like(t), namespace(t).ones_like(t)


@dataclass(frozen=True, kw_only=True)
class X0(Parameterization):
    """The data, y = x0."""

    def row(self, schedule, t):
        return namespace(t).ones_like(t), namespace(t).zeros_like(t)


@dataclass(frozen=True, kw_only=True)
class V(Parameterization):
    """y = alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""

    def row(self, schedule, t):
        return -schedule.sigma(t), schedule.alpha(t)


@dataclass(frozen=True, kw_only=True)
class Velocity(Parameterization):
    """dx/dt at fixed (x0, eps), y = alpha' x0 + sigma' eps (Lipman et al. 2023, Eq. 14); eps - x0 on `Flow`."""

    def row(self, schedule, t):
        return schedule.alpha_prime(t), schedule.sigma_prime(t)


@dataclass(frozen=True, kw_only=True)
class Score(Parameterization):
    """The score of the noised data, y = -eps / sigma (Song et al. 2021b, Eq. 7)."""

    def row(self, schedule, t):
        return namespace(t).zeros_like(t), -1 / namespace(t).maximum(schedule.sigma(t), TINY)


@dataclass(frozen=True, kw_only=True)
class EDM(Parameterization):
    """The preconditioned F of Karras et al. 2022, Eq. 7 and Table 1, for any alpha.

    With c_skip and c_out inserted at noise level sigma / alpha, F = (x0 - c_skip x / alpha) / c_out becomes

        y = (sigma / sigma_data x0 - alpha sigma_data eps) / d,      d^2 = sigma^2 + alpha^2 sigma_data^2,

    whose determinant -d / sigma_data vanishes nowhere.
    """

    sigma_data: float = 0.5

    def _scale(self, schedule, t):
        return namespace(t).hypot(schedule.sigma(t), self.sigma_data * schedule.alpha(t))

    def row(self, schedule, t):
        d = self._scale(schedule, t)
        return schedule.sigma(t) / (self.sigma_data * d), -self.sigma_data * schedule.alpha(t) / d

    def input_scale(self, schedule, t):
        return 1 / self._scale(schedule, t)

    def time_input(self, schedule, t):
        return -schedule.logsnr(t) / 8  # log(sigma / alpha) / 4, their c_noise


def expand(coefficient: Array, x: Array) -> Array:
    """`coefficient: [] or [B]` with trailing axes of length 1, ready to multiply `x: [B, ...]`."""
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient
    )


def target(parameterization: Parameterization, schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """y of Eq. 1. x0, eps: [B, ...]; t: [B]."""
    a, b = parameterization.row(schedule, t)
    return expand(a, x0) * x0 + expand(b, x0) * eps


def estimate(parameterization: Parameterization, schedule: Schedule, x: Array, t: Array, y: Array) -> Estimate:
    """Both halves of Eq. 2 from a network's output. x, y: [B, ...]; t: [B]."""
    a, b = (expand(c, x) for c in parameterization.row(schedule, t))
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    determinant = alpha * b - sigma * a
    return Estimate(x0=(b * x - sigma * y) / determinant, eps=(alpha * y - a * x) / determinant)


def amplification(parameterization: Parameterization, schedule: Schedule, t: Array) -> Array:
    """The factor by which an output's error reaches the estimate, the larger of x0's and eps'; inf where singular."""
    a, b = parameterization.row(schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    with np.errstate(divide='ignore', invalid='ignore'):
        factor = np.maximum(alpha, sigma) / np.abs(alpha * b - sigma * a)
    # a row that is itself unbounded asks the network for infinite outputs
    return np.where(np.maximum(np.abs(a), np.abs(b)) > MAX_AMPLIFICATION, np.inf, factor)


def check_times(parameterization: Parameterization, schedule: Schedule, t: np.ndarray) -> None:
    """Raises ValueError if the network would be asked at a time where its output says nothing about x0 or eps."""
    t = np.atleast_1d(np.asarray(t, np.float64))
    bad = ~(amplification(parameterization, schedule, t) <= MAX_AMPLIFICATION)
    if not bad.any():
        return
    able = [
        kind.__name__
        for kind in (Eps, X0, V, Velocity, Score, EDM)
        if (amplification(kind(), schedule, t) <= MAX_AMPLIFICATION).all()
    ]
    worst = t[bad][0]
    raise ValueError(
        f'a network with target {type(parameterization).__name__} cannot be used at t = {worst:g}, where '
        f'alpha = {float(schedule.alpha(worst)):.3g} and sigma = {float(schedule.sigma(worst)):.3g} on '
        f'{type(schedule).__name__}: its output does not determine x0 and eps there. '
        f'Targets that can: {", ".join(able) or "none"}; or choose times that stop short of it.'
    )
