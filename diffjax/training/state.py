"""The train state: arrays only."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.core.types import Array, PyTree
from diffjax.tasks import Task


class TrainState(NamedTuple):
    """Everything that training changes. `key` never changes: step n draws from fold_in(key, n)."""

    step: Array  # [] int32, the number of updates done
    params: PyTree
    task_state: PyTree
    opt_state: PyTree
    ema: dict[str, PyTree]  # one average of params for each profile
    key: Array


def init_state(
    task: Task, optimizer: optax.GradientTransformation, ema_decays: dict[str, float], batch: PyTree, seed: int
) -> TrainState:
    """The state at step 0, for batches like `batch` (as they reach the task)."""
    key = jax.random.key(seed)
    init_key, train_key = jax.random.split(key)
    params, task_state = task.init(init_key, batch)
    ema = {name: jax.tree.map(jnp.copy, params) for name in ema_decays}
    return TrainState(jnp.int32(0), params, task_state, optimizer.init(params), ema, train_key)


def update_ema(ema: PyTree, params: PyTree, decay: float, num_updates: Array) -> PyTree:
    """The exponential average of all params so far, its weights summing to 1 from the first update on.

    ema_n = sum_i decay^(n - i) params_i / sum_i decay^(n - i), as a recursion; num_updates is n = 1, 2, ... Neither the
    initial parameters nor zero stays in it, which is the correction of Adam (Kingma & Ba 2015, section 3).
    """
    log_decay = jnp.float32(math.log(decay))  # the logarithm in float64: a float32 decay knows 1 - d only to 6e-8
    share = jnp.expm1(log_decay) / jnp.expm1(num_updates * log_decay)  # (1 - d) / (1 - d^n)
    return jax.tree.map(lambda e, p: e + share * (p - e), ema, params)
