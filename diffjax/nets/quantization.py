"""From vectors to tokens and back: a codebook, and finite scalar quantisation.

A codebook (VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937, section 3.1) replaces a vector by its nearest code:

    k = argmin_j |z - e_j|,     z_q = e_k                                                                           (1)

Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505, section 3.1) has no codebook to learn: each of a few
channels is bounded and rounded to L levels, and the codes are all combinations,

    f(z) = tanh(z + s) h - o,     z_q = round(f(z)) / floor(L / 2),                                                 (2)

with h = (L - 1)(1 + 1e-3) / 2, o = 1/2 for an even L and 0 for an odd one, and s = artanh(o / h), so that f(0) = 0.

In both the gradient of z_q is that of z ("straight through": `straight_through`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SLACK = 1e-3  # of (2): the outermost levels are reached for finite z


def nearest_codes(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Equation (1): `z: [..., D], codebook: [K, D] -> int32 [...]`, in float32."""
    flat = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    codebook = codebook.astype(jnp.float32)
    distances = (codebook**2).sum(-1) - 2 * flat @ codebook.T  # |z|^2 is the same for all codes
    return jnp.argmin(distances, axis=-1).astype(jnp.int32).reshape(z.shape[:-1])


def straight_through(z: jax.Array, quantised: jax.Array) -> jax.Array:
    """`quantised`, whose gradient goes to `z` unchanged."""
    return z + jax.lax.stop_gradient(quantised - z)


def bounded(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """f(z) of (2): `[..., len(levels)] -> [..., len(levels)]`."""
    count = np.asarray(levels)
    half = (count - 1) * (1 + SLACK) / 2
    offset = np.where(count % 2 == 0, 0.5, 0.0)
    return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def scaled(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """f(z) / floor(L / 2), which (2) rounds to the nearest level: values in [-1, 1]."""
    return bounded(z, levels) / (np.asarray(levels) // 2)


def fsq(z: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Equation (2), with the straight-through gradient of `scaled`: values in [-1, 1]."""
    half = np.asarray(levels) // 2
    z = scaled(z, levels)
    return straight_through(z, jnp.round(z * half) / half)


def nearest_levels(values: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Values near those of (2) -> the nearest of them, `[..., len(levels)]`."""
    count = np.asarray(levels)
    half = count // 2
    return jnp.clip(jnp.round(values * half), -half, count - 1 - half) / half


def fsq_tokens(quantised: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Values of (2) as tokens in 0 .. prod(levels) - 1, the first channel fastest: `[..., D] -> int32 [...]`."""
    half = np.asarray(levels) // 2
    digits = jnp.round(quantised * half).astype(jnp.int32) + half
    return (digits * _places(levels)).sum(-1).astype(jnp.int32)


def fsq_values(tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
    """The inverse of `fsq_tokens`: `int32 [...] -> float32 [..., D]`."""
    levels = np.asarray(levels)
    digits = tokens[..., None] // _places(levels) % levels
    return (digits - levels // 2).astype(jnp.float32) / (levels // 2)


def _places(levels: Sequence[int]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)
