"""Rotary positions: queries and keys turned by angles, so that their products depend on differences of positions.

Features 2 j and 2 j + 1 of a head are a point of the plane, turned by the angle p w_j (RoPE, Su et al. 2021,
arXiv:2104.09864, equation 34). Along several axes each has its own share of the features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

Turns = tuple[Array, Array]  # cosines and sines, each [L, head_dim / 2]


def turns(positions: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each [L, sum(sizes) / 2], of positions along several axes, in float32.

    Axis i has the angles p_i 10000^(-2 j / sizes[i]), j < sizes[i] / 2, one for each pair of a head's features.

    positions: [L, len(sizes)].
    """
    frequencies = [10_000.0 ** (-np.arange(0, size, 2) / size) for size in sizes]
    angles = np.concatenate([positions[:, i, None] * f for i, f in enumerate(frequencies)], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def grid_positions(*lengths: int) -> np.ndarray:
    """Every place of a grid, the last axis fastest: [prod(lengths), len(lengths)]."""
    return np.stack(np.meshgrid(*map(np.arange, lengths), indexing='ij'), axis=-1).reshape(-1, len(lengths))


def space_time_sizes(head_dim: int) -> tuple[int, int, int]:
    """Shares of a head's features, a multiple of 4 and at least 8, for time, rows and columns, each even.

    Rows and columns have as many each, 3/8 of all or a little less, and time the rest.
    """
    of_space = 2 * (3 * head_dim // 16)
    return head_dim - 2 * of_space, of_space, of_space


def turned(x: jax.Array, by: Turns | None) -> jax.Array:
    """Features 2 j and 2 j + 1 of each head as a point of the plane, turned by angle j. x: [B, L, heads, head_dim]."""
    if by is None:
        return x
    cos, sin = (table[:, None] for table in by)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)
