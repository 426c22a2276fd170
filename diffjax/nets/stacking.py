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


SCANNED = (True, False, 'auto')


def check_scan_layers(value: bool | str) -> None:
    """Raises ValueError where it is none of `SCANNED`."""
    if value not in SCANNED:
        raise ValueError(f"scan_layers={value!r} is not known; choose one of True, False, 'auto'")


def trunk(
    block: type[nn.Module],
    fields: dict[str, Any],
    carry: PyTree,
    *inputs: PyTree,
    depth: int,
    scan_layers: bool | str,
    remat: str,
    name: str = 'blocks',
) -> PyTree:
    """`carry` after `depth` blocks `carry, _ = block(**fields)(carry, *inputs)`, all of which see the same `inputs`.

    To be called in a compact method. A block returns a pair because a scan wants a carry and an output.

    scan_layers: True compiles one block and runs it `depth` times, with its parameters stacked under `name`; False
        compiles `depth` blocks, with parameters under `name_0`, `name_1`, ...; 'auto' has the parameters stacked, so
        that checkpoints are the same everywhere, and runs as is best on the platform: on CPUs a scan costs a tenth of
        a train step or more, elsewhere nothing but compile time matters.
    remat: one of `REMAT_POLICIES`.
    """
    if depth == 0:
        return carry
    if not scan_layers:
        block = _remembering(_apart(block), remat)
        for i in range(depth):
            carry, _ = block(**fields, name=f'{name}_{i}')(carry, *inputs)
        return carry
    layers = _scanned(block, depth, scan_layers, remat, (nn.broadcast,) * len(inputs))
    return layers(**fields, name=name)(carry, *inputs)[0]


def trunk_with_skips(
    block: type[nn.Module],
    fields: dict[str, Any],
    carry: PyTree,
    skips: Any = None,
    *,
    depth: int,
    scan_layers: bool | str,
    remat: str,
    name: str,
) -> tuple[PyTree, Any]:
    """(carry, outputs) after `depth` blocks `carry, output = block(**fields)(carry, skip)`, a skip for each.

    skips: the outputs of another such trunk, of which the last goes to the first block here; or None, for all.
    """
    if not scan_layers:
        block, outputs = _remembering(_apart(block), remat), []
        for i in range(depth):
            skip = None if skips is None else skips[depth - 1 - i]
            carry, output = block(**fields, name=f'{name}_{i}')(carry, skip)
            outputs.append(output)
        return carry, outputs
    layers = _scanned(block, depth, scan_layers, remat, (0,))
    return layers(**fields, name=name)(carry, jax.tree.map(lambda a: a[::-1], skips))


def _apart(block: type[nn.Module]) -> type[nn.Module]:
    """The block, behind which the compiler for CPUs has to finish the carry, and before which its gradient.

    A residual stream's gradient is a sum over blocks, which it else computes anew, from the last block on, in the
    kernels of each block: work that grows with the square of the depth. KEEP_BARRIERS in training/loop.py belongs here.
    """
    if jax.default_backend() != 'cpu':
        return block

    class Apart(block):
        def __call__(self, carry, *inputs):
            carry, output = super().__call__(carry, *inputs)
            return jax.lax.optimization_barrier(carry), output

    Apart.__name__, Apart.__qualname__ = block.__name__, block.__qualname__
    return Apart


def _remembering(block: type[nn.Module], remat: str, *, prevent_cse: bool = True) -> type[nn.Module]:
    return block if remat == 'none' else nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)


def _scanned(block: type[nn.Module], depth: int, scan_layers: bool | str, remat: str, in_axes: tuple) -> Any:
    """The block `depth` times, parameters stacked: a loop in the program, or written out."""
    written_out = scan_layers == 'auto' and jax.default_backend() == 'cpu'
    return nn.scan(
        # Inside a loop nothing can be shared with the forward pass anyway, and the barrier against it costs time.
        _remembering(_apart(block) if written_out else block, remat, prevent_cse=written_out),
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=in_axes,
        length=depth,
        unroll=depth if written_out else 1,
    )


def stack_layers(params: PyTree, name: str = 'blocks') -> PyTree:
    """Unrolled parameters (`scan_layers=False`) -> those of the same network with `scan_layers=True` or 'auto'."""
    layers = {key for key in params if key.startswith(f'{name}_') and key[len(name) + 1 :].isdecimal()}
    if not layers:
        raise ValueError(f"these parameters have no '{name}_0', '{name}_1', ... to stack; they have {sorted(params)}")
    rest = {key: value for key, value in params.items() if key not in layers}
    in_order = [params[f'{name}_{i}'] for i in range(len(layers))]
    return rest | {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)}


def unstack_layers(params: PyTree, name: str = 'blocks') -> PyTree:
    """Stacked parameters -> those of the same network with `scan_layers=False`."""
    if name not in params:
        raise ValueError(f'these parameters have no stacked {name!r}; they have {sorted(params)}')
    rest = {key: value for key, value in params.items() if key != name}
    depth = jax.tree.leaves(params[name])[0].shape[0]
    return rest | {f'{name}_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(depth)}
