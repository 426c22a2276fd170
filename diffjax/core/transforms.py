"""Transforms of an estimate: Denoiser -> Denoiser, by nesting. What needs a second branch stands in guidance.

Thresholds move x0 into a range, and eps along with it, so that x = alpha x0 + sigma eps goes on holding:

    x0' in the range,      eps' = eps + alpha / sigma (x0 - x0')                                               (1)

At alpha = 0 that leaves eps as it was. At sigma = 0 an estimate has no freedom, x0 = x: there x0 is still moved, eps is
left alone, and the identity holds only where x lay in the range.
"""

from typing import NamedTuple

import jax.numpy as jnp

from diffjax.core.parameterizations import Velocity, estimate, expand
from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Denoiser, Estimate


class Transforms(NamedTuple):
    """What `transformed` nests around a denoiser, all arrays: None builds nothing, another value compiles nothing."""

    threshold: Array | float | None = None  # static: the bound on |x0|
    quantile: Array | float | None = None  # dynamic: the fraction of |x0| that stays
    maximum: Array | float | None = None  # of the dynamic bound
    zero_init: Array | int | None = None  # the number of first network calls without a velocity


NO_TRANSFORMS = Transforms()


def transformed(denoiser: Denoiser, schedule: Schedule, transforms: Transforms) -> Denoiser:
    """The denoiser inside the transforms that are set: thresholds first, `zero_init` outermost."""
    if transforms.threshold is not None:
        denoiser = static_threshold(denoiser, schedule, transforms.threshold)
    if transforms.quantile is not None:
        denoiser = dynamic_threshold(denoiser, schedule, transforms.quantile, transforms.maximum)
    if transforms.zero_init is not None:
        denoiser = zero_init(denoiser, schedule, transforms.zero_init)
    return denoiser


def static_threshold(denoiser: Denoiser, schedule: Schedule, limit: Array | float) -> Denoiser:
    """x0 clipped to [-limit, limit] (Ho et al. 2020; called static thresholding by Saharia et al. 2022)."""

    def apply(state, x, t, cond):
        guess, state = denoiser.apply(state, x, t, cond)
        return _moved(guess, jnp.clip(guess.x0, -limit, limit), schedule, t), state

    return denoiser._replace(apply=apply)


def dynamic_threshold(
    denoiser: Denoiser, schedule: Schedule, quantile: Array | float, maximum: Array | float | None = None
) -> Denoiser:
    """x0 clipped to [-s, s] and divided by s: s is the quantile of a sample's |x0|, at least 1 and at most `maximum`.

    For data in [-1, 1] (Saharia et al. 2022, section 2.3). An x0 within [-1, 1] is left as it is.
    """

    def apply(state, x, t, cond):
        guess, state = denoiser.apply(state, x, t, cond)
        size = jnp.quantile(jnp.abs(guess.x0).reshape(x.shape[0], -1), quantile, axis=1)
        size = expand(jnp.clip(size, 1.0, maximum), x).astype(x.dtype)
        return _moved(guess, jnp.clip(guess.x0, -size, size) / size, schedule, t), state

    return denoiser._replace(apply=apply)


def zero_init(denoiser: Denoiser, schedule: Schedule, num_calls: Array | int) -> Denoiser:
    """The velocity alpha' x0 + sigma' eps is zero in the first calls (CFG-Zero*, Fan et al. 2025, section 4.2).

    The state counts calls: a solver that evaluates twice in a step makes two of them.
    """

    def init(x, cond):
        return jnp.int32(0), denoiser.init(x, cond)

    def apply(state, x, t, cond):
        count, inner = state
        guess, inner = denoiser.apply(inner, x, t, cond)
        still = estimate(Velocity(), schedule, x, jnp.asarray(t), jnp.zeros_like(x))
        x0, eps = (jnp.where(count < num_calls, a, b) for a, b in zip(still[:2], guess[:2]))
        return Estimate(x0, eps, guess.variance), (count + 1, inner)

    return Denoiser(init, apply)


def _moved(guess: Estimate, x0: Array, schedule: Schedule, t: Array) -> Estimate:
    """The estimate with another x0 (Eq. 1)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    ratio = jnp.where(sigma > 0, alpha / jnp.where(sigma > 0, sigma, 1), 0)
    return guess._replace(x0=x0, eps=guess.eps + expand(ratio, x0) * (guess.x0 - x0))
