"""Clips that only a network over time can make, and training on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def moving_bar(key, num, num_frames=4, size=4):
    """(clips to be made, what is seen of them), `[num, T, size, size, 1]` each.

    A bright column begins anywhere and moves to the right by one each frame, round the edge. Of the first frame all is
    seen, of the others nothing: noise. A network that makes each frame by itself can but give their mean.
    """
    where, noise = jax.random.split(key)
    start = jax.random.randint(where, (num, 1, 1), 0, size)
    bright = jnp.arange(size) == (start + jnp.arange(num_frames)[:, None]) % size
    x0 = jnp.broadcast_to(2.0 * bright[:, :, None, :, None] - 0.5, (num, num_frames, size, size, 1))
    eps = jax.random.normal(noise, x0.shape)
    return x0, eps.at[:, 0].set(x0[:, 0])


def learn(model, num_steps=50, learning_rate=1e-2):
    """The losses of as many steps of Adam, each on 16 fresh clips, as shares of the variance of what is not seen."""
    adam = optax.adam(learning_rate)

    def loss(params, key):
        x0, seen = moving_bar(key, 16)
        out = model.apply(params, seen, jnp.full(16, 500.0), None)
        return jnp.mean((out - x0)[:, 1:] ** 2) / jnp.var(x0)

    @jax.jit
    def step(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        update, state = adam.update(gradient, state)
        return (optax.apply_updates(params, update), state), value

    params = jax.jit(model.init)(jax.random.key(0), moving_bar(jax.random.key(0), 1)[0], jnp.zeros(1), None)
    carry, losses = (params, adam.init(params)), []
    for i in range(num_steps):
        carry, value = step(carry, jax.random.fold_in(jax.random.key(1), i))
        losses.append(float(value))
    return np.array(losses)
