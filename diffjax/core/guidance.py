"""Guidance: Denoiser -> Denoiser.

An estimate is linear in eps at a fixed x, so one formula serves x0, eps, v, velocity and score alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Denoiser, Estimate, PyTree


class Guidance(NamedTuple):
    """Settings of `classifier_free`, all arrays: changing one does not recompile.

    The scale applies where low <= t <= high and is 1 elsewhere (Kynkaanniemi et al. 2024, section 3).
    """

    scale: Array | float = 1.0
    low: Array | float = 0.0
    high: Array | float = 1.0


def classifier_free(denoiser: Denoiser, guidance: Guidance, baseline: PyTree) -> Denoiser:
    """e = e_baseline + w (e_cond - e_baseline); w = 1 is the conditional model, w = 0 the baseline.

    The baseline is the null condition (Ho & Salimans 2022, Eq. 6, whose w is ours less 1) or a negative one:
    e_prompt + a (e_prompt - e_negative) is w = 1 + a. Both branches run in one call on a batch of 2B.

    Args:
        baseline: a pytree like `cond`, each leaf broadcastable to cond's leaf.
    """

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
        weight = jnp.where((guidance.low <= t) & (t <= guidance.high), guidance.scale, 1.0)
        weight = weight.reshape(weight.shape + (1,) * (x.ndim - 1)) if weight.ndim else weight

        def guide(pair):
            given, base = jnp.split(pair, 2)
            return given + (weight - 1) * (given - base)  # exactly the conditional model at w = 1

        variance = None if both.variance is None else jnp.split(both.variance, 2)[0]
        return Estimate(guide(both.x0), guide(both.eps), variance), state

    return Denoiser(init, apply)
