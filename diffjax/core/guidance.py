"""Guidance: Denoiser -> Denoiser.

An estimate is linear in eps at a fixed x, so one formula serves x0, eps, v, velocity and score alike. Two refinements
are not of that kind: they measure an output y = a x0 + b eps, and which one matters. With D = alpha b - sigma a, what
changes y by dy changes the estimate at the same x by

    dx0 = -sigma dy / D,      deps = alpha dy / D                                                              (1)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.parameterizations import Parameterization, Velocity, expand, target
from diffjax.core.schedules import TINY, Schedule
from diffjax.core.types import Array, Denoiser, Estimate, PyTree


class Guidance(NamedTuple):
    """Settings of `classifier_free`, all arrays: changing one does not recompile, None builds nothing.

    The scale applies where low <= t <= high and is 1 elsewhere (Kynkaanniemi et al. 2024, section 3).
    """

    scale: Array | float = 1.0
    low: Array | float = 0.0
    high: Array | float = 1.0
    rescale: Array | float | None = None  # phi of Lin et al. 2024, from 0 (none) to 1
    optimal_scale: Array | bool | None = None  # CFG-Zero*'s scale of the baseline


def classifier_free(
    denoiser: Denoiser,
    guidance: Guidance,
    baseline: PyTree,
    *,
    schedule: Schedule | None = None,
    parameterization: Parameterization | None = None,
) -> Denoiser:
    """e = e_baseline + w (e_cond - e_baseline); w = 1 is the conditional model, w = 0 the baseline.

    The baseline is the null condition (Ho & Salimans 2022, Eq. 6, whose w is ours less 1) or a negative one:
    e_prompt + a (e_prompt - e_negative) is w = 1 + a. Both branches run in one call on a batch of 2B.

    Args:
        baseline: a pytree like `cond`, each leaf broadcastable to cond's leaf.
        schedule: needed by `rescale` and `optimal_scale`.
        parameterization: what the network's output is; `rescale` needs it.
    """
    if guidance.optimal_scale is not None and schedule is None:
        raise ValueError('guidance with an optimal scale is about velocities: give the schedule')
    if guidance.rescale is not None and (schedule is None or parameterization is None):
        raise ValueError("rescaled guidance is about the network's output: give the schedule and the parameterization")

    def doubled(x, cond):
        both = jax.tree.map(
            lambda c, b: jnp.concatenate([c, jnp.broadcast_to(b, c.shape).astype(c.dtype)]), cond, baseline
        )
        return jnp.concatenate([x, x]), both

    def init(x, cond):
        return denoiser.init(*doubled(x, cond))

    def apply(state, x, t, cond):
        x2, cond2 = doubled(x, cond)
        both, state = denoiser.apply(state, x2, jnp.concatenate([t, t]) if jnp.ndim(t) else t, cond2)
        t = jnp.asarray(t)
        weight = expand(jnp.where((guidance.low <= t) & (t <= guidance.high), guidance.scale, 1.0), x)
        variance = None if both.variance is None else jnp.split(both.variance, 2)[0]
        given, base = (Estimate(*pair, variance) for pair in zip(jnp.split(both.x0, 2), jnp.split(both.eps, 2)))
        guess = jax.tree.map(lambda g, b: g + (weight - 1) * (g - b), given, base)  # at w = 1 exactly the given
        if guidance.optimal_scale is not None:
            guess = _optimised(guess, given, base, weight, guidance.optimal_scale, schedule, t)
        if guidance.rescale is not None:
            guess = _rescaled(guess, given, guidance.rescale, parameterization, schedule, t)
        return guess, state

    return Denoiser(init, apply)


def _optimised(
    guess: Estimate, given: Estimate, base: Estimate, weight: Array, switch: Array, schedule: Schedule, t: Array
) -> Estimate:
    """s* v_base + w (v_cond - s* v_base), s* = <v_cond, v_base> / |v_base|^2 for each sample.

    CFG-Zero* (Fan et al. 2025, section 4). v is the velocity alpha' x0 + sigma' eps of the schedule, which on `Flow` is
    eps - x0; its scale cancels.
    """
    v, v_base = (target(Velocity(), schedule, e.x0, e.eps, t) for e in (given, base))
    largest = jnp.maximum(_over_dimensions(jnp.max, jnp.abs(v_base)), TINY)
    unit = v_base / largest  # so that squares stay in range where the schedule's derivative is unbounded
    scale = _over_dimensions(jnp.sum, v / largest * unit) / jnp.maximum(_over_dimensions(jnp.sum, unit**2), TINY)
    change = jnp.where(switch, (weight - 1) * (1 - scale), 0.0) * v_base
    return _changed(guess, change, Velocity(), schedule, t)


def _rescaled(
    guess: Estimate, given: Estimate, phi: Array, parameterization: Parameterization, schedule: Schedule, t: Array
) -> Estimate:
    """y (phi std(y_cond) / std(y) + 1 - phi), std over a sample's dimensions (Lin et al. 2024, Eq. 15 and 16).

    y is what the network puts out, as in the paper.
    """
    y, y_given = (target(parameterization, schedule, e.x0, e.eps, t) for e in (guess, given))
    ratio = _over_dimensions(jnp.std, y_given) / jnp.maximum(_over_dimensions(jnp.std, y), TINY)
    return _changed(guess, phi * (ratio - 1) * y, parameterization, schedule, t)


def _changed(
    guess: Estimate, change: Array, parameterization: Parameterization, schedule: Schedule, t: Array
) -> Estimate:
    """The estimate whose output is larger by `change` (Eq. 1)."""
    a, b = parameterization.row(schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    step = change / expand(alpha * b - sigma * a, change)
    return guess._replace(x0=guess.x0 - expand(sigma, step) * step, eps=guess.eps + expand(alpha, step) * step)


def _over_dimensions(reduce, x: Array) -> Array:
    """[B, ...] -> [B, 1, ...]."""
    return reduce(x, axis=tuple(range(1, x.ndim)), keepdims=True)
