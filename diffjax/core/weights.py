"""Loss weights: functions of the noise level, on the eps error, whatever the network predicts.

A weight is `weight(level, **options) -> log w`; the loss is E_t[w ||eps - eps_hat||^2]. The factor between the eps
error and another target's error follows from the target's row (`level.log_gain`), and the two are added as logarithms
before they meet the error, so that nothing of the kind infinity times zero appears at t = 0 or t = 1.

    ||x0 - x0_hat||^2 = exp(-logsnr) ||eps - eps_hat||^2                                                       (1)

`elbo` and `sigmoid` are weights under the measure d logsnr: they divide by the density with which the time distribution
visits each logsnr, which makes the loss the same for every schedule and time distribution (Kingma & Gao 2023, Eq. 6).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.checks import check_number
from diffjax.core.types import Array

__all__ = ['edm', 'elbo', 'eps', 'min_snr', 'sigmoid', 'target', 'truncated_snr', 'v', 'x0']


class Level(NamedTuple):
    """A noise level, each entry `[B]`."""

    logsnr: Array
    log_gain: Array  # log of (target error / eps error)
    log_density: Array  # log density of logsnr under the time distribution


def eps(level: Level) -> Array:
    """w = 1: "DDPM simple" (Ho et al. 2020, Eq. 14)."""
    return jnp.zeros_like(level.logsnr)


def target(level: Level) -> Array:
    """The plain squared error of what the network predicts; with `Velocity`, flow matching (Lipman 2023, Eq. 9)."""
    return level.log_gain


def x0(level: Level) -> Array:
    """The plain mean squared error of x0 (Eq. 1)."""
    return -level.logsnr


def v(level: Level) -> Array:
    """SNR + 1 on the x0 error (Salimans & Ho 2022, section 4)."""
    return jnp.logaddexp(0.0, -level.logsnr)


def truncated_snr(level: Level) -> Array:
    """max(SNR, 1) on the x0 error (Salimans & Ho 2022, section 4)."""
    return jnp.maximum(0.0, -level.logsnr)


def min_snr(level: Level, *, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023, Eq. 8)."""
    check_number("min_snr's gamma", gamma, inside=True)
    return jnp.minimum(0.0, jnp.log(gamma) - level.logsnr)


def edm(level: Level, *, sigma_data: float = 0.5) -> Array:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the x0 error (Karras et al. 2022, Table 1)."""
    check_number("edm's sigma_data", sigma_data, inside=True)
    return jnp.logaddexp(0.0, -level.logsnr - 2 * jnp.log(sigma_data))


def elbo(level: Level) -> Array:
    """The variational bound in continuous time, 1/2 d logsnr (Kingma et al. 2021, Eq. 17)."""
    return -jnp.log(2.0) - level.log_density


def sigmoid(level: Level, *, bias: float = 0.0) -> Array:
    """1/2 sigmoid(bias - logsnr) d logsnr (Kingma & Gao 2023; SiD2, Hoogeboom et al. 2024, Eq. 8)."""
    return jax.nn.log_sigmoid(bias - level.logsnr) - jnp.log(2.0) - level.log_density
