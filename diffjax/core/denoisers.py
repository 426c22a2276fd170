"""Denoisers: pairs (init, apply) from a noisy x and a time to an `Estimate` of (x0, eps).

Guidance and the like are functions Denoiser -> Denoiser that compose by nesting.
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffjax.core.losses import split_variance
from diffjax.core.parameterizations import Parameterization, estimate, expand
from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Denoiser, Estimate, PyTree


def stateless(denoise: Callable[[Array, Array, PyTree], Estimate]) -> Denoiser:
    """Lifts `denoise(x, t, cond) -> Estimate`, which remembers nothing."""
    return Denoiser(lambda x, cond: (), lambda state, x, t, cond: (denoise(x, t, cond), state))


def network_denoiser(
    predict: Callable[[Array, Array, PyTree], Array],
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    learned_variance: bool = False,
) -> Denoiser:
    """The denoiser behind a network.

    Args:
        predict: the network with its parameters bound: (x [B, ..., C], t [B], cond) -> [B, ..., C], or 2C channels
            with `learned_variance`. It sees x and t as the parameterization presents them.
    """

    def denoise(x, t, cond):
        t = jnp.broadcast_to(t, x.shape[:1])
        scale = expand(parameterization.input_scale(schedule, t), x)
        output = predict(scale * x, parameterization.time_input(schedule, t), cond).astype(x.dtype)
        if not learned_variance:
            return estimate(parameterization, schedule, x, t, output)
        y, variance = split_variance(output)
        return estimate(parameterization, schedule, x, t, y)._replace(variance=variance)

    return stateless(denoise)
