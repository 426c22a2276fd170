"""The probability-flow ODE with controlled error: reference solutions, codes, and exact log-likelihood.

In z = x / h, h = hypot(alpha, sigma), against the angle phi = arctan(sigma / alpha), the flow of estimates (x0, eps) is

    dz / dphi = f = cos(phi) eps - sin(phi) x0,                                                                (1)

the same on every schedule and smooth from sigma = 0 (phi = 0) to alpha = 0 (phi = pi / 2). Along it a log-density falls
at the rate tr(df / dz) (Chen et al. 2018, Eq. 8; Song et al. 2021b, Eq. 39), and between x and z lies the volume h^D:

    log p(x_t) = log p(x_1) + integral of tr(df / dz) over phi + D (log h(1) - log h(t))                       (2)

tr J is the sum of v . J v over the unit vectors v, or its mean over random v with E[v v'] = 1 (Hutchinson's estimate;
Grathwohl et al. 2019, Eq. 7), which are held fixed along a trajectory.

Each sample has its own step sizes, and its result depends on no other's. diffrax integrates, with Dopri8: call these
functions inside `jax.jit`. A denoiser that remembers (zero-init, caching) is no function of (x, t), and is refused.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule, log
from diffjax.core.types import Array, Denoiser, PyTree

__all__ = ['Exact', 'Gaussian', 'Rademacher']

CALLS_PER_STEP = 13  # of Dopri8, whose last stage is the next step's first
FIRST_STEP = 0.01  # of the whole; what follows is the controller's choice
MAX_STEPS = 4096


@dataclass(frozen=True, kw_only=True)
class Trace(abc.ABC):
    """How tr(df / dz) is measured."""

    @abc.abstractmethod
    def num_directions(self, num_dimensions: int) -> int:
        """K: each evaluation of f costs K derivatives along a direction."""

    @abc.abstractmethod
    def directions(self, key: Array | None, shape: tuple[int, ...], dtype) -> Array:
        """v [K, *shape] whose sum of v v' is 1, or is so on average."""


@dataclass(frozen=True, kw_only=True)
class Exact(Trace):
    """The unit vectors."""

    def num_directions(self, num_dimensions):
        return num_dimensions

    def directions(self, key, shape, dtype):
        return jnp.eye(math.prod(shape), dtype=dtype).reshape(-1, *shape)


@dataclass(frozen=True, kw_only=True)
class Rademacher(Trace):
    """Random signs: of all independent entries those with the least variance, none where J is diagonal."""

    num_probes: int = 1

    def __post_init__(self):
        if not self.num_probes >= 1:
            raise ValueError(f'num_probes must be at least 1, got {self.num_probes}')

    def num_directions(self, num_dimensions):
        return self.num_probes

    def directions(self, key, shape, dtype):
        return self._draw(key, (self.num_probes, *shape), dtype) / math.sqrt(self.num_probes)

    def _draw(self, key, shape, dtype):
        return jax.random.rademacher(key, shape, dtype)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Rademacher):
    """Standard normal entries."""

    def _draw(self, key, shape, dtype):
        return jax.random.normal(key, shape, dtype)


class Likelihood(NamedTuple):
    """Of each sample. NaN where the integration ran out of steps."""

    log_density: Array  # [B], in nats
    x1: Array  # [B, ...], the sample's code: where the flow takes it at t = 1
    num_evaluations: Array  # [B], of the denoiser


def integrate(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Array,
    t: float,
    s: float,
    cond: PyTree = None,
    *,
    tolerance: float | None = None,
) -> tuple[Array, Array]:
    """(x_s [B, ...], denoiser evaluations [B]): x at time t, followed along Eq. 1 to time s.

    From t = 0 to s = 1 it encodes data, from 1 to 0 it decodes: the reference for every sampler of the ODE.

    Args:
        tolerance: relative and absolute, of the local error of z in root mean square. By default 1e-5 in float32 and
            1e-8 in float64; the error of the whole is some times larger.
    """
    _check_stateless(denoiser, x, cond)
    (phi, h), (phi_s, h_s) = _polar(schedule, t), _polar(schedule, s)

    def solve(x, cond):
        f = _flow(denoiser, schedule, (t, s), cond)
        z, count = _solve(f, (phi, phi_s), x / h, _root_mean_square, tolerance)
        return h_s * z, count

    return jax.vmap(solve)(x, cond)


def log_likelihood(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Array,
    cond: PyTree = None,
    *,
    trace: Trace = Exact(),
    keys: Array | None = None,
    prior: Callable[[Array], Array] | None = None,
    t_min: float = 0.0,
    tolerance: float | None = None,
) -> Likelihood:
    """log p(x | cond) of data x [B, ...] under the flow of a denoiser (Eq. 2).

    This is the density of what the ODE makes of draws from the prior at t = 1. With t_min > 0, for networks that cannot
    be asked at t = 0, it is the density of x_t / alpha at t_min: the data's, blurred by sigma / alpha there.

    Args:
        keys: [B], one for each sample, for a random trace.
        prior: x_1 [B, ...] -> its log-density [B]; `normal_prior(schedule)` by default.
        tolerance: as in `integrate`, with the log-density in nats beside z and not averaged with it.
    """
    _check_stateless(denoiser, x, cond)
    if keys is None and not isinstance(trace, Exact):
        raise ValueError(f'{type(trace).__name__} probes are random: give keys, one for each sample')
    (phi, _), (phi_1, h_1) = _polar(schedule, t_min), _polar(schedule, 1.0)
    volume = math.prod(x.shape[1:]) * (math.log(h_1) + math.log(math.cos(phi)))

    def solve(x, cond, key):
        f, v = _flow(denoiser, schedule, (t_min, 1.0), cond), trace.directions(key, x.shape, x.dtype)

        def slope(angle, state):
            value, along = jax.linearize(lambda z: f(angle, z), state[0])
            return value, jnp.vdot(v, jax.vmap(along)(v))

        def size(state):
            return jnp.maximum(_root_mean_square(state[0]), jnp.abs(state[1]))

        start = math.cos(phi) * x, jnp.zeros((), x.dtype)
        (z, gain), count = _solve(slope, (phi, phi_1), start, size, tolerance)
        return h_1 * z, gain, count

    x1, gain, count = jax.vmap(solve)(x, cond, keys)
    log_prior = (prior or normal_prior(schedule))(x1)
    return Likelihood(log_prior + gain + volume, x1, count)


def normal_prior(
    schedule: Schedule, mean: Array | float = 0.0, variance: Array | float = 0.0
) -> Callable[[Array], Array]:
    """log N(alpha mean, alpha^2 variance + sigma^2) at t = 1: x_1 [B, ...] -> [B].

    By default N(0, sigma^2), from which samplers start. Where alpha(1) = 0 that is what the noised data are at t = 1.
    Elsewhere it is still what the model begins with, but not quite the noised data: log p is off by about alpha / sigma
    times their mean and (alpha / sigma)^2 times their variance, in units of x0. Mean and variance given, there remain
    the covariances between dimensions, times (alpha / sigma)^2, and the skewness, times its cube.
    """
    alpha, sigma = (float(f(np.float64(1))) for f in (schedule.alpha, schedule.sigma))

    def log_density(x1):
        spread = alpha**2 * jnp.asarray(variance, x1.dtype) + sigma**2
        terms = (x1 - alpha * jnp.asarray(mean, x1.dtype)) ** 2 / spread + jnp.log(2 * np.pi * spread)
        return -0.5 * jnp.broadcast_to(terms, x1.shape).reshape(x1.shape[0], -1).sum(-1)

    return log_density


def bits_per_dimension(log_density: Array, num_dimensions: int, bin_width: float) -> Array:
    """-log2 of the mass of a bin of this width in every dimension, for each dimension, from a density in nats.

    For x drawn uniformly from a bin its mean bounds the bin's own bits from above (Theis et al. 2016, section 3.1).
    """
    return -(log_density / num_dimensions + math.log(bin_width)) / math.log(2)


def _check_stateless(denoiser: Denoiser, x: Array, cond: PyTree) -> None:
    if jax.tree.leaves(jax.eval_shape(denoiser.init, x, cond)):
        raise ValueError('this denoiser remembers its calls, so its flow is no ODE: leave zero-init and caching out')


def _polar(schedule: Schedule, t: float) -> tuple[float, float]:
    """(phi, h) at time t, in float64."""
    alpha, sigma = (float(f(np.float64(t))) for f in (schedule.alpha, schedule.sigma))
    return math.atan2(sigma, alpha), math.hypot(alpha, sigma)


def _flow(
    denoiser: Denoiser, schedule: Schedule, times: tuple[float, float], cond: PyTree
) -> Callable[[Array, Array], Array]:
    """(phi [], z of one sample) -> dz / dphi, for phi between two times."""
    cond = jax.tree.map(lambda leaf: leaf[None], cond)

    def f(angle, z):
        # rounding may carry the angle, and the time that belongs to it, past an end
        cos, sin = jnp.maximum(jnp.cos(angle), 0), jnp.maximum(jnp.sin(angle), 0)
        t = jnp.clip(schedule.t_of_logsnr(2 * (log(cos) - log(sin))), min(times), max(times))
        x = (jnp.hypot(schedule.alpha(t), schedule.sigma(t)).astype(z.dtype) * z)[None]
        guess, _ = denoiser.apply(denoiser.init(x, cond), x, t, cond)
        return cos * guess.eps[0] - sin * guess.x0[0]

    return f


def _solve(slope: Callable, ends: tuple[float, float], start: PyTree, size: Callable, tolerance: float | None):
    """(state at ends[1], number of evaluations) of one sample's ODE; NaN where MAX_STEPS did not suffice."""
    import diffrax

    dtype = jax.tree.leaves(start)[0].dtype
    tolerance = tolerance or (1e-8 if dtype == np.float64 else 1e-5)
    begin, end = (np.asarray(angle, dtype) for angle in ends)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda angle, state, _: slope(angle, state)),
        diffrax.Dopri8(),
        begin,
        end,
        FIRST_STEP * (end - begin),
        start,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=size),
        max_steps=MAX_STEPS,
        throw=False,  # under vmap and on accelerators an error cannot be raised from within
    )
    arrived = solution.result == diffrax.RESULTS.successful
    state = jax.tree.map(lambda leaf: jnp.where(arrived, leaf[-1], jnp.nan), solution.ys)
    return state, CALLS_PER_STEP * solution.stats['num_steps'] + 1


def _root_mean_square(z: Array) -> Array:
    return jnp.sqrt(jnp.mean(z**2))
