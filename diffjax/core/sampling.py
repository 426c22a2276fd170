"""The one loop that follows a plan.

The denoiser is traced once, whatever the solver. A plan is an argument of the compiled function: with plans padded to
common sizes (`pad`), another solver, grid or number of steps runs the same program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.parameterizations import Parameterization, check_times
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan
from diffjax.core.solvers.plans import pad as pad
from diffjax.core.types import Array, Denoiser, PyTree


def sample_keys(key: Array, num: int, start: int = 0) -> Array:
    """One key for each sample: sample i has the same noise in every batch, on every device count. -> [num] keys."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(num))


def check_plan(plan: Plan, schedule: Schedule, parameterization: Parameterization, *, learned_variance: bool) -> None:
    """Raises ValueError, before anything is compiled, where the network cannot be asked what the plan asks."""
    check_times(parameterization, schedule, plan.t[plan.live])
    if plan.log_variance_range.any() and not learned_variance:
        raise ValueError(
            "the solver wants a learned variance, which this network does not have: use 'small' or 'large'"
        )
    for name, table in zip(plan._fields, plan):
        if not np.isfinite(table).all():
            raise ValueError(f"the plan's {name} is not finite at row {int(np.argwhere(~np.isfinite(table))[0][0])}")


def starting_noise(plan: Plan, keys: Array, shape: tuple[int, ...], x0: Array | None = None) -> Array:
    """The first x: start . (x0, eps), x0 = 0 where none is given. keys: [B], shape: of one sample -> [B, *shape]."""
    eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    return plan.start[1] * eps if x0 is None else plan.start[0] * x0 + plan.start[1] * eps


def sample(
    denoiser: Denoiser,
    plan: Plan,
    x: Array,
    cond: PyTree,
    keys: Array,
    *,
    project: Callable[[Array, Array], Array] | None = None,
    save: Callable[[Array, Array], PyTree] | None = None,
) -> tuple[Array, PyTree]:
    """Follows the plan from x.

    Args:
        x: [B, ...], the state at plan.t[0], as `starting_noise` makes it.
        keys: [B], one key for each sample; row m draws from fold_in(key, m + 1).
        project: (x, row number) -> x after each row (inpainting and the like). Stages of a step are rows too, and a
            solver that sets out from its anchor (correctors, Runge-Kutta) does so unprojected: for one row a step use
            ddpm, ddim, repaint or a multistep solver without corrector.
        save: (x, t) -> a pytree, stacked over rows ([M, ...], zeros at padded rows): what is wanted of the trajectory.

    Returns:
        (x after the last row, what was saved or None).
    """
    rows = {name: column for name, column in plan._asdict().items() if name != 'start'}
    rows = {name: jnp.asarray(c, bool if c.dtype == bool else x.dtype) for name, c in rows.items()}
    rows['number'] = jnp.arange(len(plan.t))
    keep = save or (lambda x, t: ())
    follow = _follower(denoiser, plan.num_remembered, plan.num_noises, cond, keys, project, keep)

    def skip(carry, row):
        shapes = jax.eval_shape(keep, carry[0], row['t'])
        return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry, row):
        return jax.lax.cond(row['live'], follow, skip, carry, row)

    carry = x, x, jnp.zeros((plan.num_remembered, *x.shape), x.dtype), denoiser.init(x, cond)
    (x, *_), saved = jax.lax.scan(body, carry, rows)
    return x, saved if save else None


def _follower(denoiser: Denoiser, num_remembered: int, num_noises: int, cond: PyTree, keys: Array, project, keep):
    """(carry, row of the plan) -> (carry, what is kept of it); carry: x, anchor, history, the denoiser's state."""

    def follow(carry, row):
        x, anchor, memory, state = carry
        guess, state = denoiser.apply(state, x, row['t'], cond)
        new = row['remember'][0] * guess.x0 + row['remember'][1] * guess.eps
        memory = jnp.concatenate([new[None], memory[:-1]])
        noises = [_noise(row, j, keys, x, guess.variance) for j in range(num_noises)]

        def combine(c):
            history = jnp.tensordot(c[2 : 2 + num_remembered], memory, 1, precision='highest')  # not TF32 or bfloat16
            total = c[0] * x + c[1] * anchor + history
            return sum((c[2 + num_remembered + j] * z for j, z in enumerate(noises)), total)

        new_x, anchor = combine(row['to_x']), combine(row['to_anchor'])
        new_x = new_x if project is None else project(new_x, row['number'])
        return (new_x, anchor, memory, state), keep(new_x, row['t'])

    return follow


def _noise(row: dict, j: int, keys: Array, x: Array, variance: Array | None) -> Array:
    """Draw j of a row, widened where a variance was learned; zeros, at no cost, where the row uses none."""
    column = row['to_x'].shape[0] - row['log_variance_range'].shape[0] + j

    def draw(key):
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, row['number'] + 1), j), x.shape[1:], x.dtype
        )

    used = (row['to_x'][column] != 0) | (row['to_anchor'][column] != 0)
    z = jax.lax.cond(used, lambda: jax.vmap(draw)(keys), lambda: jnp.zeros_like(x))
    return z if variance is None else z * jnp.exp(0.5 * variance * row['log_variance_range'][j])
