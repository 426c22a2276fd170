"""Learning to draw by a latent variable: the variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114).

A picture comes of z ~ N(0, I) through p(x | z, c). An encoder q(z | x, c) = N(mean, std^2) bounds its log-likelihood:

    log p(x | c) >= E_q log p(x | z, c) - beta KL(q || N(0, I))          at beta = 1, with equality at the posterior (1)
    KL = sum over the latents of (mean^2 + std^2 - 1 - log std^2) / 2                                               (2)

with one draw z = mean + std eps for each picture. beta is that of Higgins et al. 2017. The likelihood is one of

    gaussian     N(y, s^2) for each value; s is given, or learned with the rest                                     (3)
    bernoulli    of the values taken from [-1, 1] to [0, 1], with logits y: v log p + (1 - v) log(1 - p)            (4)

where y is what the generator makes of z. A learned s is one number, whose optimum is the root mean square error
(Rybkin et al. 2021, arXiv:2006.13202).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, PyTree
from diffjax.nets.generative import PictureEncoder, PictureGenerator
from diffjax.tasks.task import Task

__all__ = ['Variational']

LIKELIHOODS = ('gaussian', 'bernoulli')
SAMPLES = ('mean', 'draw')
FIRST_STD = 0.3  # where a learned one starts


@dataclass(frozen=True, kw_only=True)
class Variational(Task):
    """A generator and an encoder trained on (1). A batch holds `x0: [B, H, W, C]` in [-1, 1] and `label: [B]`.

    std: s of (3); 0 learns it.
    samples: 'mean', the mean of p(x | z), as is the custom; 'draw', a draw from a Gaussian one, noise and all.
    """

    generator: PictureGenerator
    encoder: PictureEncoder
    num_classes: int = 0
    likelihood: str = 'gaussian'
    std: float = 0.0
    beta: float = 1.0
    samples: str = 'mean'

    null_label: ClassVar[bool] = False

    def __post_init__(self):
        for name, valid in (('likelihood', LIKELIHOODS), ('samples', SAMPLES)):
            if getattr(self, name) not in valid:
                raise ValueError(f'{name} is one of {", ".join(map(repr, valid))}; got {getattr(self, name)!r}')
        if not (self.std >= 0 and self.beta >= 0):
            raise ValueError(f'std and beta must be at least 0, got {self.std} and {self.beta}')
        if self.likelihood == 'bernoulli' and (self.std or self.samples == 'draw'):
            raise ValueError("std and samples='draw' are for likelihood='gaussian'; a Bernoulli one has neither")
        if self.encoder.out_features != 2 * self.generator.latent_size:
            raise ValueError(
                f'the encoder gives a mean and a log variance of each of {self.generator.latent_size} latents: '
                f'{2 * self.generator.latent_size} features, got {self.encoder.out_features}'
            )

    def init(self, key, batch):
        first, second = jax.random.split(key)
        x, label = batch['x0'][:1], self._condition(batch['label'][:1])
        z = jnp.zeros((1, self.generator.latent_size))
        params = {
            'generator': self.generator.init(first, z, label, x.shape[1:])['params'],
            'encoder': self.encoder.init(second, x, label)['params'],
        }
        if self.likelihood == 'gaussian' and not self.std:
            params['log_std'] = jnp.float32(np.log(FIRST_STD))
        return params, ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        bound, parts = self.bound(params, batch, keys)
        metrics = {name: values.mean() for name, values in parts.items()}
        if self.likelihood == 'gaussian':
            metrics['std'] = jnp.exp(self._log_std(params))
        return -bound.mean() / np.prod(batch['x0'].shape[1:]), (task_state, metrics)

    def bound(self, params: PyTree, batch: PyTree, keys: Array) -> tuple[Array, dict[str, Array]]:
        """(1) of each picture in nats, [B], and its two parts, `log_likelihood` and `kl`, [B] each."""
        x, label = batch['x0'], self._condition(batch['label'])
        mean, log_variance = jnp.split(self.encoder.apply({'params': params['encoder']}, x, label), 2, -1)
        z = mean + jnp.exp(0.5 * log_variance) * _normal(keys, mean.shape[1:])
        y = self.generator.apply({'params': params['generator']}, z, label, x.shape[1:])
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1)
        log_likelihood = self._log_densities(params, x, y).sum(range(1, x.ndim))
        return log_likelihood - self.beta * kl, {'log_likelihood': log_likelihood, 'kl': kl}

    def sample(self, params: PyTree, frozen: PyTree, labels: Array, keys: Array, shape: tuple[int, ...]) -> jax.Array:
        """Pictures [B, *shape] in [-1, 1], one for each label and key, both [B]."""
        z_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        z = _normal(z_keys, (self.generator.latent_size,))
        y = self.generator.apply({'params': params['generator']}, z, self._condition(labels), shape)
        if self.likelihood == 'bernoulli':
            return 2 * jax.nn.sigmoid(y) - 1
        if self.samples == 'draw':
            y = y + jnp.exp(self._log_std(params)) * _normal(noise_keys, shape)
        return jnp.clip(y, -1, 1)

    def _log_densities(self, params: PyTree, x: Array, y: Array) -> jax.Array:
        """(3) or (4) of each value."""
        if self.likelihood == 'bernoulli':
            v = (x + 1) / 2
            return v * jax.nn.log_sigmoid(y) + (1 - v) * jax.nn.log_sigmoid(-y)
        log_std = self._log_std(params)
        return -0.5 * ((x - y) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)

    def _log_std(self, params: PyTree) -> Array:
        return np.float32(np.log(self.std)) if self.std else params['log_std']

    def _condition(self, label):
        return label if self.num_classes else None


def _normal(keys: Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
