"""The Markov chain behind a schedule: one-step kernels and their posteriors, for any two times s < t.

With gain = 1 - exp(logsnr_t - logsnr_s), which is 1 - (alpha_t sigma_s / alpha_s sigma_t)^2:

    q(x_t | x_s)      = N(alpha_t / alpha_s x_s,  sigma_t^2 gain)                                              (1)
    q(x_s | x_t, x0)  = N(sigma_s^2 alpha_t / (sigma_t^2 alpha_s) x_t + alpha_s gain x0,  sigma_s^2 gain)      (2)

In DDPM's letters (Ho et al. 2020, Eq. 2, 6 and 7) the variance of (1) is beta_t and that of (2) is beta~_t; the
coefficients are those of the standard form, rearranged so that they stay exact at s = 0 and where alpha_t = 0.
"""

from diffjax.core.schedules import Schedule, log, namespace
from diffjax.core.types import Array


def gain(schedule: Schedule, s: Array, t: Array) -> Array:
    """1 - exp(logsnr_t - logsnr_s), the share of x0 that the step from t to s brings in."""
    difference = schedule.logsnr(t) - schedule.logsnr(s)
    return -namespace(difference).expm1(difference)


def kernel(schedule: Schedule, s: Array, t: Array) -> tuple[Array, Array]:
    """(factor, variance) of q(x_t | x_s), Eq. 1."""
    return schedule.alpha(t) / schedule.alpha(s), schedule.sigma(t) ** 2 * gain(schedule, s, t)


def posterior(schedule: Schedule, s: Array, t: Array) -> tuple[Array, Array, Array]:
    """(factor of x_t, factor of x0, variance) of q(x_s | x_t, x0), Eq. 2."""
    of_x = (schedule.sigma(s) / schedule.sigma(t)) ** 2 * schedule.alpha(t) / schedule.alpha(s)
    share = gain(schedule, s, t)
    return of_x, schedule.alpha(s) * share, schedule.sigma(s) ** 2 * share


def log_variance_range(schedule: Schedule, s: Array, t: Array) -> Array:
    """log(beta_t / beta~_t) = log(sigma_t^2 / sigma_s^2): what a learned variance interpolates; +inf at s = 0."""
    return 2 * (log(schedule.sigma(t)) - log(schedule.sigma(s)))
