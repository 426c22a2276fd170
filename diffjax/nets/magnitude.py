"""Layers that keep the magnitude of what passes through them (Karras et al. 2024, "EDM2", arXiv:2312.02696).

The magnitude of an array is the root mean square of its elements. With inputs of magnitude 1 and uncorrelated, every
layer here has outputs of magnitude 1, whatever its parameters: nothing grows with depth or with training.

    weights      w_i <- w_i sqrt(n) / |w_i|, one row w_i of n numbers for each output; the layer uses w_i / sqrt(n) (1)
    SiLU         silu(x) / 0.596                                                                                    (2)
    sum          ((1 - r) a + r b) / sqrt((1 - r)^2 + r^2)                                                          (3)
    concat       sqrt((n_a + n_b) / ((1 - r)^2 + r^2)) [(1 - r) / sqrt(n_a) a, r / sqrt(n_b) b]                     (4)
    Fourier      sqrt(2) cos(2 pi (f t + phi)),   f ~ N(0, 1), phi ~ U(0, 1), both fixed                            (5)

(1) is the paper's algorithm 1, appendix B.4; (2), (3), (4) and (5) are its equations 81, 88, 103 and 75. The rows of
(1) are normalised in the forward pass, always, so that a gradient is orthogonal to its row; and what is stored is
normalised after each update ("forced"), or else rows would grow and learn ever more slowly. Averages of parameters are
shorter than 1 and need the former.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array, PyTree

EPSILON = 1e-4  # added to magnitudes before dividing by them
SILU_MAGNITUDE = 0.596  # of silu(x) for x ~ N(0, 1)
WEIGHTS = 'weight'  # the name of every parameter that (1) normalises; its last axis is the output's


def normalize(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
    """x / (epsilon + its root mean square over `axes`), in float32 and back in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    # the root has no derivative at zero, where all this is x / epsilon
    squares = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    magnitude = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return (x32 / (EPSILON + magnitude)).astype(x.dtype)


def normalize_weight(weight: jax.Array) -> jax.Array:
    """Equation (1) for `[..., outputs]`."""
    return normalize(weight, tuple(range(weight.ndim - 1)))


def normalize_weights(params: PyTree) -> PyTree:
    """Parameters with every weight of these layers normalised; the rest as it is."""

    def one(path, leaf):
        return normalize_weight(leaf) if path[-1].key == WEIGHTS else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def silu(x: jax.Array) -> jax.Array:
    """Equation (2)."""
    return nn.silu(x) / SILU_MAGNITUDE


def mix(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """Equation (3): the magnitude-preserving sum, with the share `balance` = r of b."""
    return ((1 - balance) * a + balance * b) / math.hypot(1 - balance, balance)


def concatenate(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """Equation (4), along the last axis: both parts contribute as (1 - r) to r, however many channels they have."""
    num_a, num_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt(num_a + num_b) / math.hypot(1 - balance, balance)
    a, b = a * (scale * (1 - balance) / math.sqrt(num_a)), b * (scale * balance / math.sqrt(num_b))
    return jnp.concatenate([a, b], axis=-1)


def _normal_rows(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return normalize_weight(jax.random.normal(key, tuple(shape)))


class Linear(nn.Module):
    """A linear layer without bias: `[..., D] -> [..., features]`, or a convolution where `kernel_size` is 3.

    `[B, H, W, D] -> [B, H, W, features]` then, with zeros around. `gain` multiplies the weight.
    """

    features: int
    compute_dtype: Any = jnp.float32
    kernel_size: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        size = self.kernel_size
        shape = (*((size, size) if size > 1 else ()), x.shape[-1], self.features)
        weight = self.param(WEIGHTS, _normal_rows, shape)
        fan_in = math.prod(shape[:-1])
        weight = (normalize_weight(weight) * (gain / math.sqrt(fan_in))).astype(self.compute_dtype)
        x = x.astype(self.compute_dtype)
        if size == 1:
            return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], self.features)
        return jax.lax.conv_general_dilated(x, weight, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


class LabelVector(nn.Module):
    """A `Linear` of labels as one-hot vectors of magnitude 1: `int32 [B]` in 0..num_classes -> `[B, features]`.

    The null label, `num_classes`, is the zero vector, as dropped labels are in the paper: it has no parameters. A label
    beyond it gives NaN.
    """

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, labels: Array) -> jax.Array:
        weight = self.param(WEIGHTS, _normal_rows, (self.num_classes, self.features))
        rows = jnp.pad(normalize_weight(weight), ((0, 1), (0, 0)))
        return jnp.take(rows, labels, axis=0, mode='fill')


class FourierFeatures(nn.Module):
    """Equation (5): `t: [B] -> [B, features]`, in float32.

    Frequencies and phases are drawn once and stand among the parameters, as published weights have them; their gradient
    is zero.
    """

    features: int

    @nn.compact
    def __call__(self, t: Array) -> jax.Array:
        frequencies = self.param('frequencies', lambda key: jax.random.normal(key, (self.features,)))
        phases = self.param('phases', lambda key: jax.random.uniform(key, (self.features,)))
        frequencies, phases = jax.lax.stop_gradient((frequencies, phases))
        turns = jnp.asarray(t, jnp.float32)[:, None] * frequencies + phases
        return math.sqrt(2) * jnp.cos(2 * math.pi * turns)
