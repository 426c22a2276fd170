"""Trunks of equal blocks: one compiled block run many times or as many blocks, and what the backward pass remembers.

Parameters of a trunk stand stacked, each with a leading axis over layers, under one name (`blocks`), or unrolled under
one name for each layer (`blocks_0`, `blocks_1`, ...); `stack_layers` and `unstack_layers` convert.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import PyTree

# What the backward pass finds in memory: everything; the input of each block; that and the products with weights.
REMAT_POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def trunk(
    block: type[nn.Module],
    fields: dict[str, Any],
    carry: PyTree,
    *inputs: PyTree,
    depth: int,
    scan_layers: bool,
    remat: str,
    name: str = 'blocks',
) -> PyTree:
    """`carry` after `depth` blocks `carry, _ = block(**fields)(carry, *inputs)`. To be called in a compact method.

    A block returns a pair because a scan wants a carry and an output; every block sees the same `inputs`. With
    `scan_layers` one block is compiled and run `depth` times, its parameters stacked under `name`; without, there are
    `depth` blocks with parameters under `name_0`, `name_1`, ... `remat` is one of `REMAT_POLICIES`.
    """
    if depth == 0:
        return carry
    if remat != 'none':
        # Inside a scan nothing can be shared with the forward pass anyway, and the barrier against it costs time.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=not scan_layers)
    if scan_layers:
        per_layer = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True, 'dropout': True}}
        layers = nn.scan(block, **per_layer, in_axes=nn.broadcast, length=depth)
        return layers(**fields, name=name)(carry, *inputs)[0]
    for i in range(depth):
        carry, _ = block(**fields, name=f'{name}_{i}')(carry, *inputs)
    return carry


def stack_layers(params: PyTree, name: str = 'blocks') -> PyTree:
    """Unrolled parameters (`scan_layers=False`) -> those of the same network with `scan_layers=True`."""
    layers = {key for key in params if key.startswith(f'{name}_') and key[len(name) + 1 :].isdecimal()}
    if not layers:
        raise ValueError(f"these parameters have no '{name}_0', '{name}_1', ... to stack; they have {sorted(params)}")
    rest = {key: value for key, value in params.items() if key not in layers}
    in_order = [params[f'{name}_{i}'] for i in range(len(layers))]
    return rest | {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)}


def unstack_layers(params: PyTree, name: str = 'blocks') -> PyTree:
    """Stacked parameters (`scan_layers=True`) -> those of the same network with `scan_layers=False`."""
    if name not in params:
        raise ValueError(f'these parameters have no stacked {name!r}; they have {sorted(params)}')
    rest = {key: value for key, value in params.items() if key != name}
    depth = jax.tree.leaves(params[name])[0].shape[0]
    return rest | {f'{name}_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(depth)}
