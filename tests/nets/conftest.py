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


@pytest.fixture(scope='session')
def learn_digits():
    """(model, num_steps=50) -> the losses of as many steps on digits 8x8x1 with labels, relative to predicting zero.

    The target is the velocity eps - x0 on a straight line, the optimiser Adam, a step 32 fresh times and noises.
    """
    import optax
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)

    def learn_digits(model, num_steps=50, learning_rate=3e-3):
        adam = optax.adam(learning_rate)

        def loss(params, key):
            which, time, noise, dropout = jax.random.split(key, 4)
            chosen = jax.random.choice(which, len(images), (32,), replace=False)
            x0, eps = images[chosen], jax.random.normal(noise, (32, 8, 8, 1))
            t = jax.random.uniform(time, (32, 1, 1, 1))
            out = model.apply(params, (1 - t) * x0 + t * eps, 1000 * t[:, 0, 0, 0], labels[chosen], dropout)
            return jnp.mean((out - eps + x0) ** 2) / jnp.mean((eps - x0) ** 2)

        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, key)
            update, state = adam.update(gradient, state)
            return (optax.apply_updates(params, update), state), value

        params = jax.jit(model.init)(jax.random.key(0), images[:1], jnp.zeros(1), labels[:1])
        carry, step, losses = (params, adam.init(params)), jax.jit(step), []
        for i in range(num_steps):  # convolutions in a scan take one core
            carry, value = step(carry, jax.random.fold_in(jax.random.key(1), i))
            losses.append(float(value))
        return np.array(losses)

    return learn_digits
