"""Data whose denoiser, score, flow and density are known in closed form: Gaussian mixtures.

With components k of weight w_k, mean mu_k and diagonal variance v_k, the noised data is the mixture of
N(alpha mu_k, d_k), d_k = alpha^2 v_k + sigma^2, and with r_k(x) the components' responsibilities there

    E[x0 | x]  = sum_k r_k (mu_k + alpha v_k (x - alpha mu_k) / d_k)                                           (1)
    E[eps | x] = sum_k r_k sigma (x - alpha mu_k) / d_k                                                        (2)
    score(x)   = -sum_k r_k (x - alpha mu_k) / d_k                                                             (3)

which are finite at both ends, alpha = 0 and sigma = 0. Everything runs on NumPy (float64) and on jax arrays.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.denoisers import stateless
from diffjax.core.parameterizations import expand
from diffjax.core.schedules import Schedule, namespace
from diffjax.core.types import Array, Denoiser, Estimate

__all__ = ['gmm2d', 'gmm64']


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianMixture:
    """A mixture of M Gaussians in D dimensions, each component belonging to a class.

    A condition is a class number for each x; -1 is the null condition, the whole mixture.
    """

    weights: np.ndarray  # [M], sum 1
    means: np.ndarray  # [M, D]
    variances: np.ndarray  # [M, D]
    classes: np.ndarray | None = None  # [M] int; None: every component is class 0

    @property
    def mean(self) -> np.ndarray:
        """[D]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> np.ndarray:
        """[D, D]."""
        centred = self.means - self.mean
        return np.diag(self.weights @ self.variances) + (self.weights[:, None] * centred).T @ centred

    def _log_terms(self, x, alpha, sigma, cond):
        """Offsets x - alpha mu_k and variances d_k, [B, M, D]; log (w_k N(x; k)), [B, M]. alpha, sigma: [] or [B]."""
        xp = namespace(x)
        alpha, sigma = xp.asarray(alpha, x.dtype)[..., None, None], xp.asarray(sigma, x.dtype)[..., None, None]
        means, variances = xp.asarray(self.means, x.dtype), xp.asarray(self.variances, x.dtype)
        offset = x[:, None] - alpha * means
        spread = xp.broadcast_to(alpha**2 * variances + sigma**2, offset.shape)
        log_w = xp.asarray(np.log(self.weights), x.dtype)[None]
        if cond is not None:
            classes = np.zeros(len(self.weights), int) if self.classes is None else self.classes
            member = (cond[:, None] == classes[None]) | (cond[:, None] < 0)
            log_w = xp.where(member, log_w, -xp.inf)
            log_w = log_w - _logsumexp(log_w)
        return offset, spread, log_w - 0.5 * (offset**2 / spread + xp.log(2 * np.pi * spread)).sum(-1)

    def posterior(self, x: Array, alpha: Array, sigma: Array, cond: Array | None = None) -> Estimate:
        """E[x0 | x] and E[eps | x] (Eq. 1, 2). x: [B, D]; alpha, sigma: [] or [B]; cond: [B]."""
        xp = namespace(x)
        offset, spread, log_terms = self._log_terms(x, alpha, sigma, cond)
        r = xp.exp(log_terms - _logsumexp(log_terms))[..., None]
        pull = (r * offset / spread).sum(1)
        shrink = (r * (xp.asarray(self.means, x.dtype) + _last(alpha, x) * self.variances * offset / spread)).sum(1)
        return Estimate(shrink, expand(xp.asarray(sigma, x.dtype), x) * pull)

    def score(self, x: Array, alpha: Array, sigma: Array, cond: Array | None = None) -> Array:
        """grad log p of the noised data (Eq. 3). [B, D]."""
        offset, spread, log_terms = self._log_terms(x, alpha, sigma, cond)
        r = namespace(x).exp(log_terms - _logsumexp(log_terms))[..., None]
        return -(r * offset / spread).sum(1)

    def log_density(self, x: Array, alpha: Array = 1.0, sigma: Array = 0.0, cond: Array | None = None) -> Array:
        """log p of the noised data, in nats; of the data itself by default. [B]."""
        return _logsumexp(self._log_terms(x, alpha, sigma, cond)[2])[:, 0]

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """The exact denoiser on a schedule."""
        return stateless(lambda x, t, cond: self.posterior(x, schedule.alpha(t), schedule.sigma(t), cond))

    def sample(self, key: Array, num: int) -> tuple[Array, Array]:
        """(x0 [num, D], component of each [num])."""
        which, noise = jax.random.split(key)
        k = jax.random.categorical(which, jnp.log(self.weights), shape=(num,))
        eps = jax.random.normal(noise, (num, self.means.shape[1]))
        return jnp.asarray(self.means)[k] + jnp.sqrt(jnp.asarray(self.variances))[k] * eps, k

    def flow(self, schedule: Schedule, x: np.ndarray, t: float, s: float, cond=None, *, tolerance=1e-11) -> np.ndarray:
        """The probability-flow ODE's exact map from x at t to time s, float64. x: [B, D].

        Solved with SciPy's eighth-order DOP853 for x / hypot(alpha, sigma) against the angle arctan(sigma / alpha), in
        which the equation is smooth up to both ends and knows no schedule.
        """
        from scipy.integrate import solve_ivp

        ends = [np.array([schedule.alpha(np.float64(time)), schedule.sigma(np.float64(time))]) for time in (t, s)]
        phi = [np.arctan2(sigma, alpha) for alpha, sigma in ends]
        x = np.asarray(x, np.float64)

        def slope(angle, flat):
            guess = self.posterior(flat.reshape(x.shape), np.cos(angle), np.sin(angle), cond)
            return (np.cos(angle) * guess.eps - np.sin(angle) * guess.x0).ravel()

        start = (x / np.hypot(*ends[0])).ravel()
        end = solve_ivp(slope, phi, start, method='DOP853', rtol=tolerance, atol=tolerance).y[:, -1]
        return np.hypot(*ends[1]) * end.reshape(x.shape)


def _logsumexp(x: Array) -> Array:
    xp = namespace(x)
    top = x.max(-1, keepdims=True)
    return top + xp.log(xp.exp(x - top).sum(-1, keepdims=True))


def _last(coefficient, x):
    return namespace(x).asarray(coefficient, x.dtype)[..., None, None]


def gmm2d() -> GaussianMixture:
    """Eight anisotropic modes on a ring of radius 1.5, four classes of opposite pairs, unequal weights."""
    angle = 2 * np.pi * np.arange(8) / 8
    weights = 1.0 + (np.arange(8) % 3)
    return GaussianMixture(
        weights=weights / weights.sum(),
        means=1.5 * np.stack([np.cos(angle), np.sin(angle)], -1),
        variances=np.stack([0.02 + 0.01 * (np.arange(8) % 2), 0.04 - 0.01 * (np.arange(8) % 3)], -1),
        classes=np.arange(8) % 4,
    )


def gmm64(seed: int = 0, num_components: int = 10) -> GaussianMixture:
    """A random mixture in 64 dimensions with pixel-like scales: variances fall over four decades."""
    rng = np.random.default_rng(seed)
    scale = np.logspace(0, -2, 64)
    return GaussianMixture(
        weights=rng.dirichlet(np.full(num_components, 5.0)),
        means=0.7 * scale * rng.standard_normal((num_components, 64)),
        variances=(0.3 * scale * rng.uniform(0.5, 1.5, (num_components, 64))) ** 2,
        classes=np.arange(num_components),
    )
