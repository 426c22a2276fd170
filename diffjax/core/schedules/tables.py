"""Schedules of the Markov chain: tables of betas, with log-SNR interpolated between the entries.

abar_i = (1 - beta_0) ... (1 - beta_i) stands at t = (i + 1) / T, i = 0 ... T - 1. At any t the pair (alpha, sigma) is a
direction (u, w) of unit length,

    alpha = u / h,  sigma = w / h,  h^2 = u^2 + w^2,   alpha' = w d / h^3,  sigma' = -u d / h^3,  d = u' w - u w'   (1)

and the direction is finite everywhere: (1, q T t) before the first entry, where sigma / alpha falls linearly from the
entry's q to 0, so that t = 0 is data; (exp(logsnr / 2), 1) between entries; and, in the last cell of a table with zero
terminal SNR, (r T (1 - t), 1), where alpha / sigma falls linearly to 0.
"""

import abc
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffjax.core.schedules.schedule import Schedule, log, namespace, sigmoid


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
        if self.zero_terminal not in (True, False):
            raise ValueError(f'zero_terminal is True or False, got {self.zero_terminal!r}')
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

    def _cell(self, t):
        """(log-SNR at t between the table's entries, its slope in t, before the first entry, after the last).

        The distance to an entry is taken from the nearer end of [0, 1]: T t and T (1 - t) keep their digits there. Both
        are rounded before anything is added: a fused multiply-add in one of two uses would put t into two cells.
        """
        xp = namespace(t)
        total, last = self.num_timesteps, len(self._table) - 1
        table = xp.asarray(self._table, t.dtype)
        rises = xp.asarray(np.diff(self._table, append=self._table[-1]), t.dtype)  # subtracted in float64
        up, down = total * t, total * (1 - t)
        entry = xp.where(t < 0.5, xp.floor(up) - 1, total - 1 - xp.ceil(down))
        entry = xp.clip(entry, 0, max(last - 1, 0)).astype(int)
        way = xp.where(t < 0.5, up - (entry + 1), total - 1 - entry - down)
        return table[entry] + way * rises[entry], total * rises[entry], up < 1, down < total - 1 - last

    def _direction(self, t):
        """u, w and their derivatives (Eq. 1)."""
        xp = namespace(t)
        total, zero, one = self.num_timesteps, xp.zeros_like(t), xp.ones_like(t)
        q, r = float(np.exp(-0.5 * self._table[0])), float(np.exp(0.5 * self._table[-1]))
        logsnr, slope, first, last = self._cell(t)
        u = xp.exp(0.5 * logsnr)
        before = one, q * total * t, zero, q * total * one
        inner = u, one, 0.5 * slope * u, zero
        after = r * total * (1 - t), one, -r * total * one, zero
        return [xp.where(first, b, xp.where(last, a, i)) for b, i, a in zip(before, inner, after)]

    def _unit(self, t):
        """alpha, sigma, and d / h^2 of Eq. 1."""
        t = namespace(t).asarray(t)
        u, w, u_prime, w_prime = self._direction(t)
        h = namespace(t).hypot(u, w)
        return u / h, w / h, (u_prime * w - u * w_prime) / h**2

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
        xp, total = namespace(t), self.num_timesteps
        inner, _, first, last = self._cell(xp.asarray(t))
        before = float(self._table[0]) - 2 * log(total * t)
        after = float(self._table[-1]) + 2 * log(total * (1 - t))
        return xp.where(first, before, xp.where(last, after, inner))

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
