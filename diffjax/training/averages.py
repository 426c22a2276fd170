"""Averages of the parameters over the history of a run: the profiles of `training.ema`.

After n updates an average is sum_i w_i params_i, i = 1 ... n, with weights that sum to 1 from the first update on:
neither the initial parameters nor zero stays in it. As a recursion, the newest parameters get the share w_n:

    ema_n = ema_{n-1} + share(n) (params_n - ema_{n-1})                                                             (1)

`Exponential`: w_i ~ decay^(n - i), which is the correction of Adam (Kingma & Ba 2015, section 3).

`Power` (Karras et al. 2024, section 3.1): w_i = (i^(g+1) - (i-1)^(g+1)) / n^(g+1), the integral of (g+1) t^g / n^(g+1)
over the i-th of n unit intervals. It looks back over a fixed part of the run, however long that becomes; its width is
the standard deviation of that density, as a part of n (equations 5 to 7, and algorithm 2 for the inverse):

    share(n) = 1 - (1 - 1/n)^(g+1),      sigma_rel = (g+1)^(1/2) (g+2)^(-1) (g+3)^(-1/2)                            (2)
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

__all__ = ['Exponential', 'Power']

WIDEST = 12**-0.5  # sigma_rel at exponent 0, where all parameters count alike


def relative_width(exponent: float) -> float:
    """sigma_rel of equation (2)."""
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def exponent_of(sigma_rel: float) -> float:
    """The exponent g >= 0 of a relative width: the root of (g+2)^2 (g+3) - (g+1) / sigma_rel^2.

    Raises ValueError for a width that no such exponent has.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f'sigma_rel lies in (0, {WIDEST:.4f}], the widest being the plain mean; got {sigma_rel}')
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(float(np.max(roots[np.abs(roots.imag) < 1e-6].real)), 0.0)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """The memory of one update fades by the factor `decay` with every later one."""

    decay: float

    def __post_init__(self):
        if not 0 < self.decay < 1:
            raise ValueError(f'a decay lies between 0 and 1, got {self.decay}')

    def share(self, num_updates: Array) -> Array:
        """(1 - d) / (1 - d^n); num_updates is n = 1, 2, ..."""
        log_decay = jnp.float32(math.log(self.decay))  # in float64: a float32 decay knows 1 - d only to 6e-8
        return jnp.expm1(log_decay) / jnp.expm1(num_updates * log_decay)


@dataclass(frozen=True, kw_only=True)
class Power:
    """Equation (2). The paper tracks 0.05 and 0.10, from which any other width follows: `training.posthoc_ema`."""

    sigma_rel: float

    def __post_init__(self):
        exponent_of(self.sigma_rel)

    @property
    def exponent(self) -> float:
        return exponent_of(self.sigma_rel)

    def share(self, num_updates: Array) -> Array:
        """1 - (1 - 1/n)^(g+1); num_updates is n = 1, 2, ..."""
        return -jnp.expm1(jnp.float32(self.exponent + 1) * jnp.log1p(-1 / jnp.asarray(num_updates, jnp.float32)))


Average = Exponential | Power


def as_average(profile: float | Average) -> Average:
    """A number is the decay of an exponential average."""
    return profile if isinstance(profile, Exponential | Power) else Exponential(decay=profile)
