"""Learning to encode: the first stage of latent diffusion (Esser et al. 2021, VQGAN; Rombach et al. 2022, appendix G).

With y = decode(encode(x)) the loss of a picture is

    |x - y| + w_p perceptual(x, y) + bottleneck + lambda w_g factor * -mean D(y)                                    (1)
    + factor / 2 * (mean relu(1 - D(x)) + mean relu(1 + D(y)))                                                      (2)

where D is trained by (2) alone and everything else by (1) alone: each side is a constant to the other, so that one
gradient trains both. `factor` is 0 before `discriminator_start` steps and 1 from then on. The adaptive weight (Esser et
al. 2021, equation 7) keeps the two pulls on the decoder's last layer L alike:

    lambda = |grad_L reconstruction| / (|grad_L generator| + 1e-4), at most 1e4                                     (3)

The bottleneck costs, per value of the picture,

    kl      w_kl KL(N(mean, std^2) || N(0, 1))                                                                      (4)
    vq      beta |z - sg(e)|^2 + |sg(z) - e|^2, the latter only without `codebook_decay`                            (5)

With `codebook_decay` the codes are running means of what they stand for (van den Oord et al. 2017, appendix A.1), kept
in the task's state and written into the parameters after each update, and a code that is hardly used is moved onto an
encoding of the batch at hand (Dhariwal et al. 2020, Jukebox, section 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from diffjax.core.types import Array, PyTree
from diffjax.nets import Autoencoder
from diffjax.nets.autoencoder import Codes, Gaussian
from diffjax.nets.discriminator import PatchDiscriminator
from diffjax.tasks.task import Task

__all__ = ['Autoencoding']

MAX_ADAPTIVE_WEIGHT = 1e4
MIN_USE = 0.03  # of a code, as a share of the mean use; below it the code is moved
LAST_LAYER = ('decoder', 'conv_out', 'kernel')


class Codebook(NamedTuple):
    """Running sums over what each code stood for: how many encodings, and their sum."""

    counts: Array  # [K]
    sums: Array  # [K, D]


@dataclass(frozen=True, kw_only=True)
class Autoencoding(Task):
    """An autoencoder trained on (1) to (5). A batch holds `x0: [B, (T,) H, W, C]`.

    perceptual(frozen, x, y) -> [B], or None; its parameters come in `frozen`, and a clip's frames count as pictures.
    reconstruction: 'l1' or 'l2' (squares halved: a Gaussian's negative log-likelihood of unit variance).
    """

    network: Autoencoder
    discriminator: PatchDiscriminator | None = None
    perceptual: Callable[[PyTree, Array, Array], Array] | None = None
    reconstruction: str = 'l1'
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    commitment_weight: float = 0.25
    codebook_decay: float = 0.0
    discriminator_weight: float = 0.5
    discriminator_start: int = 0

    def __post_init__(self):
        if self.reconstruction not in ('l1', 'l2'):
            raise ValueError(f"reconstruction is 'l1' or 'l2', got {self.reconstruction!r}")
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f'codebook_decay is 0 (none) or a decay below 1, got {self.codebook_decay}')
        for name in ('perceptual_weight', 'kl_weight', 'commitment_weight', 'discriminator_weight'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must be at least 0, got {getattr(self, name)}')

    @property
    def averages_codes(self) -> bool:
        return self.network.bottleneck == 'vq' and self.codebook_decay > 0

    def init(self, key, batch):
        first, second = jax.random.split(key)
        x = batch['x0'][:1]
        params = {'autoencoder': self.network.init(first, x)['params']}
        if self.discriminator is not None:
            params['discriminator'] = self.discriminator.init(second, _frames(x))['params']
        if not self.averages_codes:
            return params, ()
        codes = params['autoencoder']['codebook']
        return params, Codebook(jnp.ones(len(codes)), codes)

    def loss(self, params, task_state, frozen, batch, step, keys):
        x = batch['x0']
        code = self.encode(params, x)
        z = self.draw(code, keys)
        y = self.decode(params, z)
        reconstruction, metrics = self._reconstruction(frozen, x, y)
        bottleneck, more = self._bottleneck(code, x)
        total, metrics = reconstruction + bottleneck, metrics | more
        if self.discriminator is not None:
            adversarial, more = self._adversarial(params, frozen, x, y, z, step)
            total, metrics = total + adversarial, metrics | more
        if self.averages_codes:
            task_state, more = self._follow(task_state, code, keys)
            metrics |= more
        return total, (task_state, metrics)

    def project(self, params: PyTree, task_state: PyTree) -> PyTree:
        """The running means become the codes."""
        if not self.averages_codes:
            return params
        codes = task_state.sums / task_state.counts[:, None]
        return params | {'autoencoder': params['autoencoder'] | {'codebook': codes}}

    # What else is done with a trained one

    def encode(self, params: PyTree, x: Array) -> Gaussian | Codes:
        return self.network.apply({'params': params['autoencoder']}, x, method='encode')

    def decode(self, params: PyTree, z: Array) -> Array:
        return self.network.apply({'params': params['autoencoder']}, z, method='decode')

    def draw(self, code: Gaussian | Codes, keys: Array) -> Array:
        """What the decoder is given in training: a draw from the posterior, one key for each example, or the codes."""
        if isinstance(code, Codes):
            return code.quantised
        eps = jax.vmap(lambda key: jax.random.normal(key, code.mean.shape[1:]))(keys)
        return code.mean + code.std * eps

    def reconstruct(self, params: PyTree, x: Array) -> Array:
        """The picture of the posterior's mean, or of the codes."""
        code = self.encode(params, x)
        return self.decode(params, code.mean if isinstance(code, Gaussian) else code.quantised)

    # The parts of the loss

    def _reconstruction(self, frozen: PyTree, x: Array, y: Array) -> tuple[Array, dict[str, Array]]:
        error = jnp.abs(x - y).mean() if self.reconstruction == 'l1' else 0.5 * ((x - y) ** 2).mean()
        metrics = {'reconstruction': error, 'mse': ((x - y) ** 2).mean()}
        if self.perceptual is None:
            return error, metrics
        distance = self.perceptual(frozen, _frames(x), _frames(y)).mean()
        return error + self.perceptual_weight * distance, metrics | {'perceptual': distance}

    def _bottleneck(self, code: Gaussian | Codes, x: Array) -> tuple[Array, dict[str, Array]]:
        if isinstance(code, Gaussian):
            kl = code.kl().sum() / x.size
            return self.kl_weight * kl, {'kl': kl}
        if self.network.bottleneck == 'fsq':
            return jnp.float32(0), {}
        codes = stop_gradient(code.quantised)
        commitment = ((code.z - codes) ** 2).mean()
        cost = self.commitment_weight * commitment
        if not self.averages_codes:
            cost = cost + ((stop_gradient(code.z) - code.codes) ** 2).mean()
        return cost, {'commitment': commitment}

    def _adversarial(self, params, frozen, x, y, z, step) -> tuple[Array, dict[str, Array]]:
        def judge(weights, pictures):
            return self.discriminator.apply({'params': weights}, _frames(pictures))

        weights, factor = params['discriminator'], jnp.where(step >= self.discriminator_start, 1.0, 0.0)
        adaptive = self._adaptive_weight(params, frozen, x, z)
        generator = -judge(stop_gradient(weights), y).mean()
        real, fake = judge(weights, x), judge(weights, stop_gradient(y))
        hinge = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        metrics = {'generator': generator, 'discriminator': hinge, 'adaptive_weight': adaptive}
        metrics |= {'real_score': real.mean(), 'fake_score': fake.mean()}
        return factor * (self.discriminator_weight * adaptive * generator + hinge), metrics

    def _adaptive_weight(self, params: PyTree, frozen: PyTree, x: Array, z: Array) -> Array:
        """Equation (3). Only the last layer is differentiated; the rest is what the loss computes anyway."""
        params = stop_gradient(params)
        z = stop_gradient(z)

        def decode(kernel):
            return self.decode(params | {'autoencoder': _with(params['autoencoder'], LAST_LAYER, kernel)}, z)

        def generator(kernel):
            return -self.discriminator.apply({'params': params['discriminator']}, _frames(decode(kernel))).mean()

        kernel = params['autoencoder']
        for name in LAST_LAYER:
            kernel = kernel[name]
        pulls = jax.grad(lambda k: self._reconstruction(frozen, x, decode(k))[0])(kernel), jax.grad(generator)(kernel)
        reconstruction, adversarial = (jnp.sqrt(jnp.sum(pull**2)) for pull in pulls)
        return stop_gradient(jnp.clip(reconstruction / (adversarial + 1e-4), 0, MAX_ADAPTIVE_WEIGHT))

    def _follow(self, state: Codebook, code: Codes, keys: Array) -> tuple[Codebook, dict[str, Array]]:
        """The running sums after this batch; codes that are hardly used start anew at encodings drawn from it."""
        z = stop_gradient(code.z).reshape(-1, code.z.shape[-1])
        tokens, size, decay = code.tokens.reshape(-1), len(state.counts), self.codebook_decay
        used = jnp.zeros(size).at[tokens].add(1.0)
        counts = decay * state.counts + (1 - decay) * used
        sums = decay * state.sums + (1 - decay) * jnp.zeros_like(state.sums).at[tokens].add(z)
        key = jax.random.fold_in(keys[0], 1)  # not a key that any example draws with
        fresh = z[jax.random.randint(key, (size,), 0, len(z))]
        dead = counts < MIN_USE * len(z) / size
        mean_use = len(z) / size
        counts, sums = jnp.where(dead, mean_use, counts), jnp.where(dead[:, None], mean_use * fresh, sums)
        return Codebook(counts, sums), {'codes_used': (used > 0).mean(), 'codes_moved': dead.mean()}


def _frames(x: Array) -> Array:
    """Pictures [N, H, W, C], a clip's frames one by one."""
    return x.reshape(-1, *x.shape[-3:])


def _with(tree: PyTree, path: tuple[str, ...], value: Array) -> PyTree:
    """The tree with one leaf replaced."""
    name, *rest = path
    return tree | {name: _with(tree[name], tuple(rest), value) if rest else value}
