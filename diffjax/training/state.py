"""The train state: arrays only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.core.types import Array, PyTree
from diffjax.tasks import Task
from diffjax.training.averages import Average, as_average


class TrainState(NamedTuple):
    """Everything that training changes. `key` never changes: step n draws from fold_in(key, n)."""

    step: Array  # [] int32, the number of updates done
    params: PyTree
    task_state: PyTree
    opt_state: PyTree
    ema: dict[str, PyTree]  # one average of params for each profile
    key: Array


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    profiles: dict[str, float | Average],
    batch: PyTree,
    seed: int,
    params: PyTree = None,
) -> TrainState:
    """The state at step 0, for batches like `batch` (as they reach the task). params: given ones; None draws them."""
    key = jax.random.key(seed)
    init_key, train_key = jax.random.split(key)
    drawn, task_state = task.init(init_key, batch)
    params = drawn if params is None else params
    ema = {name: jax.tree.map(jnp.copy, params) for name in profiles}
    return TrainState(jnp.int32(0), params, task_state, optimizer.init(params), ema, train_key)


def update_ema(ema: PyTree, params: PyTree, profile: float | Average, num_updates: Array) -> PyTree:
    """The average after one more update (`training.averages`, Eq. 1); num_updates is n = 1, 2, ..."""
    share = as_average(profile).share(num_updates)
    return jax.tree.map(lambda e, p: e + share * (p - e), ema, params)
