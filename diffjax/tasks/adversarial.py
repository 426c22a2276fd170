"""Learning to draw by deceiving a critic: generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661).

With pictures x of classes c, y = G(z, c) for z ~ N(0, I), and f(t) = log(1 + exp t), critic D and generator G minimise

    non_saturating   f(-D(x)) + f(D(y))                          f(-D(y))                                           (1)
    hinge            relu(1 - D(x)) + relu(1 + D(y))             -D(y)                                              (2)
    relativistic     f(D(y) - D(x))                              f(D(x) - D(y))                                     (3)

(1): Goodfellow et al., section 3, its generator's loss in the form that does not saturate. (2): Lim & Ye 2017,
arXiv:1705.02894. (3): Jolicoeur-Martineau 2019, arXiv:1807.00734, each real picture paired with a generated one, here
of its own class. The critic is also charged for its slopes,

    r1_weight / 2 E|grad_x D(x)|^2 + r2_weight / 2 E|grad_y D(y)|^2                                                 (4)

(R1: Mescheder et al. 2018, arXiv:1801.04406; both with (3): R3GAN, Huang et al. 2024, arXiv:2501.05441). Each side is a
constant to the other, so that one gradient of the sum trains both. Pictures are drawn from the generator's average.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import relu, softplus

from diffjax.core.types import Array, PyTree
from diffjax.nets.generative import PictureEncoder, PictureGenerator
from diffjax.tasks.task import Task

__all__ = ['Adversarial']

# (real scores, scores of what is generated) -> each picture's loss, of the critic and of the generator
GAMES = {
    'non_saturating': (lambda real, fake: softplus(-real) + softplus(fake), lambda real, fake: softplus(-fake)),
    'hinge': (lambda real, fake: relu(1 - real) + relu(1 + fake), lambda real, fake: -fake),
    'relativistic': (lambda real, fake: softplus(fake - real), lambda real, fake: softplus(real - fake)),
}


@dataclass(frozen=True, kw_only=True)
class Adversarial(Task):
    """A generator against a critic. A batch holds `x0: [B, H, W, C]` in [-1, 1] and `label: [B]`."""

    generator: PictureGenerator
    discriminator: PictureEncoder
    num_classes: int = 0
    game: str = 'relativistic'
    r1_weight: float = 1.0
    r2_weight: float = 1.0

    null_label: ClassVar[bool] = False

    def __post_init__(self):
        if self.game not in GAMES:
            raise ValueError(f'game is one of {", ".join(map(repr, GAMES))}; got {self.game!r}')
        for name in ('r1_weight', 'r2_weight'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must be at least 0, got {getattr(self, name)}')
        if self.discriminator.out_features != 1:
            raise ValueError(f'a discriminator gives one score, got {self.discriminator.out_features}')

    def init(self, key, batch):
        first, second = jax.random.split(key)
        x, label = batch['x0'][:1], self._condition(batch['label'][:1])
        z = jnp.zeros((1, self.generator.latent_size))
        params = {
            'generator': self.generator.init(first, z, label, x.shape[1:])['params'],
            'discriminator': self.discriminator.init(second, x, label)['params'],
        }
        return params, ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        x, label = batch['x0'], self._condition(batch['label'])
        critic_loss, generator_loss = GAMES[self.game]
        y = self._generate(params, label, keys, x.shape[1:])
        real, real_slope = self.scores(params['discriminator'], x, label)
        fake, fake_slope = self.scores(params['discriminator'], stop_gradient(y), label)
        judged, _ = self.scores(stop_gradient(params['discriminator']), y, label)
        critic, generator = critic_loss(real, fake).mean(), generator_loss(stop_gradient(real), judged).mean()
        r1, r2 = (jnp.square(slope).sum(range(1, x.ndim)).mean() for slope in (real_slope, fake_slope))
        penalty = 0.5 * (self.r1_weight * r1 + self.r2_weight * r2)
        metrics = {'discriminator': critic, 'generator': generator, 'r1': r1, 'r2': r2}
        metrics |= {'real_score': real.mean(), 'fake_score': fake.mean()}
        return critic + generator + penalty, (task_state, metrics)

    def scores(self, weights: PyTree, x: Array, label: Array | None) -> tuple[Array, Array]:
        """D(x) and its gradient in x: [B], [B, H, W, C]."""

        def judge(x):
            return self.discriminator.apply({'params': weights}, x, label)[:, 0]

        values, pull = jax.vjp(judge, x)  # a picture's score depends on that picture alone
        return values, pull(jnp.ones_like(values))[0]

    def sample(self, params: PyTree, frozen: PyTree, labels: Array, keys: Array, shape: tuple[int, ...]) -> jax.Array:
        """Pictures [B, *shape] in [-1, 1], one for each label and key, both [B]."""
        return jnp.clip(self._generate(params, self._condition(labels), keys, shape), -1, 1)

    def _generate(self, params: PyTree, label: Array | None, keys: Array, shape: tuple[int, ...]) -> jax.Array:
        z = jax.vmap(lambda key: jax.random.normal(key, (self.generator.latent_size,)))(keys)
        return self.generator.apply({'params': params['generator']}, z, label, shape)

    def _condition(self, label):
        return label if self.num_classes else None
