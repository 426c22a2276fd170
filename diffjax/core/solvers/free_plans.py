"""Free plans: every deterministic sampling plan written one way, in numbers that may all be learned.

A plan calls the denoiser M times, the first time on the noise x_0. Whatever the solver, x_m is a sum of x_0 and of the
estimates x0_0 ... x0_{m-1} that the calls gave: eps = (x - alpha x0) / sigma adds nothing new. Written as

    x_m = (sigma_m / sigma_0 + c_m n_m) x_0 + (alpha_m - sigma_m alpha_0 / sigma_0) sum_{j < m} w_mj x0_j         (1)

with alpha_m, sigma_m at time t_m, t_M = 0, and a scale c_m = hypot(alpha_m, sigma_m) / hypot(alpha_0, sigma_0), the
whole class is the times t_1 ... t_{M-1}, the weights w and the extra noise n. A solver that is exact where the denoiser
is constant has sum_j w_mj = 1 and n = 0. As Eq. 1 follows the times, they can be moved alone.

Times are t_0 times sums of a softmax: whatever numbers stand in `log_steps`, they fall from t_0 to 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan
from diffjax.core.types import Array

NUDGE = 0.01  # of the way to its next time: where a solver asks twice at one time, the second question comes later


class FreePlan(NamedTuple):
    """What Eq. 1 leaves free. Row m - 1 holds what belongs to x_m."""

    log_steps: Array  # [M]; t_m = t_0 sum_{i >= m} softmax(log_steps)_i
    extra_noise: Array  # [M]; n
    weights: Array  # [M, M]; w, of which the part above the diagonal is not looked at


def free(schedule: Schedule, plan: Plan) -> FreePlan:
    """A plan in the form of Eq. 1, float64. Raises ValueError where it has none: see the message."""
    t = np.asarray(plan.t, np.float64)[plan.live]
    steps = -np.diff(np.append(t, 0.0))
    if max(np.abs(table[:, 2 + plan.num_remembered :]).max(initial=0.0) for table in (plan.to_x, plan.to_anchor)):
        raise ValueError('a free plan is deterministic, and this plan draws noise')
    if (steps < 0).any() or steps[0] == 0 or not (schedule.sigma(t) > 0).all():
        raise ValueError(
            f'a free plan asks at times that fall from the first and stay above sigma = 0; this one at {t.tolist()}'
        )
    states = unrolled(schedule, plan)
    noise, signal, scale = _coefficients(schedule, t)
    return FreePlan(np.log(_apart(steps)), (states[:, 0] - noise) / scale, states[:, 1:] / signal[:, None])


def unrolled(schedule: Schedule, plan: Plan) -> np.ndarray:
    """What a plan makes of (x_0, x0_0 ... x0_{M-1}), noise that it draws left out: x_1 ... x_M as sums, [M, 1 + M].

    sigma must be above 0 where the denoiser is called.
    """
    rows = np.flatnonzero(plan.live)
    t = np.asarray(plan.t, np.float64)[rows]
    basis = np.eye(1 + len(t))
    x = anchor = basis[0]
    memory, states = np.zeros((plan.num_remembered, 1 + len(t))), []
    for m, row in enumerate(rows):
        estimate = basis[1 + m]
        eps = (x - schedule.alpha(t[m]) * estimate) / schedule.sigma(t[m])
        p, q = plan.remember[row]
        memory = np.concatenate([(p * estimate + q * eps)[None], memory[:-1]])
        parts = np.stack([x, anchor, *memory])
        x, anchor = plan.to_x[row][: len(parts)] @ parts, plan.to_anchor[row][: len(parts)] @ parts
        states.append(x)
    return np.stack(states)


def times(plan: FreePlan, start: float) -> Array:
    """t_0 = start, ..., t_{M-1}. [M]."""
    shares = jax.nn.softmax(plan.log_steps)
    later = jnp.cumsum(shares[::-1])[::-1][1:]  # summed from t = 0 on: small times keep their digits
    return jnp.concatenate([jnp.full((1,), start, shares.dtype), start * later])


def follow(schedule: Schedule, plan: FreePlan, start: float) -> Plan:
    """Eq. 1 as a plan that begins at time `start`, of jax arrays and differentiable.

    It keeps x_0 as the anchor and remembers all estimates.
    """
    t = times(plan, start)
    noise, signal, scale = _coefficients(schedule, t)
    num = len(t)
    newest_first = jnp.arange(num)[:, None] - jnp.arange(num)  # [m - 1, i]: h[i] is estimate m - 1 - i
    weights = jnp.take_along_axis(plan.weights, jnp.maximum(newest_first, 0), 1) * (newest_first >= 0)
    to_x = jnp.concatenate(
        [
            jnp.zeros((num, 1), t.dtype),
            (noise + scale * plan.extra_noise)[:, None],
            signal[:, None] * weights,
        ],
        1,
    )
    return Plan(
        t=t,
        remember=jnp.tile(jnp.asarray([1.0, 0.0], t.dtype), (num, 1)),
        to_x=to_x,
        to_anchor=jnp.tile(jnp.eye(2 + num, dtype=t.dtype)[1], (num, 1)),
        log_variance_range=jnp.zeros((num, 0), t.dtype),
        live=jnp.ones(num, bool),
        start=jnp.stack([schedule.alpha(t[0]), schedule.sigma(t[0])]),
    )


def _coefficients(schedule: Schedule, t: Array) -> tuple[Array, Array, Array]:
    """sigma_m / sigma_0, alpha_m - sigma_m alpha_0 / sigma_0 and c_m of Eq. 1 for m = 1 ... M. t: [M], without t_M."""
    xp = jnp if isinstance(t, jax.Array) else np
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    ends = np.array([0.0])  # alone: the slope of sigma at 0 may be infinite, and must not meet the other times'
    later_alpha = xp.concatenate([alpha[1:], schedule.alpha(ends)])
    later_sigma = xp.concatenate([sigma[1:], schedule.sigma(ends)])
    scale = xp.hypot(later_alpha, later_sigma) / xp.hypot(alpha[0], sigma[0])
    return later_sigma / sigma[0], later_alpha - later_sigma * alpha[0] / sigma[0], scale


def _apart(steps: np.ndarray) -> np.ndarray:
    """The steps as shares of their sum, those of no length having taken a little of the next one with some."""
    steps = steps / steps.sum()
    for m in range(len(steps) - 2, -1, -1):  # the last step, to t = 0, has a length
        if steps[m] == 0:
            steps[m] = NUDGE * steps[m + 1]
            steps[m + 1] -= steps[m]
    return steps
