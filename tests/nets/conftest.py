"""What the tests of networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module', autouse=True)
def compiled_fast(fast_compilation):
    """Every test of a network: they run for milliseconds and compile for seconds."""


@pytest.fixture
def perturb():
    """Adds noise to every parameter but the fixed positions: zero-initialised layers would hide most mistakes."""

    def perturb(params, scale=0.2, seed=1):
        rng = np.random.default_rng(seed)

        def noisy(path, leaf):
            noise = scale * rng.standard_normal(leaf.shape).astype(np.float32)
            return leaf if 'pos_embed' in jax.tree_util.keystr(path) else leaf + jnp.asarray(noise)

        return jax.tree_util.tree_map_with_path(noisy, params)

    return perturb


@pytest.fixture
def image_batch():
    """(x, t, labels) of random images `[B, H, W, C]` with 5 classes and times on the 0..1000 scale."""

    def image_batch(shape, seed=0):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape).astype(np.float32)
        t = rng.uniform(0, 1000, shape[0]).astype(np.float32)
        return jnp.asarray(x), jnp.asarray(t), jnp.arange(shape[0]) % 5

    return image_batch
