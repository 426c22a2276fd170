"""Tasks: what can be learned. Each is a frozen dataclass of pure methods: init, loss, gradients, sample."""

from diffjax.tasks.autoencoding import Autoencoding
from diffjax.tasks.denoising import Denoising
from diffjax.tasks.task import Task

__all__ = ['Autoencoding', 'Denoising', 'Task']
