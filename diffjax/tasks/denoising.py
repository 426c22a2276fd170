"""Learning to denoise: diffusion and flow models, with or without a class condition."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffjax.core.denoisers import network_denoiser
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.likelihood import Likelihood, Trace, log_likelihood
from diffjax.core.losses import Loss
from diffjax.core.sampling import sample, starting_noise
from diffjax.core.solvers import Plan
from diffjax.core.transforms import NO_TRANSFORMS, Transforms, transformed
from diffjax.core.types import Array, Denoiser, Model, PyTree
from diffjax.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Denoising(Task):
    """A network trained on a `Loss`.

    A batch holds `x0: [B, ...]` and, with `num_classes`, `label: [B]`. The label `num_classes` is the null condition;
    in training it takes a label's place with probability `label_drop` (Ho & Salimans 2022, Algorithm 1).
    """

    model: Model
    objective: Loss
    num_classes: int = 0
    label_drop: float = 0.0
    null_label: bool = True  # whether the network has learned one

    def __post_init__(self):
        if not 0 <= self.label_drop < 1:
            raise ValueError(f'label_drop is a probability below 1, got {self.label_drop}')

    def init(self, key, batch):
        x0 = batch['x0'][:1]
        return self.model.init(key, x0, jnp.zeros(1), self._condition(batch['label'][:1])), ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        losses, extra = self.losses(params, batch, keys)
        return losses.mean(), (task_state, {name: values.mean() for name, values in extra.items()})

    def project(self, params, task_state):
        return self.model.project(params)

    def losses(self, params: PyTree, batch: PyTree, keys: Array) -> tuple[Array, dict[str, Array]]:
        """The training loss of each example: ([B], {name: [B]})."""
        drop, dropout, noise = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        dropped = jax.vmap(jax.random.uniform)(drop) < self.label_drop
        cond = self._condition(jnp.where(dropped, self.num_classes, batch['label']))

        def predict(x, t):
            return self.model.apply(params, x, t, cond, key=dropout[0])

        return self.objective(predict, batch['x0'], noise, lambda t: self.model.log_variance(params, t))

    def losses_at(self, params: PyTree, batch: PyTree, t: Array, keys: Array) -> Array:
        """The target's squared error at one time, nothing dropped: t [] -> [B]."""
        x0 = batch['x0']
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
        cond = self._condition(batch['label'])

        def predict(x, t):
            return self.model.apply(params, x, t, cond)

        return self.objective.at(predict, x0, jnp.broadcast_to(t, x0.shape[:1]), eps)[1]['mse']

    def denoiser(self, params: PyTree) -> Denoiser:
        """The denoiser of these parameters; its condition is a label [B] (None without classes)."""
        objective = self.objective
        return network_denoiser(
            lambda x, t, cond: self.model.apply(params, x, t, cond),
            objective.schedule,
            objective.parameterization,
            learned_variance=objective.bound_scale is not None,
        )

    def sample(
        self,
        params: PyTree,
        frozen: PyTree,
        plan: Plan,
        guidance: Guidance | None,
        cond: Array,
        keys: Array,
        shape: tuple[int, ...],
        baseline: Array | None = None,
        transforms: Transforms = NO_TRANSFORMS,
    ) -> Array:
        """Samples [B, *shape]. cond: labels [B]; keys [B]; baseline: a negative condition [B], or the null."""
        denoiser, objective = self.denoiser(params), self.objective
        cond = self._condition(cond)
        if guidance is not None and cond is not None:
            denoiser = classifier_free(
                denoiser,
                guidance,
                jnp.int32(self.num_classes) if baseline is None else baseline,
                schedule=objective.schedule,
                parameterization=objective.parameterization,
            )
        denoiser = transformed(denoiser, objective.schedule, transforms)
        return sample(denoiser, plan, starting_noise(plan, keys, shape), cond, keys)[0]

    def log_likelihood(
        self, params: PyTree, batch: PyTree, keys: Array, *, trace: Trace, t_min: float = 0.0, tolerance: float
    ) -> Likelihood:
        """log p(x0 | label) of each example under the ODE from standard noise, unguided. keys: [B], of the trace."""
        return log_likelihood(
            self.denoiser(params),
            self.objective.schedule,
            batch['x0'],
            self._condition(batch['label']),
            trace=trace,
            keys=keys,
            t_min=t_min,
            tolerance=tolerance,
        )

    def _condition(self, label):
        return label if self.num_classes else None
