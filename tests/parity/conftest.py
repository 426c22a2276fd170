"""Ours and theirs from the same start, with the same exact model and the same noise. Needs the extra `parity`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles
from diffjax.core.sampling import pad, sample, sample_keys

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))


class Ours:
    """One compiled program for a schedule and a precision, which follows any plan and keeps every state."""

    ROWS, REMEMBERED, NOISES, BATCH = 40, 13, 1, 5

    def __init__(self, schedule):
        self.schedule, self.mixture = schedule, oracles.gmm2d()
        self._programs = {dtype: self._compile() for dtype in (np.float32, np.float64)}

    def _compile(self):
        denoiser = oracles.gmm2d().denoiser(self.schedule)
        return jax.jit(lambda plan, x, keys: sample(denoiser, plan, x, None, keys, save=lambda x, t: x)[1])

    def start(self, t):
        """x at time t, [B, 2]."""
        rng, t = np.random.default_rng(3), np.float64(t)
        which = rng.choice(8, self.BATCH, p=self.mixture.weights)
        x0 = self.mixture.means[which] + np.sqrt(self.mixture.variances[which]) * rng.standard_normal((self.BATCH, 2))
        return self.schedule.alpha(t) * x0 + self.schedule.sigma(t) * rng.standard_normal(x0.shape)

    def __call__(self, plan, x, dtype=np.float64):
        """The states before each evaluation and the last one, [M + 1, B, 2]."""
        padded = pad(plan, self.ROWS, self.REMEMBERED, self.NOISES)
        with jax.enable_x64(dtype == np.float64):
            keys = sample_keys(jax.random.key(0), self.BATCH)
            states = self._programs[dtype](padded, jnp.asarray(x, dtype), keys)
        return np.concatenate([x[None], np.asarray(states, np.float64)[: plan.num_evaluations]])

    def noise(self, dtype=np.float64):
        """m -> the draw of row m, as sample's docstring has it: from fold_in(key, m + 1)."""
        with jax.enable_x64(dtype == np.float64):
            keys = sample_keys(jax.random.key(0), self.BATCH)

            def draw(key, m):
                return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, m + 1), 0), (2,), dtype)

            draws = jax.vmap(lambda m: jax.vmap(draw, (0, None))(keys, m))(jnp.arange(self.ROWS))
        return lambda m: np.asarray(draws[max(m, 0)], np.float64)


_programs = {}


@pytest.fixture(scope='session')
def ours():
    """schedule -> `Ours`, compiled once."""
    return lambda schedule: _programs.setdefault(schedule, Ours(schedule))
