"""From a Flax module to pure functions over a plain pytree of parameters."""

import math

import jax
from flax import linen as nn

from diffjax.core.types import Array, Model, PyTree
from diffjax.nets.placement import Place, placing


def as_model(module: nn.Module, place: Place | None = None) -> Model:
    """The pure functions of a network.

    init(key, x, t, cond) -> params            nested plain dicts of float32 arrays; works under `jax.eval_shape`
    apply(params, x, t, cond, key=None)        -> [B, ..., out_channels], float32

    place: where activations go (nets/placement.py); None leaves it to the compiler.
    `key` drives dropout: without one the network is deterministic, as it must be when sampling.
    A module may have two methods more, which others go without: `project(params) -> params`, the step after each
    update, and, with `has_log_variance`, `log_variance(t) -> [B]`, the uncertainty that it learns.
    """

    def init(key: jax.Array, x: Array, t: Array, cond: Array | None = None) -> PyTree:
        return module.init({'params': key}, x, t, cond)['params']

    def apply(params: PyTree, x: Array, t: Array, cond: Array | None = None, key: jax.Array | None = None) -> jax.Array:
        rngs = {} if key is None else {'dropout': key}
        with placing(place):
            return module.apply({'params': params}, x, t, cond, deterministic=key is None, rngs=rngs)

    def log_variance(params: PyTree, t: Array) -> jax.Array | None:
        if not getattr(module, 'has_log_variance', False):
            return None
        return module.apply({'params': params}, t, method='log_variance')

    return Model(init, apply, getattr(module, 'project', unchanged), log_variance)


def unchanged(params: PyTree) -> PyTree:
    return params


def count_parameters(params: PyTree) -> int:
    """Number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
