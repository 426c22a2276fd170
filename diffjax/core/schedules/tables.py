"""Schedules of the Markov chain: tables of betas, with log-SNR interpolated between the entries.

abar_i = (1 - beta_0) ... (1 - beta_i) stands at t = (i + 1) / T, i = 0 ... T - 1. At any t

    alpha / sigma = (b / a) exp(l / 2)                                                                          (1)

with l the table's log-SNR, linear between two entries; a = T t before the first entry and 1 after it, so that sigma /
alpha falls linearly to 0 and t = 0 is data; b = T (1 - t) in the last cell of a table with zero terminal SNR and 1
before it, so that alpha / sigma falls linearly to 0. With u = b exp(l / 2) and h^2 = u^2 + a^2 everything is finite:

    alpha = u / h,  sigma = a / h,   alpha' = a d / h^3,  sigma' = -u d / h^3,  d = u' a - u a'                  (2)
"""

import abc
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffjax.core.schedules.schedule import Schedule, log, namespace, sigmoid

MOST_TIMESTEPS = 10**6  # of a table


@dataclass(frozen=True, kw_only=True)
class Discrete(Schedule):
    """A table of T betas. The network is told the integer timestep i, as published networks were.

    With `zero_terminal` the table is rescaled so that its last entry has alpha = 0 and its first stays as it is (Lin et
    al. 2023, Algorithm 1): sqrt(abar) is shifted by its last value and stretched back to its first.
    """

    num_timesteps: int = 1000
    zero_terminal: bool = False

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f'num_timesteps is at least 2, got {self.num_timesteps}')
        if self.num_timesteps > MOST_TIMESTEPS:
            raise ValueError(f'num_timesteps is at most {MOST_TIMESTEPS}, got {self.num_timesteps}')
        if self.zero_terminal not in (True, False):
            raise ValueError(f'zero_terminal is True or False, got {self.zero_terminal!r}')
        with np.errstate(all='ignore'):  # what comes of it is looked at
            betas = self.betas()
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f'betas lie between 0 and 1, got {betas.min():g} to {betas.max():g}')

    @abc.abstractmethod
    def betas(self) -> np.ndarray:
        """The variances of the one-step kernels before any rescaling, [T]."""

    @cached_property
    def _table(self) -> np.ndarray:
        """The log-SNRs of the entries, [T]; without the last one, which is -inf, where the terminal SNR is zero."""
        log_abar = np.cumsum(np.log1p(-self.betas()))
        if not self.zero_terminal:
            return log_abar - np.log(-np.expm1(log_abar))
        root = np.exp(0.5 * log_abar)
        abar = ((root[:-1] - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return np.log(abar) - np.log1p(-abar)

    @cached_property
    def _rises(self) -> np.ndarray:
        """From each entry to the next, subtracted in float64; 0 after the last."""
        return np.diff(self._table, append=self._table[-1])

    def _parts(self, t):
        """l, a and b of Eq. 1 and their slopes.

        The distance to an entry is taken from the nearer end of [0, 1]: T t and T (1 - t) keep their digits there. Both
        are rounded before anything is added: a fused multiply-add in one of two uses would put t into two cells.
        """
        xp, total, last = namespace(t), self.num_timesteps, len(self._table) - 1
        up, down, one = total * t, total * (1 - t), xp.ones_like(t)
        entry = xp.clip(xp.floor(up) - 1, 0, max(last - 1, 0)).astype(int)
        way = xp.where(t < 0.5, up - (entry + 1), total - 1 - entry - down)
        rise = xp.asarray(self._rises, t.dtype)[entry]
        before, after = up < 1, down < total - 1 - last
        rise = xp.where(before | after, 0 * one, rise)
        table = xp.asarray(self._table, t.dtype)[xp.where(after, last, entry)]
        a, b = xp.where(before, up, one), xp.where(after, down, one)
        slopes = total * rise, xp.where(before, total * one, 0 * one), xp.where(after, -total * one, 0 * one)
        return (table + way * rise, a, b), slopes

    def _unit(self, t):
        """alpha, sigma, and d / h^2 of Eq. 2."""
        t = namespace(t).asarray(t)
        (level, a, b), (level_prime, a_prime, b_prime) = self._parts(t)
        root = namespace(t).exp(0.5 * level)
        u, u_prime = b * root, (b_prime + 0.5 * b * level_prime) * root
        h = namespace(t).hypot(u, a)
        return u / h, a / h, (u_prime * a - u * a_prime) / h**2

    def alpha(self, t):
        return self._unit(t)[0]

    def sigma(self, t):
        return self._unit(t)[1]

    def alpha_prime(self, t):
        _, sigma, turn = self._unit(t)
        return sigma * turn

    def sigma_prime(self, t):
        alpha, _, turn = self._unit(t)
        return -alpha * turn

    def logsnr(self, t):
        (level, a, b), _ = self._parts(namespace(t).asarray(t))
        return level - 2 * log(a) + 2 * log(b)

    def t_of_logsnr(self, logsnr):
        xp = namespace(logsnr)
        logsnr = xp.asarray(logsnr)
        table = xp.asarray(self._table, logsnr.dtype)
        entry = xp.interp(-logsnr, -table, xp.arange(len(table), dtype=logsnr.dtype))
        inner = (entry + 1) / self.num_timesteps
        before = xp.exp(0.5 * (table[0] - xp.maximum(logsnr, table[0]))) / self.num_timesteps
        after = 1 - xp.exp(0.5 * (xp.minimum(logsnr, table[-1]) - table[-1])) / self.num_timesteps
        reached = xp.where(logsnr < table[-1], after, inner) if self.zero_terminal else inner
        return xp.where(logsnr > table[0], before, reached)

    def timestep(self, t):
        return self.num_timesteps * t - 1

    @property
    def first_time(self):
        return 1 / self.num_timesteps


@dataclass(frozen=True, kw_only=True)
class Linear(Discrete):
    """Linear betas, 1e-4 to 0.02 in 1000 steps (Ho et al. 2020, section 4): abar_T = 4e-5, about exp(-10 t^2)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def betas(self):
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps)


@dataclass(frozen=True, kw_only=True)
class ScaledLinear(Discrete):
    """Betas whose square roots are linear, 0.00085 to 0.012: latent and Stable Diffusion (Rombach et al. 2022).

    sigma / alpha runs from 0.0292 to 14.61: at t = 1 some signal is left (abar_T = 0.0047).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def betas(self):
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2


@dataclass(frozen=True, kw_only=True)
class SquaredCos(Discrete):
    """abar = f(t) / f(0), f = cos^2((t + s) / (1 + s) pi / 2), betas clipped (Nichol & Dhariwal 2021, Eq. 17).

    The continuous `Cosine` has neither the offset nor the clipping.
    """

    offset: float = 0.008
    max_beta: float = 0.999

    def betas(self):
        t = np.arange(self.num_timesteps + 1) / self.num_timesteps
        f = np.cos((t + self.offset) / (1 + self.offset) * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], self.max_beta)


@dataclass(frozen=True, kw_only=True)
class SigmoidBetas(Discrete):
    """Betas along a sigmoid over [-6, 6], 1e-4 to 0.02 (GeoDiff, Xu et al. 2022; `sigmoid` in diffusers).

    The sigmoid schedule of abar (Jabri et al. 2022) is `Sigmoid`.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def betas(self):
        rise = sigmoid(np.linspace(-6.0, 6.0, self.num_timesteps))
        return self.beta_start + (self.beta_end - self.beta_start) * rise
