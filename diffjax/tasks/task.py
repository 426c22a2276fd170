"""What every task offers to the one training loop."""

import abc

import jax

from diffjax.core.types import Array, PyTree


class Task(abc.ABC):
    """A kind of learning. Subclasses are frozen dataclasses; nothing here changes after construction.

    `frozen` holds parameters that are used and never trained, `task_state` what changes without a gradient. `keys` is
    one random key for each example, so that an example's noise depends on neither the batch size nor the devices.
    """

    @abc.abstractmethod
    def init(self, key: Array, batch: PyTree) -> tuple[PyTree, PyTree]:
        """(params, task_state) for batches like this one."""

    @abc.abstractmethod
    def loss(
        self, params: PyTree, task_state: PyTree, frozen: PyTree, batch: PyTree, step: Array, keys: Array
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """(mean loss, (task_state, metrics averaged over the batch))."""

    def gradients(self, params, task_state, frozen, batch, step, keys):
        """(gradients, (task_state, metrics with 'loss')). Overridden where one scalar is not enough."""
        differentiate = jax.value_and_grad(self.loss, has_aux=True)
        (loss, (task_state, metrics)), gradients = differentiate(params, task_state, frozen, batch, step, keys)
        return gradients, (task_state, {'loss': loss, **metrics})

    def project(self, params: PyTree, task_state: PyTree) -> PyTree:
        """What every update is followed by: the nearest parameters that are allowed. Overridden where not all are."""
        return params
