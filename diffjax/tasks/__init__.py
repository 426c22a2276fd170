"""Tasks: what can be learned. Each is a frozen dataclass of pure methods: init, loss, gradients, sample."""

from diffjax.tasks.adversarial import Adversarial
from diffjax.tasks.autoencoding import Autoencoding
from diffjax.tasks.denoising import Denoising
from diffjax.tasks.recognition import Recognition
from diffjax.tasks.task import Task
from diffjax.tasks.variational import Variational

__all__ = ['Adversarial', 'Autoencoding', 'Denoising', 'Recognition', 'Task', 'Variational']
