"""Tasks: what can be learned. Each is a frozen dataclass of pure methods: init, loss, gradients, sample."""

from diffjax.tasks.denoising import Denoising
from diffjax.tasks.task import Task

__all__ = ['Denoising', 'Task']
