"""One training step, for every task."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from diffjax.core.types import Array, PyTree
from diffjax.tasks import Task
from diffjax.training.averages import Average
from diffjax.training.state import TrainState, update_ema


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    prepare: Callable[[PyTree, Array], PyTree],
    profiles: dict[str, float | Average],
    num_microbatches: int = 1,
    encode: Callable[[PyTree, PyTree, Array], PyTree] | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]:
    """step(state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
        prepare: (raw batch, key) -> what the task learns from; runs on the device.
        num_microbatches: gradients are averaged over this many parts of the batch, one after the other; the result is
            that of the whole batch, because every example has its own key (dropout alone draws by parts).
        encode: (frozen, batch, key) -> what frozen networks make of the whole batch, which then takes its place.
    """

    def train_step(state, frozen, batch):
        prepare_key, task_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = prepare(batch, prepare_key)
        if encode is not None:
            batch = encode(frozen, batch, jax.random.fold_in(prepare_key, 1))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(task_key, jnp.arange(len(jax.tree.leaves(batch)[0])))

        gradients, task_state, metrics = accumulate(task, num_microbatches, state, frozen, batch, keys)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = task.project(optax.apply_updates(state.params, updates), task_state)
        ema = {name: update_ema(state.ema[name], params, profile, state.step + 1) for name, profile in profiles.items()}

        metrics = {**metrics, 'grad_norm': optax.global_norm(gradients), 'param_norm': optax.global_norm(params)}
        return TrainState(state.step + 1, params, task_state, opt_state, ema, state.key), metrics

    return train_step


def skipping(step: Callable) -> Callable:
    """A step that leaves the state as it was where one of its metrics is not finite, and counts that as `skipped`.

    Parameters, averages, optimiser and task state of that step are the old ones, the counts inside the optimiser too;
    the number of the step alone goes on, so that the next one draws anew. On a mesh all devices choose the same,
    because the metrics are those of the whole batch.
    """

    def guarded(state, frozen, batch):
        new, metrics = step(state, frozen, batch)
        finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]))
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return kept._replace(step=new.step), {**metrics, 'skipped': 1 - finite.astype(jnp.int32)}

    return guarded


def accumulate(task: Task, num_microbatches: int, state: TrainState, frozen: PyTree, batch: PyTree, keys: Array):
    """(gradients, task_state, metrics) of the batch, averaged over microbatches that run one after the other."""
    if num_microbatches == 1:
        gradients, (task_state, metrics) = task.gradients(
            state.params, state.task_state, frozen, batch, state.step, keys
        )
        return gradients, task_state, metrics

    def split(a):  # every n-th example, so that a batch sharded over devices is split within each device
        return jnp.moveaxis(a.reshape(-1, num_microbatches, *a.shape[1:]), 1, 0)

    def body(carry, part):
        task_state, total = carry
        gradients, (task_state, metrics) = task.gradients(
            state.params, task_state, frozen, *part[:1], state.step, part[1]
        )
        return (task_state, jax.tree.map(jnp.add, total, (gradients, metrics))), None

    parts = jax.tree.map(split, (batch, keys))
    first = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(task.gradients, state.params, state.task_state, frozen, first[0], state.step, first[1])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][1]))
    (task_state, total), _ = jax.lax.scan(body, (state.task_state, zeros), parts)
    gradients, metrics = jax.tree.map(lambda a: a / num_microbatches, total)
    return gradients, task_state, metrics
