"""The training loss: schedule x parameterization x time distribution x weight.

    L = E_{t, eps} [ w(t) / G(t)  mean_over_dimensions (y - y_hat)^2 ],     w / G = exp(log w - log G)          (1)

where w weighs the eps error (diffjax.core.weights) and G(t) = (y error) / (eps error) = (D / alpha)^2 follows from the
target's row. A network that also learns the variance of the reverse steps adds the variational bound's term at t:

    L_hybrid = L + bound_scale * T * L_t,  the mean's gradient stopped (Nichol & Dhariwal 2021, Eq. 16)         (2)
    L_t = KL(q(x_s | x_t, x0) || p(x_s | x_t)),  or -log p(x0 | x_t) when s = 0,  in bits per dimension        (3)

A network that learns its uncertainty u at each noise level has w balanced by it (Karras et al. 2024, Eq. 21): each
example pays exp(-u(t)) w / G mean (y - y_hat)^2 + u(t) in the place of its part of (1), which is least where
exp(u) = w / G mean (y - y_hat)^2, and every level's gradient then has the same size.                          (4)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffjax.core import chain
from diffjax.core.parameterizations import Parameterization, estimate, expand, target
from diffjax.core.schedules import Schedule, floor_log
from diffjax.core.times import Discrete, Times
from diffjax.core.types import Array, Estimate
from diffjax.core.weights import Level

MAX_LOG_WEIGHT = np.log(1e6)  # a weight beyond this at an end of the time range would drown every other example


def mean_over_dimensions(x: Array) -> Array:
    """[B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).mean(-1)


def split_variance(output: Array) -> tuple[Array, Array]:
    """(y, variance fraction) from an output with twice the channels, the second half in [-1, 1] (IDDPM, Eq. 15)."""
    y, raw = jnp.split(output, 2, axis=-1)
    return y, 0.5 * (raw + 1)


def bound_term(schedule: Schedule, s: Array, t: Array, x0: Array, guess: Estimate, *, half_bin: float) -> Array:
    """L_t of Eq. 3, in bits per dimension: [B].

    With f the learned variance's fraction, r = log(beta / beta~) and equal forms of mean on both sides,
    KL = (f r + exp(-f r) - 1 + (SNR_s - SNR_t) exp(-f r) (x0 - x0_hat)^2) / 2. Where s = 0 the term is the likelihood
    of x0's bin of width `2 half_bin`, the outermost bins open; beta~ of the step above is the lower variance (IDDPM).
    """
    first = s <= 0
    bounded_s = jnp.where(first, t, s)  # at s = 0, where beta~ = 0, its lower bound is that of the step above
    bounded_t = jnp.where(first, 2 * t, t)
    lower = chain.posterior(schedule, bounded_s, bounded_t)[2]
    inner = chain.log_variance_range(schedule, bounded_s, bounded_t)
    span = expand(jnp.where(first, 2 * floor_log(schedule.sigma(t)) - jnp.log(lower), inner), x0)
    fraction = jnp.zeros_like(x0) if guess.variance is None else guess.variance
    snr_gap = jnp.exp(schedule.logsnr(bounded_s)) * chain.gain(schedule, bounded_s, bounded_t)
    error = x0 - guess.x0
    kl = 0.5 * (
        fraction * span + jnp.expm1(-fraction * span) + expand(snr_gap, x0) * jnp.exp(-fraction * span) * error**2
    )
    std = jnp.exp(0.5 * (expand(jnp.log(lower), x0) + fraction * span))
    terms = jnp.where(expand(first, x0), binned_nll(x0, guess.x0, std, half_bin), kl)
    return mean_over_dimensions(terms) / jnp.log(2.0)


def binned_nll(x: Array, mean: Array, std: Array, half_bin: float) -> Array:
    """-log P(x's bin) under N(mean, std^2), in nats: bins of width `2 half_bin`, open beyond -1 and 1."""
    low = jnp.where(x <= -1 + half_bin, -jnp.inf, (x - half_bin - mean) / std)
    high = jnp.where(x >= 1 - half_bin, jnp.inf, (x + half_bin - mean) / std)
    flip = low + high > 0  # the tail in which the difference of two cdfs keeps its digits
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_high = log_ndtr(high)
    return -log_high - jnp.log(jnp.maximum(-jnp.expm1(jnp.minimum(log_ndtr(low) - log_high, 0.0)), 1e-12))


def prior_term(schedule: Schedule, x0: Array) -> Array:
    """KL(q(x_1 | x0) || N(0, sigma(1)^2)) in bits per dimension: [B]. What no network can change."""
    t = jnp.ones(())
    return mean_over_dimensions(0.5 * jnp.exp(schedule.logsnr(t)) * x0**2) / jnp.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Eq. 1, with `bound_scale` set Eq. 2, with a `log_variance` Eq. 4.

    `predict` below is the network with parameters and condition bound: (x [B, ...], t [B]) -> output.
    """

    schedule: Schedule
    parameterization: Parameterization
    times: Times
    weight: Callable[[Level], Array]
    bound_scale: float | None = None  # 0.001 in the paper; None where the network learns no variance
    half_bin: float = 1 / 255  # half the distance of two 8-bit pixel values in [-1, 1]

    def __post_init__(self):
        if self.bound_scale is not None and not isinstance(self.times, Discrete):
            raise ValueError(f'a learned variance needs discrete times, got {type(self.times).__name__}: use discrete')
        ends = self.times.sample(self.schedule, jnp.asarray([0.0, 1 - 2**-24]))
        rows = np.abs(np.asarray(self.parameterization.row(self.schedule, ends)))
        weights = np.asarray(self.log_weight(ends))
        for t, row, log_weight in zip(np.asarray(ends), rows.max(0), weights):
            if not (row < 1e6 and log_weight < MAX_LOG_WEIGHT):
                raise ValueError(
                    f'at t = {t:g} the target {type(self.parameterization).__name__} has size {row:.2g} and its error '
                    f'the weight {np.exp(min(float(log_weight), 700.0)):.2g}: the loss has no finite variance there. '
                    'Choose times that stop short of it (such as uniform:low=1e-3), or another weight or target.'
                )

    def log_weight(self, t: Array) -> Array:
        """log of the weight on the network's own error. t: [B]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        a, b = self.parameterization.row(self.schedule, t)
        log_gain = 2 * (floor_log(jnp.abs(alpha * b - sigma * a)) - floor_log(alpha))
        logsnr = 2 * (floor_log(alpha) - floor_log(sigma))
        level = Level(logsnr, log_gain, self.times.log_density(self.schedule, t))
        return self.weight(level) - log_gain

    def at(
        self, predict: Callable, x0: Array, t: Array, eps: Array, log_variance: Callable = lambda time: None
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of each example at given times and noise: ([B], {'mse': [B], ...}).

        `log_variance` is u of Eq. 4: (t [B] as the network sees it) -> [B], or None where there is none.
        `mse` is the unweighted error of the target, `bound` (with a learned variance) L_t of Eq. 3, `log_variance` u.
        """
        schedule, parameterization = self.schedule, self.parameterization
        x = expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps
        scale = expand(parameterization.input_scale(schedule, t), x0)
        time = parameterization.time_input(schedule, t)
        output = predict(scale * x, time).astype(jnp.float32)
        y = output if self.bound_scale is None else split_variance(output)[0]
        mse = mean_over_dimensions((y - target(parameterization, schedule, x0, eps, t)) ** 2)
        metrics = {'mse': mse}
        if (u := log_variance(time)) is None:
            loss = jnp.exp(self.log_weight(t)) * mse
        else:
            loss, metrics['log_variance'] = jnp.exp(self.log_weight(t) - u) * mse + u, u
        if self.bound_scale is None:
            return loss, metrics
        steps = self.times.num_timesteps
        s = jnp.maximum(jnp.round(t * steps) - 1, 0) / steps
        guess = estimate(parameterization, schedule, x, t, jax.lax.stop_gradient(y))
        guess = guess._replace(variance=split_variance(output)[1])
        bound = bound_term(schedule, s, t, x0, guess, half_bin=self.half_bin)
        return loss + self.bound_scale * steps * bound, {**metrics, 'bound': bound}

    def __call__(
        self, predict: Callable, x0: Array, keys: Array, log_variance: Callable = lambda time: None
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of each example, one key each: x0 [B, ...], keys [B] -> ([B], {name: [B]})."""
        pairs = jax.vmap(jax.random.split)(keys)
        u = jax.vmap(jax.random.uniform)(pairs[:, 0])
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(pairs[:, 1])
        return self.at(predict, x0, self.times.sample(self.schedule, u), eps, log_variance)
