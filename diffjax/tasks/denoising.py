"""Learning to denoise: diffusion and flow models, with or without a class condition."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.denoisers import network_denoiser
from diffjax.core.editing import Known, Windows, adds_noise, sample_known, windowed
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.likelihood import Likelihood, Trace, log_likelihood
from diffjax.core.losses import Loss
from diffjax.core.sampling import sample, starting_noise
from diffjax.core.solvers import Plan
from diffjax.core.transforms import NO_TRANSFORMS, Transforms, transformed
from diffjax.core.types import Array, Denoiser, Model, PyTree
from diffjax.tasks.task import Task

FRAME = 0x6672616D  # folded into an example's key to choose its frame; other draws split that key


@dataclass(frozen=True, kw_only=True)
class Denoising(Task):
    """A network trained on a `Loss`.

    A batch holds `x0: [B, ...]` and, with `num_classes`, `label: [B]`. The label `num_classes` is the null condition;
    in training it takes a label's place with probability `label_drop` (Ho & Salimans 2022, Algorithm 1).

    Of clips `[B, T, H, W, C]` a share `image_fraction` of each batch is learned as images, one frame of each, drawn
    anew (joint training, Ho et al. 2022, arXiv:2204.03458, section 3.1). The network is called twice in the one
    program, on `[B - k, T, ...]` and on `[k, 1, ...]`: it sees an image as it will when asked for one, no module over
    time takes part, and a frame costs 1 / T of a clip. (Masking time within clips of full length, as there, would cost
    as much as clips, and would not do for layers that see fewer frames.) Every example counts alike.
    With `knows_frame_rate` a batch has `frame_rate: [B]` too, of which images know nothing.
    """

    model: Model
    objective: Loss
    num_classes: int = 0
    label_drop: float = 0.0
    null_label: bool = True  # whether the network has learned one
    image_fraction: float = 0.0
    knows_frame_rate: bool = False

    def __post_init__(self):
        if not 0 <= self.label_drop < 1:
            raise ValueError(f'label_drop is a probability below 1, got {self.label_drop}')

    def init(self, key, batch):
        first = jax.tree.map(lambda a: a[:1], batch)
        return self.model.init(key, first['x0'], jnp.zeros(1), self._condition(first['label'], first)), ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        losses, extra = self.losses(params, batch, keys)
        return losses.mean(), (task_state, {name: values.mean() for name, values in extra.items()})

    def project(self, params, task_state):
        return self.model.project(params)

    def losses(self, params: PyTree, batch: PyTree, keys: Array) -> tuple[Array, dict[str, Array]]:
        """The training loss of each example: ([B], {name: [B]})."""
        single = spread(len(keys), self.image_fraction)
        if not single.any():
            return self._losses(params, batch, keys)
        places = np.flatnonzero(~single), np.flatnonzero(single)
        clips, images = (jax.tree.map(lambda a: a[place], (batch, keys)) for place in places)  # noqa: B023
        parts = self._losses(params, *clips), self._losses(params, one_frame(*images), images[1])
        order = np.argsort(np.concatenate(places))
        return jax.tree.map(lambda *values: jnp.concatenate(values)[order], *parts)

    def _losses(self, params: PyTree, batch: PyTree, keys: Array) -> tuple[Array, dict[str, Array]]:
        drop, dropout, noise = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        dropped = jax.vmap(jax.random.uniform)(drop) < self.label_drop
        cond = self._condition(jnp.where(dropped, self.num_classes, batch['label']), batch)

        def predict(x, t):
            return self.model.apply(params, x, t, cond, key=dropout[0])

        return self.objective(predict, batch['x0'], noise, lambda t: self.model.log_variance(params, t))

    def losses_at(self, params: PyTree, batch: PyTree, t: Array, keys: Array) -> Array:
        """The target's squared error at one time, nothing dropped: t [] -> [B]."""
        x0 = batch['x0']
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
        cond = self._condition(batch['label'], batch)

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
        frame_rate: Array | None = None,
        known: Known | None = None,
        windows: Windows | None = None,
    ) -> Array:
        """Samples [B, *shape]. cond: labels [B]; keys [B]; baseline: negative labels [B], or the null.

        frame_rate: [] of clips, where the network knows it; known: what they keep; windows: in which longer ones are
        made, below guidance and transforms, so that those see whole clips.
        """
        denoiser, objective = self.denoiser(params), self.objective
        if windows is not None:
            denoiser = windowed(denoiser, windows.size, windows.stride)
        told = {} if frame_rate is None else {'frame_rate': jnp.broadcast_to(frame_rate, keys.shape)}
        negative = jnp.int32(self.num_classes) if baseline is None else baseline
        cond = self._condition(cond, told)
        if guidance is not None and cond is not None:
            denoiser = classifier_free(
                denoiser,
                guidance,
                self._condition(negative, told),
                schedule=objective.schedule,
                parameterization=objective.parameterization,
            )
        denoiser = transformed(denoiser, objective.schedule, transforms)
        if known is not None:
            return sample_known(denoiser, plan, objective.schedule, known, cond, keys, fresh=adds_noise(plan))
        return sample(denoiser, plan, starting_noise(plan, keys, shape), cond, keys)[0]

    def log_likelihood(
        self, params: PyTree, batch: PyTree, keys: Array, *, trace: Trace, t_min: float = 0.0, tolerance: float
    ) -> Likelihood:
        """log p(x0 | label) of each example under the ODE from standard noise, unguided. keys: [B], of the trace."""
        return log_likelihood(
            self.denoiser(params),
            self.objective.schedule,
            batch['x0'],
            self._condition(batch['label'], batch),
            trace=trace,
            keys=keys,
            t_min=t_min,
            tolerance=tolerance,
        )

    def _condition(self, label: Array, batch: PyTree) -> PyTree:
        """What the network is told: a label or nothing, and with the `frame_rate` of the batch a dict of them."""
        if not self.knows_frame_rate or 'frame_rate' not in batch:
            return label if self.num_classes else None
        return {'frame_rate': batch['frame_rate']} | ({'label': label} if self.num_classes else {})


def spread(number: int, fraction: float) -> np.ndarray:
    """Which of `number` examples are images: booleans, as evenly spaced as can be, so that devices have alike many."""
    count = np.floor(np.arange(number + 1) * fraction + 1e-6)
    return np.diff(count) > 0


def one_frame(batch: PyTree, keys: Array) -> PyTree:
    """Clips -> images, each any one frame of its clip: x0 `[B, 1, ...]`."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, FRAME)
    places = jax.vmap(lambda key: jax.random.randint(key, (), 0, batch['x0'].shape[1]))(keys)
    x0 = jax.vmap(lambda clip, place: clip[place][None])(batch['x0'], places)
    return {name: value for name, value in batch.items() if name != 'frame_rate'} | {'x0': x0}
